"""Layers of settings: YAML files with their bases (`base: other.yaml`, docs/settings.md), and messages that list faults
by layer."""

import dataclasses
import difflib
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ArgsKwargs

from moce_ds.common.config.values import NULLS, Misread, expanded
from moce_ds.common.config.yaml_text import Plain, Section, read_yaml_text
from moce_ds.common.errors import ConfigError
from moce_ds.common.validation import expectation

BASE = "base"
"""The key of a YAML file that names its bases. It is not a setting."""

Fields = dict[str, dataclasses.Field[Any]]
"""All known settings, by dotted key."""

# A few kilobytes of YAML can name one list a billion times over: never print a value whole.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlevel = _short.maxlist = _short.maxtuple = _short.maxdict = 3


class Layer(NamedTuple):
    """Settings from one source.

    Attributes:
        origin: the name of the source in messages.
        tree: nested settings by key.
        base_of: for a base, the files that lead to it, nearest first.
    """

    origin: str
    tree: dict[str, Any]
    base_of: tuple[str, ...] = ()


def file_layers(path: Path, cls: Any, name: str = "") -> list[Layer]:
    """The layers of a YAML file: its bases, then the file itself. Later layers override earlier ones.

    Args:
        cls: the settings class that the file is for.
        name: the name of the file in messages (default: its path).

    Raises:
        ConfigError: a file cannot be read, `base` is not a path, or a file is its own base; the message names all files
            that lead to the fault.
    """
    composition = _Composition(cls)
    composition.add(path, name or str(path), ())
    return composition.layers


class _Composition:
    """Collects the layers of a file and its bases, lowest first.

    A base shared by several files is added once, below all of them, so it does not undo their changes.
    """

    def __init__(self, cls: Any) -> None:
        self.layers: list[Layer] = []
        self._cls = cls
        self._open: set[Path] = set()
        self._done: set[Path] = set()

    def add(self, path: Path, name: str, way: tuple[tuple[str, int], ...]) -> None:
        """Append a file and its bases; `way` holds the names and lines that lead to it, from the first file on."""
        file = path.resolve()
        if file in self._open:
            raise ConfigError(f"{name} is its own base: remove one of these `base` lines.{_chain(way, name)}")
        if file in self._done:
            return
        self._open.add(file)
        try:
            tree = read_yaml_text(path)
            line = tree.lines.get(BASE, 0) if isinstance(tree, Section) else 0
            earlier = _is_earlier_setting(tree, path.parent, self._cls)
            bases = [] if earlier else _bases(tree.pop(BASE, None), path, f"{name}:{line}")
        except ConfigError as error:
            raise ConfigError(f"{error}{_chain(way, name)}") from None
        for base in bases:
            self.add(base, str(base), (*way, (name, line)))
        self._open.remove(file)
        self._done.add(file)
        self.layers.append(Layer(name, tree, tuple(above for above, _ in reversed(way))))


def _bases(value: Any, path: Path, place: str) -> list[Path]:
    """The paths that a file names as its bases, relative to its folder. Raises ConfigError."""
    if value is None or (isinstance(value, Plain) and value in NULLS):
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        given = reprlib.repr(value)
        raise ConfigError(f"{place}: base: got {given}; expected the path of a YAML file, or a list of such paths.")
    try:
        return [path.parent / expanded(name, path.parent) for name in names]
    except ValueError as error:
        raise ConfigError(f"{place}: base: got {value!r}; {error}.") from None


def _is_earlier_setting(tree: dict[str, Any], folder: Path, cls: Any) -> bool:
    """Whether `base` is an earlier version's setting, as in studies, which names a file of another kind.

    Such a path is relative to the working directory, as all paths in settings are.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    earlier = next((field.name for field in dataclasses.fields(cls) if field.metadata.get("formerly") == BASE), None)
    if earlier is None or earlier in tree or not isinstance(name := tree.get(BASE), str):
        return False
    try:
        path = expanded(name)
    except ValueError:
        return False
    if path.is_file():
        return known.isdisjoint(read_yaml_text(path))
    return not (folder / path).exists()


def _chain(way: tuple[tuple[str, int], ...], name: str) -> str:
    """The files that lead to `name`, for the end of a message; empty if no other file names it."""
    return "\n  Bases: " + " -> ".join([*(f"{above}:{line}" for above, line in way), name]) if way else ""


def fault_message(known: Fields, error: ValidationError, layers: Sequence[Layer]) -> str:
    """A message that lists all faults, grouped by layer; missing settings under all layers."""
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
    """The names of all layers that are not bases of another one, joined."""
    named = [layer.origin for layer in layers if not set(layer.base_of) & {other.origin for other in layers}]
    return " and ".join(named)


def _key(fault: Any) -> str:
    """The dotted key of a fault; pydantic marks faults of a mapping's keys."""
    return ".".join(str(part) for part in fault["loc"] if part != "[key]")


def _origin(key: str, layers: Sequence[Layer]) -> str | None:
    """The origin of the last layer that contains the longest part of the key."""
    depths = [
        (_depth(layer.tree, key.split(".")), ", base of ".join((layer.origin, *layer.base_of))) for layer in layers
    ]
    deepest = max(depth for depth, _ in depths)
    return next(origin for depth, origin in reversed(depths) if depth == deepest) if deepest else None


def _depth(tree: Any, parts: Sequence[str]) -> int:
    if not parts or not isinstance(tree, dict):
        return 0
    # A key of a mapping may contain dots.
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
    # The message of a fault of a group names its keys; the input would be the whole group.
    whole = not key or isinstance(given, ArgsKwargs) or (isinstance(given, dict) and key not in known)
    return f"{key + ': ' if key else ''}{'' if whole else f'got {_short.repr(given)}; '}{expectation(fault)}."


def _required(known: Fields, key: str) -> list[str]:
    """The settings without a default in the group `key`, or `key` itself if it is a single setting."""
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
    """Suggestions, likeliest first: a similar name, a name with the same end (lr), words in a help text, a group."""
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
    groups = {name.partition(".")[0] for name in known if "." in name}
    yield from difflib.get_close_matches(key, groups, n=1, cutoff=0.7)
