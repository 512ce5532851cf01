"""Which columns of a table are the images and their classes.

The `datasets` library records the types of columns, such as Image and ClassLabel, as JSON; other tables have columns of
bytes, integers and text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moce_ds.common.errors import DataError
from moce_ds.common.text import in_line
from moce_ds.data.sources.table_rows import pyarrow

_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
"""Preferred column names if several columns have the same type."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a set is made of.

    Attributes:
        image: the column of images.
        label: the column of classes; None: there is none.
        kind: of its values: ClassLabel, integers, text or bool; "" without it.
        names: the classes of a ClassLabel, in the order of its numbers.
        notices: what the user should know about the choice.
    """

    image: str
    label: str | None
    kind: str
    names: tuple[str, ...] = ()
    notices: tuple[str, ...] = field(default=(), compare=False)

    def class_of(self, value: Any, row: str) -> str:
        """The class of a value; "": none, as for a missing value, an empty text and a negative number.

        Raises:
            DataError: a ClassLabel has no name for the value; the message begins with `row`.
        """
        if value is None or value == "" or (self.kind != "text" and value < 0):
            return ""
        if self.kind != "ClassLabel":
            return str(value)
        if value >= len(self.names):
            raise DataError(f"{in_line(row)} has the class {value} of {len(self.names)}: write the table again.")
        return self.names[value]

    def classes(self, values: Iterable[Any]) -> list[str]:
        """The classes in the order of their labels: those of a ClassLabel, else those of `values`, sorted as such."""
        if self.kind == "ClassLabel":
            return list(self.names)
        return [name for value in sorted(set(values) - {None}) if (name := self.class_of(value, ""))]


def choose_columns(path: Path, schema: Any, features: Mapping[str, Any] | None = None) -> Columns:
    """The columns of images and classes.

    Args:
        path: the file, for messages.
        schema: pyarrow's schema.
        features: the types that `datasets` recorded; None: those in the schema's metadata, if there are any.

    Raises:
        DataError: there is no column of images, or the names of a ClassLabel are no set of names.
    """
    types = _recorded(schema) if features is None else features
    notices: list[str] = []
    image = _image_column(path, schema, types, notices)
    label, kind = _label_column(path, schema, types, notices)
    names = _class_names(path, types[label]) if label and kind == "ClassLabel" else ()
    return Columns(image, label, kind, names, tuple(notices))


def _recorded(schema: Any) -> Mapping[str, Any]:
    """The types of columns in a schema's metadata. Raises ValueError."""
    found: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _recorded_as(schema: Any, types: Mapping[str, Any], kind: str) -> Iterator[str]:
    """The columns that `datasets` recorded as being of a type."""
    for name in schema.names:
        if isinstance(recorded := types.get(name), dict) and recorded.get("_type") == kind:
            yield name


def _image_column(path: Path, schema: Any, types: Mapping[str, Any], notices: list[str]) -> str:
    recorded = _recorded_as(schema, types, "Image")
    if columns := [name for name in recorded if _holds_images(schema.field(name).type, paths=True)]:
        return _preferred(path, columns, "Image", notices)
    if columns := [field.name for field in schema if _holds_images(field.type)]:
        return _preferred(path, columns, "bytes", notices)
    raise DataError(f"{path} has no column of images; its columns: {in_line(', '.join(schema.names))}.")


def _holds_images(kind: Any, paths: bool = False) -> bool:
    """Whether values are bytes, or structs with bytes; with `paths`, they may be the paths of images instead."""
    types = pyarrow().types
    if paths and (types.is_string(kind) or types.is_large_string(kind)):
        return True
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _label_column(path: Path, schema: Any, types: Mapping[str, Any], notices: list[str]) -> tuple[str | None, str]:
    """The column of classes and the kind of its values; None, with a notice, if no column can be one."""
    recorded = _recorded_as(schema, types, "ClassLabel")
    if columns := [name for name in recorded if _value_kind(schema.field(name).type) == "integers"]:
        return _preferred(path, columns, "ClassLabel", notices), "ClassLabel"
    candidates = [name for name in _LABELS if name in schema.names]
    for name in candidates:
        if kind := _value_kind(schema.field(name).type):
            return name, kind
    found = "; ".join(f"{name} is {schema.field(name).type}" for name in candidates) or "there is no column label"
    notices.append(
        f"{path}: its images have no classes: no column has type ClassLabel, and no column label holds integers or "
        f"text ({found})."
    )
    return None, ""


def _value_kind(kind: Any) -> str:
    """What the values of a column can be as classes; "": nothing."""
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_integer(kind):
        return "integers"
    if types.is_boolean(kind):
        return "bool"
    return "text" if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) else ""


def _class_names(path: Path, feature: Mapping[str, Any]) -> tuple[str, ...]:
    names = feature.get("names")
    if names is None and isinstance(count := feature.get("num_classes"), int):
        names = [str(number) for number in range(count)]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: the names of its classes are not a list of texts: write the table again.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two of its classes are called {in_line(twice)}: write the table again.")
    return tuple(names)


def _preferred(path: Path, columns: Sequence[str], kind: str, notices: list[str]) -> str:
    """The preferred column among several of one type, or the first of them, with a notice."""
    column = next((name for name in (*_IMAGES, *_LABELS) if name in columns), columns[0])
    if len(columns) > 1:
        notices.append(f"{path}: columns {', '.join(columns)} all have type {kind}; using {column}.")
    return column
