"""Every test runs on one thread: two threads on a busy two-core machine are many times slower."""

import gc
import logging
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from run_kit import models_of_one_layer, train  # noqa: F401 - fixtures

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Commands that run inside a test quieten loggers for good; the next test is to see warnings again."""
    names = ["dopd", *(name for name in logging.root.manager.loggerDict if name.startswith("dopd."))]
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in names}
    handlers = list(logging.getLogger("dopd").handlers)
    yield
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "dopd"]:
        logger = logging.getLogger(name)
        level, logger.propagate = before.get(name, (logging.NOTSET, True))
        logger.setLevel(level)
    logging.getLogger("dopd").handlers[:] = handlers


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is forgotten behind it."""
    from dopd.registry import Registry

    everyone = [one for one in gc.get_objects() if type(one) is Registry]
    before = [(one, dict(one), dict(one.code), dict(one.aliases)) for one in everyone]
    path, modules = list(sys.path), set(sys.modules)
    yield
    for one, entries, code, aliases in before:
        for mapping, earlier in ((one, entries), (one.code, code), (one.aliases, aliases)):
            mapping.clear()
            mapping.update(earlier)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("my_", "_dopd_code_")):
            del sys.modules[name]
