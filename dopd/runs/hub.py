"""Whether a hub can be reached, asked once and quickly: the hub's own client tries for a minute before it gives up."""

import os
from typing import Any, Literal

from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

_SECONDS = 10
Kind = Literal["model", "dataset"]
# A repository of that kind has one of these.
_FILES_OF = {"model": ("config.json", "adapter_config.json"), "dataset": ("README.md",)}


def unreachable(name: str, kind: Kind, **where: Any) -> str | None:
    """Why a hub id can be read neither from the hub nor from this machine's cache; `None` where it may well be.

    Folders, files and names that are no hub ids are left to their readers, and so is what the hub answers.

    Args:
        name (`str`): the hub id.
        kind (`str`): `"model"` or `"dataset"`.
        where: as of `from_pretrained`, which files are meant: `revision`, `cache_dir`, `subfolder`.
    """
    if os.path.exists(name) or not _looks_like_hub_id(name):
        return None
    try:
        revision = where.get("revision")
        files = [f"{where['subfolder']}/{file}" if where.get("subfolder") else file for file in _FILES_OF[kind]]
        for file in files:
            cached = try_to_load_from_cache(name, file, where.get("cache_dir"), revision=revision, repo_type=kind)
            if isinstance(cached, str):
                return None
        url = hf_hub_url(name, files[0], revision=revision, repo_type=kind)
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        get_session().head(url, timeout=_SECONDS)
    except HFValidationError:
        return None
    except Exception as error:
        # Clients of the hub fail with the errors of whatever network library they use.
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            f"no folder of that name is here, it is not in the cache of this machine, and the hub cannot be reached "
            f"({words}). Give a local folder, or fetch it where there is a network"
        )
    return None


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "~", os.sep))
