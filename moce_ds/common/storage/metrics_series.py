"""The series of `metrics.jsonl`, reduced while the file is read: as many values as a plot has pixels, at any length.

Axes: R records in memory, P buckets of neighbouring records. Values are numbers, or vectors whose axis follows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.metrics_file import each_record

BUCKETS = 1024
"""A series has up to twice as many buckets."""

_HELD = 1024  # records before they are reduced
Floats = NDArray[np.float64]
Keys = tuple[str, ...]


class Reduced(NamedTuple):
    """Means of neighbouring records: their steps [P], and values [P] or [P, ...] with the least and the largest."""

    steps_P: Floats
    mean_P: Floats
    low_P: Floats
    high_P: Floats


EMPTY = Reduced(*(np.zeros(0) for _ in Reduced._fields))


class _Buckets:
    """Buckets of a series: each holds `stride` values, the last one perhaps fewer."""

    def __init__(self) -> None:
        self._stride, self._seen = 1, 0
        self._count_P: NDArray[np.int64] | None = None
        self._sums: list[Floats] = []  # of steps and values
        self._ends: list[Floats] = []  # least and largest values

    def extend(self, steps_R: Floats, values_R: Floats) -> None:
        """Add values in the order of their steps; those that are not finite are left out."""
        finite_R = np.isfinite(values_R).reshape(len(values_R), -1).all(axis=1)
        steps_R, values_R = steps_R[finite_R], values_R[finite_R]
        if not len(steps_R):
            return
        place_R = np.arange(self._seen, self._seen + len(steps_R)) // self._stride
        self._seen += len(steps_R)
        new = np.ones(len(steps_R), np.int64), [steps_R, values_R], [values_R, values_R]
        if self._count_P is None:
            self._count_P, self._sums, self._ends = new
            place_P = place_R
        else:
            place_P = np.concatenate([np.arange(len(self._count_P)), place_R])
            self._count_P = np.concatenate([self._count_P, new[0]])
            self._sums = [np.concatenate(pair) for pair in zip(self._sums, new[1], strict=True)]
            self._ends = [np.concatenate(pair) for pair in zip(self._ends, new[2], strict=True)]
        self._merge(place_P)
        while len(self._count_P) > 2 * BUCKETS:
            self._stride *= 2
            self._merge(np.arange(len(self._count_P)) // 2)

    def _merge(self, place_P: NDArray[np.int64]) -> None:
        """Merge neighbouring buckets with the same place."""
        starts = np.flatnonzero(np.diff(place_P, prepend=-1))
        assert self._count_P is not None
        self._count_P = np.add.reduceat(self._count_P, starts)
        self._sums = [np.add.reduceat(sum_P, starts) for sum_P in self._sums]
        low_P, high_P = self._ends
        self._ends = [np.minimum.reduceat(low_P, starts), np.maximum.reduceat(high_P, starts)]

    def reduced(self) -> Reduced:
        """The series so far."""
        if self._count_P is None:
            return EMPTY
        steps_P, values_P = self._sums
        shape = (-1,) + (1,) * (values_P.ndim - 1)
        return Reduced(steps_P / self._count_P, values_P / self._count_P.reshape(shape), *self._ends)


@dataclass
class Series:
    """All series of a file, each by its nested keys, such as ("layers", "3", "live").

    Attributes:
        last: the last record; None if there is none.
    """

    path: Path
    last: dict[str, Any] | None = None
    _held: dict[Keys, tuple[list[int], list[Any]]] = field(default_factory=dict)
    _buckets: dict[Keys, _Buckets] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Series":
        """Read a file once for all series, in constant memory. Raises ArtefactError if it is damaged."""
        series = cls(path)
        for number, record in enumerate(each_record(path), 1):
            series._hold(record["step"], record, ())
            series.last = record
            if number % _HELD == 0:
                series._reduce()
        series._reduce()
        return series

    def __iter__(self) -> Iterator[Keys]:
        return iter(self._buckets)

    def at(self, *keys: str) -> Reduced:
        """The series under nested keys; without buckets if there is none."""
        buckets = self._buckets.get(keys)
        return buckets.reduced() if buckets else EMPTY

    def _hold(self, step: int, tree: Mapping[str, Any], above: Keys) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                self._hold(step, value, (*above, key))
            elif value is not None and not isinstance(value, str):
                steps, values = self._held.setdefault((*above, key), ([], []))
                steps.append(step)
                values.append(value)

    def _reduce(self) -> None:
        for keys, (steps, values) in self._held.items():
            try:
                arrays = np.array(steps, np.float64), np.array(values, np.float64)
                self._buckets.setdefault(keys, _Buckets()).extend(*arrays)
            except (TypeError, ValueError) as error:
                raise ArtefactError(
                    f"{self.path}: the values of {'.'.join(keys)} are not numbers, or lists of equal lengths ({error})."
                ) from None
        self._held.clear()
