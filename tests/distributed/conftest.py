"""Shared by the distributed tests: one tiny data set with clusters, and the runs that several tests compare with."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from harness import run_distributed
from jobs import Job, Told, run_jobs, send_myself
from tiny_run import TinyData, alter_images, tiny_settings, write_data

from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet

# Sums must not depend on how many cores a machine has: inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # and SIGINT, which stops most of the runs below
LEAVING_SOME = ("run.checkpoint_every=1", "run.keep_checkpoints=2", "run.keep_every=4")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Shards of `write_images`, and their clusters."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, by name; `two-...` with two processes, `one-...` with one, `...-then-one` begun with two."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def damaged_shards(tiny_data: TinyData, runs: Path) -> Path:
    """The shards with one image altered, which rank 1 of two reads in the second step; `image.txt` names it."""
    shards = runs / "damaged-shards"
    shutil.copytree(tiny_data.shards, shards)
    image = int(ShuffledSampler(RandomOrder(ShardSet.open(shards).count, seed=0), 16).batch(1).part(1, 2).ids[3])
    alter_images(shards, [image])
    (shards / "image.txt").write_text(ShardSet.open(shards).source(image))
    return shards


@pytest.fixture(scope="session")
def two_processes(tiny_data: TinyData, runs: Path, damaged_shards: Path) -> dict[str, Told]:
    """All runs of two processes."""
    shards, clusters = tiny_data.shards, tiny_data.clusters

    def mae(name: str, *other: str) -> list[str]:
        return tiny_settings(shards, runs / name, *other)

    def moce(name: str, ep_size: int, *other: str) -> list[str]:
        return tiny_settings(shards, runs / name, f"experts.ep_size={ep_size}", *other, clusters=clusters)

    jobs = {
        "two-mae": Job(mae("two-mae")),
        "two-mae-accumulated": Job(mae("two-mae-accumulated", "optim.accumulation=2")),
        "two-mae-zero2": Job(mae("two-mae-zero2", "engine.zero_stage=2")),
        "two-mae-stopped": Job(mae("two-mae-stopped"), stop_after=3),
        "two-mae-resumed": Job(mae("two-mae-stopped")),  # the same command
        "mae-then-one": Job(mae("mae-then-one"), stop_after=3),
        "two-moce-ep1": Job(moce("two-moce-ep1", 1)),
        "two-moce-ep2": Job(moce("two-moce-ep2", 2)),
        "two-moce-plain": Job(moce("two-moce-plain", 2, "experts.loader_locality=false")),
        "two-moce-zero2": Job(moce("two-moce-zero2", 1, "engine.zero_stage=2")),
        "two-moce-both": Job(moce("two-moce-both", 2, "optim.accumulation=2", "engine.zero_stage=2")),
        "two-moce-bf16": Job(moce("two-moce-bf16", 2, "engine.precision=bf16")),
        "two-moce-bf16-zero2": Job(moce("two-moce-bf16-zero2", 2, "engine.precision=bf16", "engine.zero_stage=2")),
        "moce-then-one": Job(moce("moce-then-one", 2), stop_after=3),
        "two-then-four": Job(moce("two-then-four", 2, "engine.zero_stage=2"), stop_after=3),
        "two-moce-resumed-stopped": Job(moce("two-moce-resumed", 2, *LEAVING_SOME), stop_after=3),
        "two-moce-resumed": Job(moce("two-moce-resumed", 2, *LEAVING_SOME)),  # the same command
        "two-moce-synchronous": Job(moce("two-moce-synchronous", 2, *LEAVING_SOME, "run.async_checkpoint=false")),
        "two-moce-bf16-resumed-stopped": Job(moce("two-moce-bf16-resumed", 2, "engine.precision=bf16"), stop_after=3),
        "two-moce-bf16-resumed": Job(moce("two-moce-bf16-resumed", 2, "engine.precision=bf16")),
        "two-time-is-up": Job(mae("two-time-is-up", "run.max_hours=0.000001")),
        **{
            f"two-{number.name}": Job(mae(f"two-{number.name}"), stop_after=2, act=partial(send_myself, number))
            for number in SIGNALS
        },
        "two-damaged": Job(moce("two-damaged", 2, f"data.shards={damaged_shards}", "optim.epochs=0.5")),
    }
    first, second = run_distributed(run_jobs, 2, jobs)
    assert {name: told.steps for name, told in first.items()} == {name: told.steps for name, told in second.items()}
    assert not any(told.error for told in first.values())
    return first


@pytest.fixture(scope="session")
def one_process(tiny_data: TinyData, runs: Path, two_processes: dict[str, Told]) -> dict[str, Told]:
    """All runs of one process, and the end of two that were begun with two."""
    shards, clusters = tiny_data.shards, tiny_data.clusters
    jobs = {
        "one-mae": Job(tiny_settings(shards, runs / "one-mae")),
        "one-mae-accumulated": Job(tiny_settings(shards, runs / "one-mae-accumulated", "optim.accumulation=4")),
        "one-moce": Job(tiny_settings(shards, runs / "one-moce", clusters=clusters)),
        "one-moce-bf16": Job(tiny_settings(shards, runs / "one-moce-bf16", "engine.precision=bf16", clusters=clusters)),
        "mae-then-one": Job(tiny_settings(shards, runs / "mae-then-one")),
        "moce-then-one": Job(tiny_settings(shards, runs / "moce-then-one", "experts.ep_size=1", clusters=clusters)),
        "one-then-four": Job(tiny_settings(shards, runs / "one-then-four", clusters=clusters), stop_after=3),
    }
    return run_distributed(run_jobs, 1, jobs)[0]
