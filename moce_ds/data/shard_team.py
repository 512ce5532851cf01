"""Who writes which parts of a shard set: worker processes, and processes with ranks on any number of nodes.

Legend: S parts of the set.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import ArtefactError, LostPeerError
from moce_ds.common.host.program import shared_bar
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.host.team import LostWorkerError, as_they_come
from moce_ds.data.shard_manifest import MANIFEST
from moce_ds.data.shard_parts import PLAN, Part, UnfinishedSet
from moce_ds.data.shards import PROGRESS
from moce_ds.data.sources.source import examined, lost_worker

_POLL_SECONDS = 0.2
_SILENCE_SECONDS = 1800.0
"""Time without a new file, or a byte more in one, after which the other processes are lost."""

_Task = tuple[int, int]
"""Number of a part, and the id of its first image."""


class ShardTeam:
    """The share of one process, of rank r among W, in an unfinished set: the parts r, r + W, ..."""

    def __init__(self, unfinished: UnfinishedSet, here: ProcessRank, workers: int) -> None:
        """Read the records of finished parts.

        Args:
            workers: number of worker processes of this process.

        Raises:
            ArtefactError: a record is damaged.
        """
        self._set, self._here, self._workers = unfinished, here, workers
        self._parts: dict[int, Part] = {}
        self._counts_S = unfinished.entry_counts()  # of images; of entries as long as a part is not finished
        self._first_ids_S = np.full(unfinished.parts, -1, np.int64)
        self._read_records()

    def write(self) -> list[Part]:
        """Write the parts of this process, wait for the others, and correct ids; returns the records of all parts.

        A process that finds that the first one has completed the set returns earlier, with the records that it knows.

        Raises:
            DataError: a worker process died, or the machine cannot read an entry.
            ArtefactError: the folder cannot be written, or a record is damaged.
            LostPeerError: the other processes write nothing any more.
        """
        own_S = np.arange(self._here.rank, self._set.parts, self._here.world_size)
        entries_S, missing_S = self._set.entry_counts(), own_S[~self._is_known[own_S]]
        own, done = int(entries_S[missing_S].sum()), int(entries_S[self._is_known].sum())
        disable = None if self._here.rank == 0 else True  # None: shown on a terminal only
        left = int(entries_S.sum()) - done
        with shared_bar(own, left, "shards", done, unit="file", disable=disable, delay=0) as advance:
            self._write_missing(missing_S.tolist(), advance)
        if self._wait(lambda: bool(self._is_known.all())):
            for (number, _), part in self._worked(self._renumbered, own_S[self._misplaced[own_S]].tolist()):
                self._keep(number, part)
            if self._here.rank == 0:
                self._wait(lambda: not self._misplaced.any())
        return [self._parts[number] for number in sorted(self._parts)]

    def _write_missing(self, missing: list[int], advance: Callable[[int], None]) -> None:
        """Write parts side by side, one per worker, as long as all workers have one. All workers share each of the
        others."""
        alone = len(missing) // self._workers * self._workers
        for task, done in self._worked(self._written, missing[:alone]):
            self._keep(task[0], done, advance)
        for number in missing[alone:]:
            unfinished = self._set
            verdicts = examined(unfinished.source, unfinished.entries_of(number), unfinished.max_pixels, self._workers)
            with closing(verdicts):
                for done in unfinished.write_examined(number, self._first_id(number), verdicts):
                    self._keep(number, done, advance)

    def _worked(
        self, work: Callable[[_Task], Iterator[int | Part]], numbers: list[int]
    ) -> Iterator[tuple[_Task, int | Part]]:
        tasks = ((number, self._first_id(number)) for number in numbers)
        try:
            yield from as_they_come(work, tasks, min(self._workers, len(numbers)) or 1, __name__)
        except LostWorkerError as lost:
            raise lost_worker(self._set.entries_of(lost.task[0])) from None

    @property
    def _written(self) -> Callable[[_Task], Iterator[int | Part]]:
        return partial(_write, self._set)

    @property
    def _renumbered(self) -> Callable[[_Task], Iterator[int | Part]]:
        return partial(_renumber, self._set)

    def _keep(self, number: int, done: int | Part, advance: Callable[[int], None] | None = None) -> None:
        if isinstance(done, Part):
            self._parts[number] = done
            self._counts_S[number], self._first_ids_S[number] = done.count, done.first_id
        elif advance is not None:
            advance(done)

    def _first_id(self, number: int) -> int:
        return int(self._counts_S[:number].sum())

    @property
    def _is_known(self) -> NDArray[np.bool_]:
        """[S] whether each part is finished."""
        return self._first_ids_S >= 0

    @property
    def _misplaced(self) -> NDArray[np.bool_]:
        """[S] whether the ids of each finished part do not follow those before it, as far as these are known."""
        return self._is_known & (self._first_ids_S != np.cumsum(self._counts_S) - self._counts_S)

    def _read_records(self) -> None:
        there_S = self._set.finished()
        for number in np.flatnonzero(there_S & (~self._is_known | self._misplaced)).tolist():
            if part := self._set.record_of(number):
                self._keep(number, part)

    def _wait(self, until: Callable[[], bool]) -> bool:
        """Wait for the records of other processes. False: the set is complete. Raises LostPeerError."""
        silence = _Silence(self._set.out)
        while not until():
            silence.check()
            try:
                self._read_records()
            except (FileNotFoundError, ArtefactError):
                if not (self._set.out / MANIFEST).exists():
                    raise
                return False
        return True


def wait_for_begin(out: Path) -> None:
    """Wait until the first process has listed the source, or has found the set complete. Raises LostPeerError."""
    silence = _Silence(out)
    while not ((out / PROGRESS / PLAN).exists() or (out / MANIFEST).exists()):
        silence.check()


class _Silence:
    """How long nothing was written to a set."""

    def __init__(self, out: Path) -> None:
        self._out, self._seen, self._since = out, (-1, -1), time.monotonic()

    def check(self) -> None:
        """Sleep for a moment. Raises LostPeerError if nothing was written for long."""
        seen = self._written()
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        if time.monotonic() - self._since > _SILENCE_SECONDS:
            raise LostPeerError(
                f"The other processes have written nothing to {self._out} for {_SILENCE_SECONDS / 60:.0f} minutes. "
                "Rerun the same command to resume."
            )
        time.sleep(_POLL_SECONDS)

    def _written(self) -> tuple[int, int]:
        """Number of records, and bytes in files that are being written."""
        drafts = [*self._out.glob(".*.tmp"), *(self._out / PROGRESS).glob(".*.tmp")]
        size = 0
        for draft in drafts:
            try:
                size += draft.stat().st_size
            except FileNotFoundError:  # renamed meanwhile
                continue
        return len(list((self._out / PROGRESS).glob("*.json"))), size


def _write(unfinished: UnfinishedSet, task: _Task) -> Iterator[int | Part]:
    yield from unfinished.write(*task)


def _renumber(unfinished: UnfinishedSet, task: _Task) -> Iterator[int | Part]:
    yield from unfinished.renumber(*task)
