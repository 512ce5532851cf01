"""Rows with images as a source: of Parquet files, and of data sets that the `datasets` library saved on disk.

Rows are listed with their classes, without reading an image, and examined in batches; nothing is unpacked.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from moce_ds.common.errors import DataError
from moce_ds.common.host.program import warn
from moce_ds.common.text import in_line
from moce_ds.data.image_file import EMPTY, Accepted, Rejected, examine_bytes
from moce_ds.data.sources.source import Entry
from moce_ds.data.sources.table_columns import Columns, choose_columns
from moce_ds.data.sources.table_files import (
    description_files,
    folder_of,
    refuse_several_splits,
    saved_features,
    table_files,
)
from moce_ds.data.sources.table_rows import Cursor, Table, labels, open_table, pyarrow, reads_table


class _LastOpened:
    """The file that this process read last, with the place that it has reached; a copy in another process has none.

    A worker gets a few rows at a time. Without this it would begin at the row group's first row each time.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.cursor: Cursor | None = None

    def __reduce__(self) -> tuple[type["_LastOpened"], tuple[()]]:
        return _LastOpened, ()


@dataclass(frozen=True)
class TableSource:
    """The images in the rows of tables, in the order of the files and then of the rows.

    Attributes:
        origin: a Parquet file, a folder of them, the path of a split, or a saved data set (`table_files`).
    """

    origin: Path
    _last: _LastOpened = field(default_factory=_LastOpened, init=False, repr=False, compare=False)

    def entries(self) -> Iterator[Entry]:
        """All rows; reads their classes. Raises DataError: a file is damaged, or its columns are not the first's."""
        for name, columns, table in self._tables(notify=True):
            path = folder_of(self.origin) / name
            with reads_table(path):
                size = path.stat().st_size
                for row, value in enumerate(labels(table, columns.label)):
                    yield Entry(f"{name}/{row}", size, row, columns.class_of(value, f"{path}: row {row}"))

    def examine(self, entries: Sequence[Entry], max_pixels: int) -> Iterator[Accepted | Rejected]:
        """The verdicts about rows, fastest in their order. Raises DataError: a file is damaged."""
        for name, rows in groupby(entries, lambda entry: entry.path.rpartition("/")[0]):
            for value in self._images(folder_of(self.origin) / name, [entry.key for entry in rows]):
                yield _verdict(value, max_pixels)

    def class_order(self, found: Iterable[str]) -> list[str]:
        """The classes of a ClassLabel in its order; else all in the column: numbers by size, texts alphabetically.

        They include those of rows without an image, so that the images do not decide the labels.
        """
        chosen: Columns | None = None
        values: set[Any] = set()
        for name, chosen, table in self._tables():
            if chosen.kind == "ClassLabel":
                break
            with reads_table(folder_of(self.origin) / name):
                values.update(labels(table, chosen.label))
        return chosen.classes(values) if chosen else []

    def files(self) -> Iterator[tuple[str, Path]]:
        """The files with rows, and those that describe a saved data set. Raises DataError: they cannot be listed."""
        names = [*table_files(self.origin), *description_files(self.origin)]
        return ((name, folder_of(self.origin) / name) for name in names)

    def _tables(self, notify: bool = False) -> Iterator[tuple[str, Columns, Table]]:
        """The files with their columns. Raises DataError, also if the columns are not those of the first file."""
        first: Columns | None = None
        for name in table_files(self.origin):
            path = folder_of(self.origin) / name
            with reads_table(path):
                table = open_table(path)
                columns = self._columns(path, table)
            if first is None:
                first = columns
                for notice in columns.notices if notify else ():
                    warn(notice)
            elif columns != first:
                raise DataError(
                    f"{in_line(path)} has {_described(columns)}; the files before it have {_described(first)}: "
                    "expected files of one table. Name one of them, or a folder of those that belong together."
                )
            yield name, columns, table

    def _columns(self, path: Path, table: Table) -> Columns:
        return choose_columns(path, table.schema, saved_features(self.origin))

    def _images(self, path: Path, rows: Sequence[int]) -> Iterator[Any]:
        """The values in the column of images."""
        last = self._last
        with reads_table(path):
            if last.path != path or last.cursor is None:
                table = open_table(path)
                last.path, last.cursor = path, Cursor(table, self._columns(path, table).image)
            for row in rows:
                yield last.cursor.value(row)


def table_source(origin: Path) -> TableSource:
    """The source at `origin`. Raises DataError: it has several splits; ConfigError: pyarrow is not installed."""
    refuse_several_splits(origin)
    pyarrow()
    return TableSource(origin)


def _verdict(value: Any, max_pixels: int) -> Accepted | Rejected:
    """The verdict about a value of the column of images: bytes, a path, or a struct of both."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if data is None:
        # `datasets` opens a local file of this name. A table from elsewhere must not choose files of this machine.
        lost = f"holds no bytes, only the path {in_line(path)}" if path else "holds no image"
        return Rejected(EMPTY, f"the row {lost}")
    return examine_bytes(data, max_pixels) if data else Rejected(EMPTY, "0 bytes")


def _described(columns: Columns) -> str:
    classes = f"classes in {columns.label} ({columns.kind})" if columns.label else "no classes"
    names = f" of {len(columns.names)} names" if columns.names else ""
    return f"images in {columns.image} and {classes}{names}"
