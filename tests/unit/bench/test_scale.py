"""`moce bench scale`: the laws, and measuring in processes."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moce_ds.bench.scale import Law, ScaleCase, bench_scale, sizes_of
from moce_ds.common.host.machine import MachineError

_KEPT: list[np.ndarray] = []
MIB = 1024**2


def _write(folder: Path, count: int) -> None:
    (folder / "size").write_text(str(count))


def _kilobytes(folder: Path, count: int) -> Callable[[], object]:
    """Keeps 64 KiB for each image, after it has held as much for a moment."""
    assert (folder / "size").read_text() == str(count)
    np.ones(count * 2**16, dtype=np.uint8)
    return lambda: _KEPT.append(np.ones(count * 2**16, dtype=np.uint8))


def _killed(folder: Path, count: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), 9)


def test_a_law_is_that_of_the_largest_sizes() -> None:
    sizes = [10.0, 1e4, 1e5, 1e6]
    law = Law.fitted(sizes, [99.0, *(3e-7 * n**1.5 for n in sizes[1:])])
    assert (law.scale, law.power) == (pytest.approx(3e-7), pytest.approx(1.5))
    assert law.at(1e9) == pytest.approx(3e-7 * 1e9**1.5)


@pytest.mark.parametrize(
    ("times", "largest", "sizes"),
    [(1, 10**6, [10**4, 10**5, 10**6]), (100, 10**6, [10**n for n in range(4, 9)]), (1, 3000, [30, 300, 3000])],
)
def test_sizes_are_tenths_of_the_largest(times: float, largest: int, sizes: list[int]) -> None:
    assert sizes_of(ScaleCase("", _killed, times=times), largest) == sizes


def test_each_size_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    rows, (law,) = bench_scale({"keep": ScaleCase("", _kilobytes, "sizes", _write)}, 1000, 1, tmp_path)
    assert [row["n"] for row in rows] == [10, 100, 1000]
    for row in rows[1:]:  # what the process held before does not count, and nothing of other sizes
        assert row["peak_mib"] == pytest.approx(row["n"] / 16, abs=2)
        assert row["mapped_mib"] < 2 and row["seconds"] > 0
    assert law["case"] == "keep" and law["1B, MiB"] > 1e6
    assert not any(tmp_path.iterdir()) and not _KEPT


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"measures deadly with 10 images died.*lower --largest"):
        bench_scale({"deadly": ScaleCase("", _killed)}, 1000, 1, tmp_path)
