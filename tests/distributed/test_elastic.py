"""A run that is stopped goes on with other processes, ep_size and ZeRO stage, as if it had never had others.

Every run is compared with `one-moce`, which one process made without a stop. Few starts of processes: a stopped run is
copied for each way in which it goes on.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import run_distributed
from jobs import Job, Told, run_jobs
from tiny_run import STEPS, TinyData, assert_same, losses, tiny_settings

from moce_ds.checkpoint.format import find

Shape = tuple[int, int, int]
"""Processes, ep_size and ZeRO stage."""

BEGUN = {"four": (4, 4, 1), "two-then-four": (2, 2, 2), "one-then-four": (1, 1, 1)}
"""The runs that are stopped; the last two by the fixtures `two_processes` and `one_process`."""

WAYS: list[tuple[str, Shape]] = [
    *(("four", shape) for shape in ((4, 1, 1), (4, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 2))),
    ("two-then-four", (4, 4, 1)),
    ("one-then-four", (4, 4, 2)),
]


def name_of(begun: str, then: Shape) -> str:
    """Of a run's folder, such as four-4x4-zero1-2x2-zero2."""
    return "-".join([begun, *(f"{world}x{ep_size}-zero{stage}" for world, ep_size, stage in (BEGUN[begun], then))])


@pytest.fixture(scope="module")
def made(
    tiny_data: TinyData, runs: Path, one_process: dict[str, Told], two_processes: dict[str, Told]
) -> dict[str, Told]:
    """What the first rank was told, by the names of BEGUN and `name_of`."""

    def words(name: str, shape: Shape) -> list[str]:
        other = (f"experts.ep_size={shape[1]}", f"engine.zero_stage={shape[2]}")
        return tiny_settings(tiny_data.shards, runs / name, *other, clusters=tiny_data.clusters)

    told = one_process | two_processes
    for world in (4, 2, 1):
        jobs = {"four": Job(words("four", BEGUN["four"]), stop_after=3)} if world == 4 else {}
        for begun, then in WAYS:
            name = name_of(begun, then)
            if then[0] == world:
                jobs[name] = Job(words(name, then), before=partial(shutil.copytree, runs / begun, runs / name))
        told |= run_distributed(run_jobs, world, jobs)[0]
    return told


@pytest.mark.parametrize(("begun", "then"), WAYS, ids=lambda part: str(part).replace(", ", "x"))
def test_going_on_elsewhere(runs: Path, made: dict[str, Told], begun: str, then: Shape) -> None:
    stopped, gone_on = made[begun].steps, made[name_of(begun, then)]
    assert 3 <= stopped < STEPS == gone_on.steps
    assert f"after step {stopped}." in gone_on.text
    assert_same(runs, "one-moce", name_of(begun, then))
    manifest = find(runs / name_of(begun, then)).manifest
    assert manifest["placement"]["ep_size"] == then[1] and manifest["images_read"] == STEPS * 16


def test_a_run_resumes_with_fewer_parts_of_a_batch(tiny_data: TinyData, runs: Path) -> None:
    """After 64 steps, the tables that assign images to ranks start at micro-batches that fewer parts never reach."""
    stopped_after = 64

    def words(name: str, accumulation: int) -> list[str]:
        other = ("experts.ep_size=2", "optim.epochs=12", f"optim.accumulation={accumulation}")
        return tiny_settings(tiny_data.shards, runs / name, *other, clusters=tiny_data.clusters)

    copy = partial(shutil.copytree, runs / "parts", runs / "parts-fewer")
    jobs = {
        "parts-whole": Job(words("parts-whole", 4)),
        "parts": Job(words("parts", 4), stop_after=stopped_after),
        "parts-fewer": Job(words("parts-fewer", 1), before=copy),
    }
    made = run_distributed(run_jobs, 2, jobs)[0]
    assert stopped_after <= made["parts"].steps < made["parts-fewer"].steps == made["parts-whole"].steps
    np.testing.assert_allclose(losses(runs / "parts-fewer"), losses(runs / "parts-whole"), rtol=0, atol=1e-5)


def test_the_files_do_not_know_who_wrote_them(runs: Path, made: dict[str, Told]) -> None:
    names = {tuple(sorted(find(runs / name_of(*way)).manifest["files"])) for way in WAYS}
    assert len(names) == 1
