"""Settings as YAML text with comments: the origin of each value (`moce config show`, `--dry-run`), or the help of every
setting in a template (`moce config new`)."""

import dataclasses
import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from moce_ds.common.config.composition import BASE, Layer
from moce_ds.common.config.settings import plain_default
from moce_ds.common.config.values import opened
from moce_ds.common.config.yaml_text import Section
from moce_ds.common.text import in_line

DEFAULT = "default"
_WIDTH = 100  # columns of a line
_ORIGIN_COLUMN, _HELP_COLUMN = 44, 40  # where comments on origins begin, and help texts


def explained(cls: Any, tree: Mapping[str, Any], layers: Sequence[Layer]) -> list[str]:
    """The lines of a YAML file of settings of type `cls`; a comment after each value names its file and line, the
    command line, or `default`.

    Args:
        tree: plain data by group and name, from `to_tree` or `partial_tree`.
        layers: the layers that the tree was merged from.
    """
    return list(_group(cls, tree, layers, "", ""))


def origin_of(key: str, layers: Sequence[Layer]) -> str:
    """The origin of the value of a dotted key: the last layer that gives it, with the line in a file; or `default`."""
    for layer in reversed(layers):
        line = _line(layer.tree, key.split("."))
        if line is not None:
            return f"{layer.origin}:{line}" if line and isinstance(layer.tree, Section) else layer.origin
    return DEFAULT


def starter(
    cls: Any,
    title: Sequence[str],
    given: Mapping[str, Any],
    without: Collection[str] = (),
    required: Collection[str] = (),
) -> str:
    """A template for settings of type `cls`. It can be read once the required settings are filled in.

    Args:
        title: lines of the comment at the top.
        given: values by dotted key to write into the file.
        without: groups and settings to omit.
        required: settings that are required although they have a default.
    """
    head = [*title, "Remove the # before a setting to change it; the values shown are the defaults."]
    base = _with_help(f"#{BASE}: OTHER.yaml", "a YAML file, relative to this one, whose settings this file builds on")
    body = _Starter(given, frozenset(without), frozenset(required)).group(cls, "", "")
    return "\n".join([*(f"# {line}" for line in head), *base, "", *body]) + "\n"


def annotated(values: Iterable[tuple[str, Any, str]]) -> Iterator[str]:
    """The lines of a YAML file of some settings: dotted keys with plain data, and the comment after each value."""
    above: list[str] = []
    for key, value, comment in values:
        *groups, name = key.split(".")
        for depth, group in enumerate(groups):
            if above[: depth + 1] != groups[: depth + 1]:
                yield f"{'  ' * depth}{group}:"
        line = f"{'  ' * len(groups)}{name}: {_flow(value)}"
        yield from _commented(line, comment) if comment else [line]
        above = groups


def _line(section: Mapping[str, Any], parts: Sequence[str]) -> int | None:
    """The line that gives a key its value; 0 if lines are unknown, None if the section does not contain the key."""
    for count in range(len(parts), 0, -1):  # a key of a mapping may contain dots
        name, rest = ".".join(parts[:count]), parts[count:]
        if name not in section:
            continue
        line = section.lines.get(name, 0) if isinstance(section, Section) else 0
        value = opened(section[name], name)
        if not rest or (value is not None and not isinstance(value, dict)):
            return line
        if isinstance(value, dict) and (found := _line(value, rest)) is not None:
            return found
    return None


def _group(cls: Any, tree: Mapping[str, Any], layers: Sequence[Layer], prefix: str, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield f"{indent}{field.name}:"
            yield from _group(field.type, tree.get(field.name, {}), layers, f"{key}.", f"{indent}  ")
        elif field.name in tree:
            yield from _value(field.name, tree[field.name], key, layers, indent)
        else:
            yield from _commented(f"{indent}# {field.name}:", "required, not given")


def _value(name: str, value: Any, key: str, layers: Sequence[Layer], indent: str) -> Iterator[str]:
    """The line of a value, or the lines of a mapping or of a long list."""
    start, origin = f"{indent}{_flow(name)}:", in_line(origin_of(key, layers))
    if isinstance(value, dict) and value:
        yield start
        for part, inner in value.items():
            yield from _value(part, inner, f"{key}.{part}", layers, f"{indent}  ")
    elif isinstance(value, list) and len(start) + len(_flow(value)) > _WIDTH:
        yield from _commented(start, origin)
        yield from (f"{indent}  - {_flow(item)}" for item in value)
    else:
        yield from _commented(f"{start} {_flow(value)}", origin)


def _commented(line: str, comment: str) -> list[str]:
    """A line with a comment after it, or above it if both are too long for one line."""
    whole = f"{line:<{_ORIGIN_COLUMN}} # {comment}"
    indent = line[: len(line) - len(line.lstrip())]
    return [whole] if len(whole) <= _WIDTH else [f"{indent}# {comment}", line]


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


@dataclasses.dataclass(frozen=True)
class _Starter:
    given: Mapping[str, Any]
    without: frozenset[str]
    required: frozenset[str]

    def group(self, cls: Any, prefix: str, indent: str) -> Iterator[str]:
        """The lines of a group of settings."""
        for field in dataclasses.fields(cls):
            key = f"{prefix}{field.name}"
            if key in self.without:
                continue
            if dataclasses.is_dataclass(field.type):
                yield f"{indent}{field.name}:"
                yield from self.group(field.type, f"{key}.", f"{indent}  ")
            else:
                yield from self._setting(field, key, indent)

    def _setting(self, field: dataclasses.Field[Any], key: str, indent: str) -> list[str]:
        help, default = field.metadata.get("help", ""), plain_default(field)
        if key in self.given:
            return _with_help(f"{indent}{field.name}: {_flow(self.given[key])}", help)
        if key in self.required or default is dataclasses.MISSING:
            return _with_help(f"{indent}{field.name}:", f"REQUIRED: {help}")
        return _with_help(f"{indent}#{field.name}: {_flow(default)}", help)


def _with_help(line: str, help: str) -> list[str]:
    margin = " " * _HELP_COLUMN + " # "
    return textwrap.wrap(
        help,
        _WIDTH,
        initial_indent=f"{line:<{_HELP_COLUMN}} # ",
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [line]
