"""Rows of Parquet files, and of Arrow files in the stream format, through pyarrow; a few rows are in memory.

A file of any size is read in batches, from its beginning or from the beginning of a row group.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.storage.files import reads_from
from moce_ds.data.sources.table_files import PARQUET

_ROWS = 32
"""Rows of a batch with images; of other columns `_LABELS`."""
_LABELS = 2**16
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The end of every stream of Arrow."""
_BUFFER_BYTES = 2**20  # without a buffer, pyarrow reads a column of a whole row group at once


class Table(Protocol):
    """An open file of rows."""

    @property
    def schema(self) -> Any:
        """pyarrow's schema."""
        ...

    def entrance(self, row: int) -> int:
        """The last row up to `row` from which the rows can be read without those before it."""
        ...

    def batches(self, column: str | None, first: int, rows: int) -> Iterator[Any]:
        """The rows from `first`, an entrance, in batches of at most `rows` if the file allows it.

        Args:
            column: the only column of the batches; None: none is needed.

        Raises as `reads_table` expects it.
        """
        ...


@contextmanager
def reads_table(path: Path) -> Iterator[None]:
    """Convert errors of pyarrow in the block to a DataError that names the file."""
    with reads_from(path, "copy it again from its source, or write it again.", DataError):
        try:
            yield
        except NotImplementedError as error:  # such as a codec that pyarrow was built without
            raise DataError(f"{path} cannot be read: {error}. Write it again without this feature.") from None
        except MemoryError as error:
            raise DataError(
                f"{path} cannot be read ({error}): use fewer `workers=`, or smaller row groups; or it is damaged: copy "
                "it again from its source."
            ) from None


def open_table(path: Path) -> Table:
    """A file of rows. Raises as `reads_table` expects it."""
    return _Parquet(path) if path.name.endswith(PARQUET) else _ArrowStream(path)


def labels(table: Table, column: str | None) -> Iterator[Any]:
    """The value of each row, as Python has it; None without a `column`. Raises as `reads_table` expects it."""
    for batch in table.batches(column, 0, _LABELS):
        yield from batch.column(column).to_pylist() if column else [None] * batch.num_rows


class Cursor:
    """Reads values of a column, best in the order of the rows: each batch is then decoded once."""

    def __init__(self, table: Table, column: str) -> None:
        self._table, self._column = table, column
        self._batches: Iterator[Any] = iter(())
        self._values: Any = ()
        self._first = self._end = -1  # before every entrance

    def value(self, row: int) -> Any:
        """The value in a row, as Python has it. Raises as `reads_table` expects it."""
        entrance = self._table.entrance(row)
        if row < self._first or entrance > self._end:
            self._batches = self._table.batches(self._column, entrance, _ROWS)
            self._values, self._first, self._end = (), entrance, entrance
        while row >= self._end:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"it ends before row {row}")
            self._values = batch.column(self._column)
            self._first, self._end = self._end, self._end + batch.num_rows
        return self._values[row - self._first].as_py()


def pyarrow() -> ModuleType:
    """The library. Raises ConfigError if it is not installed."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Reading Parquet files, and what datasets' save_to_disk wrote, needs pyarrow, which does not import here "
            f"({error}). Install the extra: pip install 'moce-ds[hf]'."
        ) from None
    return pyarrow


class _Parquet:
    """A Parquet file; it can be entered at each of its row groups."""

    def __init__(self, path: Path) -> None:
        self._file = pyarrow().parquet.ParquetFile(
            open(path, "rb"),  # noqa: SIM115  # closed with the last reference: a path of any name is opened
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self._groups = range(metadata.num_row_groups)
        self._starts = list(accumulate((metadata.row_group(k).num_rows for k in self._groups), initial=0))[:-1]

    def entrance(self, row: int) -> int:
        return int(self._starts[self._group(row)])

    def batches(self, column: str | None, first: int, rows: int) -> Iterator[Any]:
        groups = self._groups[self._group(first) :]
        columns = [column] if column else []
        yield from self._file.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False)

    def _group(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1


class _ArrowStream:
    """An Arrow file in the stream format, memory-mapped: batches that are skipped are not read from the disk."""

    def __init__(self, path: Path) -> None:
        self._arrow = pyarrow()
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if content[-8:] != _END:  # pyarrow also takes a stream for complete that is cut off between two batches
            raise ValueError("it ends without the mark of its end")
        self._content = self._arrow.py_buffer(content)
        self.schema = self._arrow.ipc.open_stream(self._content).schema

    def entrance(self, row: int) -> int:
        return 0

    def batches(self, column: str | None, first: int, rows: int) -> Iterator[Any]:
        # No fields would mean all of them, with the images.
        short = (i for i, field in enumerate(self.schema) if self._arrow.types.is_primitive(field.type))
        fields = [self.schema.get_field_index(column)] if column else list(islice(short, 1))
        options = self._arrow.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        for batch in self._arrow.ipc.open_stream(self._content, options=options):
            batch.validate(full=True)  # of damaged offsets, pyarrow would read outside the file
            yield batch
