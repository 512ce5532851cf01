"""Layers of settings, and the YAML files that a YAML file is based on: `base: other.yaml` (docs/settings.md)."""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from moce_ds.config.values import NULLS, expanded
from moce_ds.config.yaml_text import Plain, Section, read_yaml_text
from moce_ds.errors import ConfigError

BASE = "base"
"""The key of a YAML file that names its bases. It is no setting."""


class Layer(NamedTuple):
    """Settings from one place.

    Attributes:
        origin: the place, as messages name it.
        tree: nested settings by key.
        base_of: for a base, the files that lead to it, the nearest first.
    """

    origin: str
    tree: dict[str, Any]
    base_of: tuple[str, ...] = ()


def file_layers(path: Path, cls: Any, name: str = "") -> list[Layer]:
    """The layers of a YAML file: its bases, where later ones override earlier ones, and then the file itself.

    Args:
        cls: the settings class that the file is for.
        name: how messages name the file (default: its path).

    Raises:
        ConfigError: a file cannot be read, `base` is not a path, or a file is its own base; the message names all files
            that lead to the fault.
    """
    composition = _Composition(cls)
    composition.add(path, name or str(path), ())
    return composition.layers


class _Composition:
    """Collects the layers of a file and its bases, the lowest first.

    A file that several files are based on counts once, below all of them: what one of them changes is kept.
    """

    def __init__(self, cls: Any) -> None:
        self.layers: list[Layer] = []
        self._cls = cls
        self._open: set[Path] = set()
        self._done: set[Path] = set()

    def add(self, path: Path, name: str, way: tuple[tuple[str, int], ...]) -> None:
        """Append a file and its bases; `way` holds names and lines that lead to it, the first file first."""
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
    """Whether `base` is a setting of an earlier version, as in studies: it names a file of another kind.

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
    """The files that lead to `name`, for the end of a message; nothing for a file that no other file names."""
    return "\n  Bases: " + " -> ".join([*(f"{above}:{line}" for above, line in way), name]) if way else ""
