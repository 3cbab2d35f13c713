"""`dopd train --accelerate_config NAME`: the command again, in the processes that `accelerate launch` starts."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError, did_you_mean, first_line

# Flags of `accelerate launch`, under its own names, that differ between the machines of one run.
_OF_LAUNCHER = {
    "num_processes": "processes on all machines together",
    "num_machines": "machines",
    "machine_rank": "number of this machine, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "a free port there",
}


def add_launch(parser: argparse.ArgumentParser) -> None:
    """The flags, as TRL's command line has them."""
    group = parser.add_argument_group("several processes (accelerate launch)")
    group.add_argument(
        "--accelerate_config",
        metavar="NAME|FILE",
        help=f"a configuration of TRL's ({', '.join(config_names())}), or a file that `accelerate config` wrote",
    )
    for name, what in _OF_LAUNCHER.items():
        group.add_argument(f"--{name}", metavar="N" if name != "main_process_ip" else "ADDRESS", help=what)


def config_names() -> list[str]:
    """Names of the configurations that TRL brings."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """Found without an import of TRL, which takes seconds."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "accelerate_configs"


def launch_command(arguments: argparse.Namespace, command: Sequence[str]) -> list[str] | None:
    """What starts a command in several processes; `None` where no flag asks for them.

    Args:
        arguments: with the flags of `add_launch`.
        command: the command and its arguments, without those flags.

    Raises:
        ConfigError: no such configuration, or processes that were started already.
    """
    options = {name: getattr(arguments, name) for name in _OF_LAUNCHER if getattr(arguments, name) is not None}
    if arguments.accelerate_config is None and not options:
        return None
    if "LOCAL_RANK" in os.environ:
        first = "accelerate_config" if arguments.accelerate_config is not None else next(iter(options))
        raise ConfigError(
            f"{first}: this process was started by a launcher already (LOCAL_RANK is set): leave the flag out, or "
            "start the command without `accelerate launch` or torchrun"
        )
    own = [] if arguments.accelerate_config is None else ["--config_file", _config_file(arguments.accelerate_config)]
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *own, *flags]
    return [*launcher, "-m", "dopd.cli.main", *command]


def launched_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_launch` and their configuration say together, in the words of that configuration.

    Raises:
        ConfigError: no such configuration, or a number that is none.
    """
    from dopd.runs.splits import launch_file

    name, count = arguments.accelerate_config, arguments.num_processes
    if count is not None and not (str(count).isdigit() and int(count) > 0):
        raise ConfigError(f"num_processes (={count!r}) must be a whole number of at least 1")
    content = {} if name is None else launch_file(_config_file(name))
    return content if count is None else content | {"num_processes": int(count)}


def _config_file(name: str) -> str:
    if name in config_names():
        return str(_folder() / f"{name}.yaml")
    if Path(name).is_file():
        _check_file(name)
        return name
    raise ConfigError(
        f"accelerate_config (={name!r}) must be one of {', '.join(config_names())}, or a file that `accelerate config` "
        f"wrote.{did_you_mean(name, config_names())}"
    )


def _check_file(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file  # reads all of accelerate

    try:
        load_config_from_file(name)
    except Exception as error:  # each mistake in the file raises something of its own
        raise ConfigError(
            f"accelerate_config (={name!r}) is no configuration of accelerate: {type(error).__name__}: "
            f"{first_line(error)}. `accelerate config --config_file {name}` writes one"
        ) from error
