"""What can be the name of a model: a hub id, or a folder that is here."""

import os
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dopd.errors import ModelError, did_you_mean

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<rest>.*)")
_OF_HUB = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|resolve)/([^/\s]+))?/?")
_MOST_SHOWN = 5
_GIVE = "give a hub id (org/name), or the folder of a model on this machine"


def check_name(name: str, subfolder: str | None = None) -> None:
    """Refuse what cannot be the name of a model, before a library takes it for a broken hub id.

    Args:
        name (`str`): a hub id or a folder.
        subfolder (`str`, *optional*): in it, with the model.

    Raises:
        ModelError: it is an address, a file, a folder without a model, or a folder that is not here.
    """
    subject = f"model {name!r}"
    if os.path.isdir(name):
        _check_folder(subject, Path(name, subfolder or ""))
        return
    if os.path.exists(name):
        raise ModelError(f"{subject} is a file: give the folder that it is in")
    if address := _ADDRESS.fullmatch(name):
        hub_match = _OF_HUB.match(address["rest"])
        revision = f" and revision: {hub_match[2]}" if hub_match and hub_match[2] else ""
        way = f"its hub id is {hub_match[1]!r}{revision}" if hub_match else f"{_GIVE}, after fetching it from there"
        raise ModelError(f"{subject} is an address, and models are read from hub ids and folders: {way}")
    try:
        if name.startswith(("~", ".", os.sep)):
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        home = " ('~' is a folder in files of settings and in shells alone)" if name.startswith("~") else ""
        raise ModelError(
            f"{subject} cannot be read: it is no hub id, and no folder of that name is here{home}. "
            f"{_GIVE.capitalize()}.{_close(Path(name))}"
        ) from None


def _check_folder(subject: str, folder: Path) -> None:
    adapters = {path.parent.name for path in folder.glob("*/adapter_config.json")}
    named = {name for name in adapters if not name.startswith("checkpoint-")}  # PEFT's folders of adapters by name
    if (folder / "config.json").exists() or named:
        return
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = ", ..." if len(there) > _MOST_SHOWN else ""
    held = f"holds {', '.join(there[:_MOST_SHOWN])}{more}" if there else "is empty"
    whole = {path.parent.name for path in folder.glob("*/config.json")}
    models = [str(folder / name) for name in there if name in adapters | whole][:_MOST_SHOWN]
    way = f"name one in it: {', '.join(models)}" if models else "name one that save_pretrained has written"
    raise ModelError(f"{subject} is a folder without a model (no config.json in {str(folder)!r}, which {held}): {way}")


def _close(path: Path) -> str:
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    return did_you_mean(path.name, beside)
