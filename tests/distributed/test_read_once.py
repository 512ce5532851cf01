"""Over all processes and the whole start of a run, each file of a checkpoint is read once."""

import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from harness import run_distributed
from jobs import Job, Told, run_job
from test_corruption import EXPERT, MOMENTS
from tiny_run import STEPS, TinyData, assert_same, tiny_settings

from moce_ds.checkpoint.format import ROUTING, WEIGHTS, Checkpoint, step_folder, steps_of
from moce_ds.distributed.runtime import started

OPENED = 2  # times for one reading: `reads_from` opens a file before it is read, to name the fault if it cannot
SAVING = "run.checkpoint_every=2"  # else a run saves its last step alone, which reads none of the earlier files again


@dataclass(frozen=True)
class Counted:
    """What a rank was told, and how often it has opened each file of checkpoints to read it, by its path."""

    told: Told
    opened: Counter[str]


def run_counted(jobs: dict[str, Job]) -> dict[str, Counted]:
    """Pre-train one job after the other in this rank."""
    opened: Counter[str] = Counter()

    def note(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE == os.O_RDONLY:
            opened[str(args[0])] += 1

    sys.addaudithook(note)
    counted = {}
    with started() as runtime:
        for name, job in jobs.items():
            opened.clear()
            told = run_job(job, runtime)
            counted[name] = Counted(told, Counter({path: n for path, n in opened.items() if path.endswith("tensors")}))
    return counted


def damage(run: Path, source: Path) -> None:
    """Copy a run, and damage two files of its newest checkpoint, which different ranks read."""
    shutil.copytree(source, run)
    spoil(run, EXPERT, MOMENTS)


def move(run: Path, source: Path, first: Path) -> None:
    """Copy a run with one checkpoint more than its `first` part, made with another `ep_size`, and damage its routes."""
    shutil.copytree(source, run)
    for step in steps_of(run)[len(steps_of(first)) + 1 :]:
        shutil.rmtree(step_folder(run, step))
    spoil(run, ROUTING)


def spoil(run: Path, *names: str) -> None:
    """Overwrite the end of files of the newest checkpoint, without reading them."""
    for name in names:
        with open(step_folder(run, steps_of(run)[-1]) / name, "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"????")


@pytest.fixture(scope="module")
def counted(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Counted]]]:
    """The folder of the runs, and what each of two ranks did: a stopped run, resumed in several ways."""
    runs = tmp_path_factory.mktemp("read-once")

    def words(name: str, *other: str) -> list[str]:
        placed = ("experts.ep_size=2", "run.keep_checkpoints=9", "run.checkpoint_every=100")
        return tiny_settings(tiny_data.shards, runs / name, *placed, *other, clusters=tiny_data.clusters)

    jobs = {
        "stopped": Job(words("stopped", SAVING), stop_after=3),
        "resumed": Job(words("resumed"), before=partial(shutil.copytree, runs / "stopped", runs / "resumed")),
        "elsewhere": Job(
            words("elsewhere", "experts.ep_size=1", SAVING),
            before=partial(shutil.copytree, runs / "stopped", runs / "elsewhere"),
        ),
        "moved": Job(words("moved"), before=partial(move, runs / "moved", runs / "elsewhere", runs / "stopped")),
        "back": Job(words("elsewhere"), before=partial(drop_last, runs / "elsewhere")),
        "damaged": Job(words("damaged"), before=partial(damage, runs / "damaged", runs / "stopped")),
        "complete": Job(words("resumed")),
        "begun": Job(words("begun", f"run.init_from={runs / 'stopped'}")),
    }
    return runs, run_distributed(run_counted, 2, jobs)


def drop_last(run: Path) -> None:
    """Remove the checkpoint of the last step, so that the run resumes from the one before."""
    shutil.rmtree(step_folder(run, STEPS))


def reads(counted: list[dict[str, Counted]], name: str, folder: Path) -> dict[str, int]:
    """How often the files of a checkpoint were opened by all ranks together, by their names."""
    total: Counter[str] = Counter()
    for rank in counted:
        total += rank[name].opened
    return {path.removeprefix(f"{folder}/"): n for path, n in total.items() if path.startswith(f"{folder}/")}


def once(folder: Path, part: str = "") -> dict[str, int]:
    """What `reads` is where every file (of a part) is read once."""
    return {name: OPENED for name in Checkpoint.open(folder).manifest["files"] if name.startswith(part)}


def test_resuming_reads_each_file_once(counted: tuple[Path, list[dict[str, Counted]]]) -> None:
    runs, ranks = counted
    newest = steps_of(runs / "stopped")[-1]
    for name in ("resumed", "elsewhere"):
        assert f"Resuming {runs / name} after step {newest}." in ranks[0][name].told.text
        assert reads(ranks, name, step_folder(runs / name, newest)) == once(step_folder(runs / name, newest))
        assert min(sum(rank[name].opened.values()) for rank in ranks) > OPENED, "they share the reading"


def test_the_routes_that_place_the_experts_are_read_once(counted: tuple[Path, list[dict[str, Counted]]]) -> None:
    """They are needed before anything else where `ep_size` changes."""
    runs, ranks = counted
    folder = step_folder(runs / "elsewhere", STEPS - 2)
    assert Checkpoint.open(folder).entry("placement", "ep_size") == 1
    assert reads(ranks, "back", folder) == once(folder)
    assert ROUTING in once(folder)


def test_a_damaged_checkpoint_and_the_one_before_are_read_once(counted: tuple[Path, list[dict[str, Counted]]]) -> None:
    runs, ranks = counted
    older, newest = steps_of(runs / "stopped")[-2:]
    told = ranks[0]["damaged"].told
    assert f"WARNING: the checkpoint of step {newest} is damaged; resuming from step {older}" in told.text
    for name in (EXPERT, MOMENTS):
        assert f"  {step_folder(runs / 'damaged', newest) / name} is damaged: its checksum" in told.text
    assert f"Resuming {runs / 'damaged'} after step {older}." in told.text
    for step in (older, newest):
        assert reads(ranks, "damaged", step_folder(runs / "damaged", step)) == once(step_folder(runs / "stopped", step))


def test_experts_return_to_the_places_of_the_checkpoint_that_is_loaded(
    counted: tuple[Path, list[dict[str, Counted]]],
) -> None:
    """The damaged one needs other places, which its routes would have given."""
    runs, ranks = counted
    older, newest = steps_of(runs / "stopped")[-1], steps_of(runs / "elsewhere")[len(steps_of(runs / "stopped"))]
    told, damaged = ranks[0]["moved"].told, step_folder(runs / "moved", newest)
    assert f"WARNING: the checkpoint of step {newest} is damaged; resuming from step {older}" in told.text
    assert f"  {damaged / ROUTING} is damaged: its checksum" in told.text
    folder = step_folder(runs / "elsewhere", newest)
    assert Checkpoint.open(folder).entry("placement", "ep_size") == 1
    assert reads(ranks, "moved", damaged) == once(folder)
    assert reads(ranks, "moved", step_folder(runs / "moved", older)) == once(step_folder(runs / "stopped", older))
    assert_same(runs, "resumed", "moved", tolerance=0)


def test_a_complete_run_is_read_once(counted: tuple[Path, list[dict[str, Counted]]]) -> None:
    runs, ranks = counted
    folder = step_folder(runs / "resumed", STEPS)
    assert ranks[0]["complete"].told.text == f"{runs / 'resumed'} is complete: {STEPS} steps.\n"
    assert reads(ranks, "complete", folder) == once(folder)


def test_initial_weights_are_read_once(counted: tuple[Path, list[dict[str, Counted]]]) -> None:
    runs, ranks = counted
    folder = step_folder(runs / "stopped", steps_of(runs / "stopped")[-1])
    assert f"Starting from {runs / 'stopped'}." in ranks[0]["begun"].told.text
    assert reads(ranks, "begun", folder) == once(folder, WEIGHTS)
