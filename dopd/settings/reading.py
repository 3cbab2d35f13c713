"""YAML as configurations are written: UTF-8, every key once, numbers that mean what they look like, of bounded size."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dopd.errors import ConfigError
from dopd.files import check_plain

MAX_BYTES = 2**20
MAX_VALUES = 50_000  # with every alias written out
_MAX_DEPTH = 100
_TIMESTAMP, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float"))
# YAML 1.1 reads 010 as 8, 1:30 as 90, 1e-3 as text and 2024-01-01 as a date. These are YAML 1.2's, with `_` in digits.
_NUMBERS = {
    _INT: r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0b[01]+)$",
    _FLOAT: r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}
_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - the library declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TIMESTAMP, *_NUMBERS)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what either this reader or any other YAML reader would take for something else than text."""


for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _STARTS)


def as_mapping(setting: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A mapping of the host's configuration, empty where there is none: its types allow the text of a command line too,
    which its check does not.
    """
    return dict(setting) if isinstance(setting, Mapping) else {}


def read_yaml(text: str) -> Any:
    """The one value of a YAML text.

    Raises:
        ConfigError: it is not YAML, has a key twice, refers to itself, or is too large; without the name of its place.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"is nested more than {_MAX_DEPTH} levels deep: no setting is") from None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # What the library's constructors end with where a value is not of its tag (`!!int x`), or a number too long.
        raise ConfigError(f"is not YAML: a value cannot be read ({type(error).__name__})") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml_file(path: Path, what: str = "config") -> dict[str, Any]:
    """The keys and values of a YAML file; `what` is how messages call it.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, is not YAML, or is no mapping.
    """
    name = f"{what} {str(path)!r}"
    check_plain(what, path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{name} has {size / 2**20:.1f} MiB, and a configuration at most 1: is it another file?")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name} is not UTF-8 (line {line}): save it with that encoding") from None
    try:
        values = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from None
    if not isinstance(values, Mapping):
        got = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{name} must be a mapping of keys to values, got {got}")
    return {str(key): value for key, value in values.items()}


def dump_yaml(values: Mapping[str, Any], *, flow: bool = False) -> str:
    """A mapping as YAML that `read_yaml` reads back; in one line as it is written behind a flag."""
    if not flow:
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    line = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=MAX_BYTES, allow_unicode=True
    )
    return line.strip()


def _check_node(root: yaml.Node) -> None:
    """Count what constructing would make, aliases written out, without making it."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        number = id(node)
        if number in open_nodes:
            raise yaml.YAMLError(f"an alias (*) of a value inside of itself,{_where(node)}")
        if number not in sizes:
            if depth > _MAX_DEPTH:
                raise RecursionError
            open_nodes.add(number)
            sizes[number] = 1 + sum(size(child, depth + 1) for child in _children(node))
            open_nodes.remove(number)
        if sizes[number] > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values, aliases (*) written out,{_where(node)}")
        return sizes[number]

    size(root, 0)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    doubled = [
        key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and keys.count((key.tag, key.value)) > 1
    ]
    if doubled:
        lines = " and ".join(str(key.start_mark.line + 1) for key in doubled if key.value == doubled[0].value)
        raise yaml.YAMLError(f"the key {doubled[0].value!r} is there twice, in lines {lines}: leave one of them out")
    return [part for pair in node.value for part in pair]


def _where(node: yaml.Node) -> str:
    return f" line {node.start_mark.line + 1}"
