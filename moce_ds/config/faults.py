"""What is wrong with settings, in words: pydantic's faults under the file or the words that they are from."""

import dataclasses
import difflib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ArgsKwargs

from moce_ds.config.composition import Layer
from moce_ds.config.values import Misread

Fields = dict[str, dataclasses.Field[Any]]
"""The settings that there are, by dotted key."""

# A few kilobytes of YAML can name one list a billion times over: never print a value whole.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlevel = _short.maxlist = _short.maxtuple = _short.maxdict = 3


def fault_message(known: Fields, error: ValidationError, layers: Sequence[Layer]) -> str:
    """All faults, under what they are from; those of no layer alone (what is missing) under all."""
    everywhere = together(layers)
    found: dict[str, list[str]] = {}
    for fault in error.errors():
        key = _key(fault)
        origin = everywhere if fault["type"] == "missing" else _origin(key, layers) or everywhere
        line = f"  {_describe(known, key, fault)}"
        if line not in (lines := found.setdefault(origin, [])):
            lines.append(line)
    return "\n".join(f"Settings refused ({origin}):\n" + "\n".join(lines) for origin, lines in found.items())


def together(layers: Sequence[Layer]) -> str:
    """The names of layers. A base is part of the file that it leads to."""
    named = [layer.origin for layer in layers if not set(layer.base_of) & {other.origin for other in layers}]
    return " and ".join(named)


def _key(fault: Any) -> str:
    """The dotted key of a fault; pydantic marks those of a mapping's own keys."""
    return ".".join(str(part) for part in fault["loc"] if part != "[key]")


def _origin(key: str, layers: Sequence[Layer]) -> str | None:
    """The last layer that names most of the key."""
    depths = [
        (_depth(layer.tree, key.split(".")), ", base of ".join((layer.origin, *layer.base_of))) for layer in layers
    ]
    deepest = max(depth for depth, _ in depths)
    return next(origin for depth, origin in reversed(depths) if depth == deepest) if deepest else None


def _depth(tree: Any, parts: Sequence[str]) -> int:
    if not parts or not isinstance(tree, dict):
        return 0
    # Keys of mappings may be dotted themselves.
    lengths = [n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in tree]
    return max((n + _depth(tree[".".join(parts[:n])], parts[n:]) for n in lengths), default=0)


def _describe(known: Fields, key: str, fault: Any) -> str:
    given = fault["input"]
    if isinstance(given, Misread):
        return f"{key}: got {_short.repr(given.given)}; {given.expected}."
    if fault["type"] == "unexpected_keyword_argument":
        return f"{key}: no such setting.{_suggestion(known, key)}"
    if fault["type"] == "missing":
        return f"{', '.join(_required(known, key))}: required, and not given."
    if fault["type"] == "dataclass_type" and key:
        return f"{key}: got {_short.repr(given)}; it is a group of settings, such as {key}.NAME=VALUE."
    message = fault["msg"].removeprefix("Value error, ")
    # A fault of a whole group names its keys itself; its input would be the whole group.
    whole = not key or isinstance(given, ArgsKwargs) or (isinstance(given, dict) and key not in known)
    return f"{key + ': ' if key else ''}{'' if whole else f'got {_short.repr(given)}; '}{message}"


def _required(known: Fields, key: str) -> list[str]:
    """The settings without a default in the group `key`, or `key` itself where it is a single setting."""
    none = dataclasses.MISSING
    inside = [(name, field) for name, field in known.items() if name.startswith(f"{key}.")]
    return [name for name, field in inside if field.default is none and field.default_factory is none] or [key]


def _suggestion(known: Fields, key: str) -> str:
    if key in known:
        group, _, name = key.rpartition(".")
        return f" In a file, write {name} under {group}."
    near = next(_near(known, key), None)
    return f" Did you mean {near}?" if near else f" Known settings: {', '.join(known)}."


def _near(known: Fields, key: str) -> Iterator[str]:
    """What may have been meant, likeliest first: a name misspelt, a name by its end (lr), words of a help text."""
    group, _, last = key.rpartition(".")
    inside = [name for name in known if name.rpartition(".")[0] == group] if group else []
    for names in (inside, list(known)):
        by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
        yield from difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        yield from [name for name in names if f"_{name.rpartition('.')[2]}".endswith(f"_{last}")]
        yield from [by_last[one] for one in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    yield from difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    phrase = last.replace("_", " ")
    yield from [name for name, field in known.items() if len(last) > 3 and phrase in field.metadata.get("help", "")]
