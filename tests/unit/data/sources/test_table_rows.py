"""Rows of tables in any order: each batch is decoded once where rows are read in order, in constant memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moce_ds.common.errors import DataError
from moce_ds.data.sources.table_rows import Cursor, Table, labels, open_table, reads_table
from tests.examples.tables import write_parquet

COUNT = 500


class Counted:
    """A table that counts the rows that it decodes."""

    def __init__(self, table: Table) -> None:
        self._table, self.schema, self.decoded = table, table.schema, 0

    def entrance(self, row: int) -> int:
        return self._table.entrance(row)

    def batches(self, column: str | None, first: int, rows: int) -> Iterator[Any]:
        for batch in self._table.batches(column, first, rows):
            self.decoded += batch.num_rows
            yield batch


def write_stream(path: Path, batch_rows: int, count: int = COUNT) -> None:
    table = pa.table({"a": pa.array([b"%d" % n for n in range(count)]), "b": pa.array(range(count))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=batch_rows)


@pytest.fixture(scope="module", params=["one group", "groups", "stream"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 rows of bytes in a, their numbers in b: in one row group, in groups of 90 rows, or in batches of 70."""
    path: Path = tmp_path_factory.mktemp("tables") / ("a.arrow" if request.param == "stream" else "a.parquet")
    if request.param == "stream":
        write_stream(path, 70)
    else:
        size = 90 if request.param == "groups" else COUNT
        write_parquet(path, {"a": [b"%d" % n for n in range(COUNT)], "b": [*range(COUNT)]}, row_group_size=size)
    return path


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, COUNT - 1), max_size=30))
def test_rows_in_any_order(path: Path, rows: list[int]) -> None:
    cursor = Cursor(open_table(path), "a")
    assert [cursor.value(row) for row in rows] == [b"%d" % row for row in rows]


def test_rows_in_order_are_decoded_once(path: Path) -> None:
    table = Counted(open_table(path))
    cursor = Cursor(table, "a")
    for row in range(COUNT):
        assert cursor.value(row) == b"%d" % row
    assert table.decoded == COUNT


def test_a_worker_that_takes_turns_decodes_no_row_twice(path: Path) -> None:
    """Sixteen rows of every 64, as one of four workers."""
    table = Counted(open_table(path))
    cursor = Cursor(table, "a")
    for first in range(0, COUNT, 64):
        for row in range(first, min(first + 16, COUNT)):
            assert cursor.value(row) == b"%d" % row
    assert table.decoded <= COUNT


def test_row_groups_before_a_row_are_not_decoded(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"a": [b"%d" % n for n in range(COUNT)]}, row_group_size=10)
    table = Counted(open_table(tmp_path / "a.parquet"))
    cursor = Cursor(table, "a")
    assert [cursor.value(row) for row in (3, 404, 95)] == [b"3", b"404", b"95"]
    assert table.decoded <= 3 * 32


def test_labels(path: Path) -> None:
    assert list(labels(open_table(path), "b")) == [*range(COUNT)]
    assert list(labels(open_table(path), None)) == [None] * COUNT


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    if name == "a.arrow":
        write_stream(tmp_path / name, 1, count=0)
    else:
        write_parquet(tmp_path / name, {"a": pa.array([], pa.binary()), "b": pa.array([], pa.int64())})
    assert list(labels(open_table(tmp_path / name), "b")) == list(labels(open_table(tmp_path / name), None)) == []


def test_a_row_behind_the_end_is_an_error(path: Path) -> None:
    with pytest.raises(DataError, match=rf"{path} is damaged \(it ends before row 500\)"), reads_table(path):
        Cursor(open_table(path), "a").value(COUNT)


def test_a_stream_without_its_end_is_damaged(tmp_path: Path) -> None:
    """It was cut off between two batches: pyarrow takes it for complete."""
    write_stream(tmp_path / "a.arrow", 100)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[:-8])
    assert sum(batch.num_rows for batch in pa.ipc.open_stream(whole[:-8])) == COUNT
    told = pytest.raises(DataError, match=r"is damaged \(it ends without the mark of its end\): copy it again")
    with told, reads_table(tmp_path / "a.arrow"):
        open_table(tmp_path / "a.arrow")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        if name == "a.arrow":
            write_stream(tmp_path / name, 100)
        else:
            write_parquet(tmp_path / name, {"a": [b"0"]})
        odd = (tmp_path / name).rename(tmp_path / f"\udcff{name}")
        assert Cursor(open_table(odd), "a").value(0) == b"0"
