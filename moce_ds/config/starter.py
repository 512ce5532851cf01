"""A YAML file to start from: every setting with its help and its default, commented out unless it is required."""

import dataclasses
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moce_ds.config.composition import BASE
from moce_ds.config.origins import flow
from moce_ds.config.settings import plain_default

_WIDTH, _COLUMN = 100, 40  # columns of a line, and where its help begins


def starter(
    cls: Any,
    title: Sequence[str],
    given: Mapping[str, Any],
    without: Collection[str] = (),
    required: Collection[str] = (),
) -> str:
    """The text of a file of settings of type `cls`, which is read without an error once the required ones are given.

    Args:
        title: lines of the comment that begins it.
        given: values by dotted key, which stand in the file.
        without: groups and settings that are left out.
        required: settings that are required although they have a default.
    """
    head = [*title, "Remove the # before a setting to change it; the values shown are the defaults."]
    base = _with_help(f"#{BASE}: OTHER.yaml", "a YAML file, relative to this one, whose settings this file builds on")
    body = _Starter(given, frozenset(without), frozenset(required)).group(cls, "", "")
    return "\n".join([*(f"# {line}" for line in head), *base, "", *body]) + "\n"


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
            return _with_help(f"{indent}{field.name}: {flow(self.given[key])}", help)
        if key in self.required or default is dataclasses.MISSING:
            return _with_help(f"{indent}{field.name}:", f"REQUIRED: {help}")
        return _with_help(f"{indent}#{field.name}: {flow(default)}", help)


def _with_help(line: str, help: str) -> list[str]:
    margin = " " * _COLUMN + " # "
    return textwrap.wrap(
        help,
        _WIDTH,
        initial_indent=f"{line:<{_COLUMN}} # ",
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [line]
