"""What a run asks for that is not on this machine, found out before anything is loaded."""

import importlib.util
import os
import re
from collections.abc import Iterator

import torch
from transformers import Trainer

from dopd.errors import first_line
from dopd.rollout_settings import cache_implementation
from dopd.settings import as_mapping, quoted
from dopd.trainer.config import DOPDConfig

_NEEDS_A_MODEL = re.compile("(?i)model")  # some optimizers are made for the parameters of one
_PACKAGES = (("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel"))
_CACHE_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


def missing_here(args: DOPDConfig) -> Iterator[str]:
    """What the host would find out when the models are loaded, at the first rollout or at the first step.

    Args:
        args (`DOPDConfig`): of the run.
    """
    for name, package in _PACKAGES:
        if getattr(args, name) and importlib.util.find_spec(package) is None:
            yield f"{name} (={quoted(getattr(args, name))}) needs the package {package}, which is not installed here"
    if args.loss_backend == "triton" and not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        yield "loss_backend (='triton') needs a GPU, and there is none here: use 'chunked' or 'auto'"
    offloads = as_mapping(args.gradient_checkpointing_kwargs).get("offload") and args.gradient_checkpointing
    if offloads and not torch.cuda.is_available():
        yield "gradient_checkpointing_kwargs: offload (=True) moves states off a GPU, and there is none here: remove it"
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if not _NEEDS_A_MODEL.search(str(error)):
            yield f"optim (={str(getattr(args.optim, 'value', args.optim))!r}): {first_line(error)}"
    yield from _missing_of_the_cache(args)


def _missing_of_the_cache(args: DOPDConfig) -> Iterator[str]:
    kind = cache_implementation(args)
    if args.use_vllm or kind is None:
        return
    if "offloaded" in kind and not torch.cuda.is_available():
        yield (
            f"cache_implementation (={kind!r}) moves the cache off a GPU, and there is none here: use 'dynamic' or "
            "'static'"
        )
    backend = (as_mapping(args.generation_kwargs).get("cache_config") or {}).get("backend", "quanto")
    package = _CACHE_BACKENDS.get(backend)
    if kind == "quantized" and package is not None and not _is_installed(package):
        yield (
            f"cache_implementation (='quantized') needs the package {package}, which is not installed here: install "
            "it, or use 'dynamic'"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it is a part of
        return False
