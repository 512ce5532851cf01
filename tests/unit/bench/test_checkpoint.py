"""The raw write that `moce bench checkpoint` compares a save with."""

from pathlib import Path

import pytest

from moce_ds.bench.checkpoint import _write


@pytest.mark.parametrize("size", [0, 3, 8, 21])
def test_a_raw_write_has_the_size_of_the_checkpoint(tmp_path: Path, size: int) -> None:
    _write(tmp_path / "raw", b"12345678", size)
    assert (tmp_path / "raw").stat().st_size == size
