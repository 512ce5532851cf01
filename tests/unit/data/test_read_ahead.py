"""Reading ahead of the training thread: how many files and batches, which errors where, and how it ends.

Axes: B images.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy as copy_of
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moce_ds.common.errors import DataError
from moce_ds.data.loader import BATCHES_AHEAD, Loader
from moce_ds.data.read_ahead import FILES_AHEAD, READERS, IntactReader, in_background, read_ahead
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sample_table import SAMPLE, SAMPLES, SampleTable
from moce_ds.data.sampler import ReadList, SequentialSampler, ShuffledSampler
from moce_ds.data.shard_manifest import Manifest, ShardFile
from moce_ds.data.shard_storage import FolderStorage
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop
from moce_ds.training.local_sampler import LEAD
from tests.unit.data.test_loader import copy, flip_byte, make_undecodable

__all__ = ["copy"]  # a fixture
PATIENCE = 120
"""Seconds after which what never happens counts as missing; only a failing test waits for them."""


@dataclass(frozen=True, eq=False)
class Watched(ShardSet):
    """A shard set that calls `before_read` in the thread of each read."""

    before_read: Callable[[], object] = field(default=lambda: None)

    def read(self, image_id: int) -> bytes:
        """As the shard set."""
        self.before_read()
        return super().read(image_id)


def loader(
    shards: ShardSet, read_list: Callable[[int], ReadList], last: int, batch_size: int, replace_damaged: bool = True
) -> Loader:
    return Loader(
        shards,
        read_list,
        RandomCrop(1),
        ImageInput(16),
        first=0,
        last=last,
        batch_size=batch_size,
        threads=1,
        device=torch.device("cpu"),
        replace_damaged=replace_damaged,
    )


def test_reads_are_in_flight_together_and_never_in_the_training_thread(tiny_shards: Path) -> None:
    """Every read waits until `READERS` reads have begun; it would wait forever if fewer were in flight."""
    together, threads = threading.Barrier(READERS), set[int]()

    def before_read() -> None:
        threads.add(threading.get_ident())
        together.wait(PATIENCE)

    shards = replace(Watched.open(tiny_shards), before_read=before_read)
    sampler = ShuffledSampler(RandomOrder(60, seed=1), READERS)
    batches = list(loader(shards, sampler.batch, 6, READERS))
    assert [batch.ids_B.tolist() for batch in batches] == [sampler.batch(k).ids.tolist() for k in range(6)]
    assert 8 <= len(threads) == READERS <= 32 and threading.get_ident() not in threads


class Listing:
    """Reading lists of a sampler; knows which batches have been asked for, and how many were to be taken by then."""

    def __init__(self, sampler: ShuffledSampler) -> None:
        self.sampler, self.taken, self.ahead = sampler, 0, 0
        self.listed, self.threads = [threading.Event() for _ in range(40)], set[int]()

    def batch(self, index: int) -> ReadList:
        self.threads.add(threading.get_ident())
        self.ahead = max(self.ahead, index - self.taken + 1)
        self.listed[index].set()
        return self.sampler.batch(index)


def test_batches_are_prepared_while_training_takes_none_but_not_more_than_agreed(tiny_shards: Path) -> None:
    """The next batches are listed, read and decoded while the training thread is busy with something else."""
    listing = Listing(ShuffledSampler(RandomOrder(60, seed=1), 4))
    batches = iter(loader(ShardSet.open(tiny_shards), listing.batch, 30, 4))
    for index in range(15):
        listing.taken += 1
        assert next(batches).ids_B.tolist() == listing.sampler.batch(index).ids.tolist()
        assert listing.listed[index + BATCHES_AHEAD].wait(PATIENCE)
    assert listing.ahead == BATCHES_AHEAD
    assert threading.get_ident() not in listing.threads


def test_a_new_table_orders_no_batch_that_has_been_listed() -> None:
    assert BATCHES_AHEAD < LEAD


@dataclass(frozen=True, eq=False)
class Sized(ShardSet):
    """Images that have the size of the table, but are empty."""

    def read(self, image_id: int) -> bytes:
        """Nothing."""
        return b""

    def is_intact(self, image_id: int, data: bytes) -> bool:
        """Always."""
        return True


@pytest.mark.parametrize(("megabytes", "expected"), [(1, FILES_AHEAD + 1), (50, 3), (300, 1)])
def test_few_large_files_are_read_ahead(tiny_shards: Path, megabytes: int, expected: int) -> None:
    """Batches of two images: 256 MiB are exceeded by the third batch of 100 MB, and by one of 600 MB."""
    shards, listing = Sized.open(tiny_shards), Listing(ShuffledSampler(RandomOrder(60, seed=1), 2))
    table = copy_of(shards.table)
    table.rows = np.array(shards.samples)
    table.rows["size"] = megabytes * 10**6
    with ThreadPoolExecutor(READERS) as pool:
        reader = IntactReader(replace(shards, table=table), 0, {})
        next(read_ahead(reader, listing.batch, 0, 20, pool))
    assert listing.ahead == expected


def test_an_unreadable_image_is_an_error_of_its_batch(copy: Path) -> None:
    """The batches before it, which are read before the error is known or after, are all there."""
    flip_byte(copy, 20)
    sampler = SequentialSampler(0, 60, 4)
    batches = iter(loader(ShardSet.open(copy), sampler.batch, 15, 4, replace_damaged=False))
    for index in range(5):
        assert next(batches).ids_B.tolist() == sampler.batch(index).ids.tolist()
    with pytest.raises(DataError, match=r"image 20 \(digits/00.png\) is not as written"):
        next(batches)


@pytest.mark.parametrize("harm", [flip_byte, make_undecodable])
def test_replaced_images_count_when_their_batch_is_taken(copy: Path, harm: Callable[[Path, int], None]) -> None:
    harm(copy, 20)
    listing = Listing(ShuffledSampler(RandomOrder(60, seed=1), 60))  # 20 is in every batch
    damaged = loader(ShardSet.open(copy), listing.batch, 20, 60)
    batches = iter(damaged)
    for taken in range(1, 4):
        assert 21 in next(batches).ids_B
        assert listing.listed[taken + BATCHES_AHEAD - 1].wait(PATIENCE)  # the next batches have been read
        assert damaged.replaced == {20: taken}


def threads_of_loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moce-")]


def threads_of_dali() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found.append((task / "comm").read_text())
    return [name for name in found if name.startswith("[DALI]")]


def assert_nothing_runs() -> None:
    """Our threads have ended. Those of DALI end, without a garbage collection, as soon as the system removes them."""
    assert threads_of_loaders() == []
    limit = time.monotonic() + PATIENCE
    while (left := threads_of_dali()) and time.monotonic() < limit:
        os.sched_yield()
    assert left == []


@pytest.mark.parametrize("taken", [1, 5])
def test_an_abandoned_loader_leaves_no_thread(tiny_shards: Path, taken: int) -> None:
    sampler = ShuffledSampler(RandomOrder(60, seed=1), 4)
    batches = loader(ShardSet.open(tiny_shards), sampler.batch, 30, 4)
    gc.collect()  # pipelines of earlier tests
    gc.disable()
    try:
        with pytest.raises(ValueError, match="training failed"):
            for index, _ in enumerate(batches):
                assert threads_of_loaders() and threads_of_dali()
                if index + 1 == taken:
                    raise ValueError("training failed")
        assert_nothing_runs()
        begun = iter(batches)
        next(begun)
        del begun
        assert_nothing_runs()
    finally:
        gc.enable()


PROGRAM = """
import signal, sys
from pathlib import Path
import torch
from moce_ds.data.loader import Loader
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shard_storage import FolderStorage
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop
sampler = ShuffledSampler(RandomOrder(60, seed=1), 4)
batches = iter(Loader(ShardSet.open(Path(sys.argv[1])), sampler.batch, RandomCrop(1), ImageInput(16), first=0,
    last=1000, batch_size=4, threads=1, device=torch.device("cpu")))
next(batches)
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("raise ValueError('training failed')", {1}, "ValueError: training failed\n"),
        # Python ends by the signal, unless code that runs at exit has made it forget the interrupt.
        ("signal.raise_signal(signal.SIGINT)", {1, -signal.SIGINT}, "KeyboardInterrupt\n"),
        ("sys.exit(3)", {3}, ""),
    ],
)
def test_the_interpreter_ends_while_batches_are_loaded(
    tiny_shards: Path, end: str, status: set[int], said: str
) -> None:
    """The iterator is still referenced, and nothing closes it."""
    command = [sys.executable, "-c", PROGRAM + end, str(tiny_shards)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode in status and done.stderr.endswith(said) and "Exception ignored" not in done.stderr


@pytest.fixture
def numbers() -> Iterator[tuple[Generator[int], list[str]]]:
    """0 to 4 and an error, and what has happened to their generator."""
    events: list[str] = []

    def make() -> Generator[int]:
        try:
            yield from range(5)
            raise DataError("no more")
        finally:
            events.append("closed")

    yield make(), events
    assert events == ["closed"]


def test_items_and_errors_come_in_order_from_one_other_thread(numbers: tuple[Generator[int], list[str]]) -> None:
    items, _ = numbers
    prepared: list[str] = []
    taken = []
    with pytest.raises(DataError, match="no more"):
        for item in in_background(items, 3, lambda: prepared.append(threading.current_thread().name)):
            taken.append(item)
    assert taken == [0, 1, 2, 3, 4] and prepared == ["moce-load_0"] and threads_of_loaders() == []


def test_closing_closes_the_generator(numbers: tuple[Generator[int], list[str]]) -> None:
    items, events = numbers
    taking = in_background(items, 2, lambda: None)
    assert next(taking) == 0 and events == []
    taking.close()
    assert events == ["closed"] and threads_of_loaders() == []


def test_threads_share_the_files_of_a_set_with_more_shards_than_stay_open(tmp_path: Path) -> None:
    """A file that another thread drops from the cache stays open until it has been read."""
    samples = np.zeros(600, SAMPLE)
    shards = []
    for number in range(600):
        data = number.to_bytes(8, "little")
        (tmp_path / f"shard-{number:06d}.tar").write_bytes(data)
        samples[number] = (number, 0, 8, 1, 1, -1, zlib.crc32(data))
        shards.append(ShardFile(f"shard-{number:06d}.tar", 8, "", 1))
    np.save(tmp_path / SAMPLES, samples)
    table = SampleTable(tmp_path, Manifest(1, 600, "", {}, [], shards, "", {}))
    many = ShardSet(tmp_path, tmp_path, 600, [], "", shards, FolderStorage(tmp_path), table)

    def damaged(seed: int) -> list[int]:
        return many.damaged(np.random.default_rng(seed).integers(0, 600, 400).tolist())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            assert list(pool.map(damaged, range(READERS))) == [[]] * READERS
    finally:
        sys.setswitchinterval(interval)
