"""YAML as trees of text. The meaning of unquoted text depends on its setting (`values.py`), not on its form. YAML
itself would read `016` as 14, `yes` as true and `2024-01-01` as a date."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moce_ds.common.errors import ConfigError
from moce_ds.common.host.machine import refused

# Exceptions of PyYAML's parser on malformed text; they have no common base class.
_YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_NOTHING = ("", "~")  # YAML's null; `null` itself is text if the setting is text


class Plain(str):
    """Text without quotes: a number, true, null or text, depending on the setting."""

    __slots__ = ()


class Section(dict[str, Any]):
    """A mapping of a YAML text with the line of each of its keys."""

    def __init__(self, values: Mapping[str, Any], lines: Mapping[str, int]) -> None:
        super().__init__(values)
        self.lines = dict(lines)

    def copy(self) -> "Section":
        """A shallow copy."""
        return Section(self, self.lines)


class _Loader(yaml.SafeLoader):
    """Parses every scalar as text, except that `<<` merges mappings."""

    yaml_implicit_resolvers = {"<": [(_MERGE, yaml.SafeLoader.yaml_implicit_resolvers["<"][0][1])]}  # noqa: RUF012


def read_yaml_text(path: Path) -> dict[str, Any]:
    """The `key: value` tree of a YAML file; empty for an empty file. Mappings are `Section`, unquoted scalars `Plain`.

    Raises:
        ConfigError: the file cannot be read, is not such a tree, or has a duplicate key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; expected a YAML file of settings{_inside(path)}.") from None
    except NotADirectoryError:
        raise ConfigError(f"{path} not found: a folder above it is a file; expected a YAML file of settings.") from None
    except FileNotFoundError:
        raise ConfigError(f"{path} not found: expected a YAML file of settings.") from None
    except OSError as error:
        raise refused(ConfigError, f"{path} cannot be read", error, path) from None
    except ValueError as error:  # not UTF-8, or a NUL in the path
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    tree = _parsed(text, f"{path} is not valid YAML")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {_spoken(tree)}; expected `key: value` lines.")
    return tree


def read_flow(text: str, key: str) -> Any:
    """A list or mapping in YAML's flow style, typed for `key` on the command line.

    Raises:
        ConfigError: the text is not such a value, or more text follows it.
    """
    return _parsed(text, f"The value of {key} is not a list or mapping", whole=True)


def _parsed(text: str, fault: str, whole: bool = False) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if whole and node is not None and text[node.end_mark.index :].strip():
            raise ConfigError(f"{fault}: {text[node.end_mark.index :].strip()[:200]!r} follows its end.")
        return None if node is None else _Builder(fault).value(node, "")
    except _YAML_FAULTS as error:
        raise ConfigError(f"{fault}: {str(error)[:500]}") from None


class _Builder:
    """Builds plain data from parsed nodes. Nodes with anchors are built once and shared, so that a few lines which name
    one list a billion times cost nothing."""

    def __init__(self, fault: str) -> None:
        self._fault = fault
        self._built: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, node: yaml.Node, key: str) -> Any:
        """The data of the node at the dotted `key`."""
        if id(node) in self._open:
            raise self._error(node, f"{key} contains itself")
        if id(node) not in self._built:
            self._open.add(id(node))
            self._built[id(node)] = self._build(node, key)
            self._open.remove(id(node))
        return self._built[id(node)]

    def _build(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, f"{key}.{number}") for number, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in (_TEXT, _MERGE):
            text: str = node.value
            if node.style is not None:
                return text
            return None if text in _NOTHING else Plain(text)
        raise self._error(node, f"{key or 'it'} has the tag {node.tag[:100]}; the setting itself has a type")

    def _mapping(self, node: yaml.MappingNode, prefix: str) -> Section:
        own: dict[str, Any] = {}
        merged = Section({}, {})
        lines: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.tag not in (_TEXT, _MERGE):
                raise self._error(name, "a key is not plain text")
            line, key = name.start_mark.line + 1, f"{prefix}.{name.value}".lstrip(".")
            if name.value in lines:
                where = f"lines {lines[name.value]} and {line}" if line != lines[name.value] else f"line {line}"
                raise ConfigError(f"{self._fault}: {key} is given twice, in {where}; write it once.")
            lines[name.value] = line
            if name.tag == _MERGE:
                merged = self._merged(value, key)
            else:
                own[str(name.value)] = self.value(value, key)
        return Section(merged | own, merged.lines | lines)

    def _merged(self, node: yaml.Node, key: str) -> Section:
        """The keys that `<<: *anchor` or `<<: [*a, *b]` merges in; the first mapping wins."""
        found = self.value(node, key)
        parts = found if isinstance(found, list) else [found]
        if not all(isinstance(part, Section) for part in parts):
            raise self._error(node, f"{key} merges a value that is not a mapping")
        merged = Section({}, {})
        for part in reversed(parts):
            merged.update(part)
            merged.lines.update(part.lines)
        return merged

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self._fault}: line {node.start_mark.line + 1}: {message}.")


def _spoken(tree: Any) -> str:
    return "a list" if isinstance(tree, list) else "a single value"


def _inside(folder: Path) -> str:
    own = folder / "config.yaml"
    return f", such as {own}" if own.is_file() else ""
