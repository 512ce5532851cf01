"""A YAML file to start from: every setting with its help and its default, commented out unless it is required."""

import dataclasses
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moce_ds.config.composition import BASE
from moce_ds.config.origins import flow
from moce_ds.config.settings import default_of

_WIDTH, _COLUMN = 100, 40  # columns of a line, and where its help begins


def starter(cls: Any, title: Sequence[str], given: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """The text of a file of settings of type `cls`, which is read without an error once the required ones are given.

    Args:
        title: lines of the comment that begins it.
        given: values by dotted key, which stand in the file.
        without: groups that are left out.
    """
    lines = [*title, "A # before a setting leaves it at its default.", f"`{BASE}: OTHER.yaml` builds on another file."]
    body = _group(cls, given, frozenset(without), "", "")
    return "\n".join([*(f"# {line}" for line in lines), f"#{BASE}: OTHER.yaml", "", *body]) + "\n"


def _group(cls: Any, given: Mapping[str, Any], without: frozenset[str], prefix: str, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        key, help = f"{prefix}{field.name}", field.metadata.get("help", "")
        if key in without:
            continue
        default = default_of(field)
        if dataclasses.is_dataclass(field.type):
            yield f"{indent}{field.name}:"
            yield from _group(field.type, given, without, f"{key}.", f"{indent}  ")
        elif key in given:
            yield from _with_help(f"{indent}{field.name}: {flow(given[key])}", help)
        elif default is dataclasses.MISSING:
            yield from _with_help(f"{indent}{field.name}:", f"REQUIRED: {help}")
        else:
            yield from _with_help(f"{indent}#{field.name}: {flow(default)}", help)


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
