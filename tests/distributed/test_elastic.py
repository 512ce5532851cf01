"""A run that is stopped goes on with other processes, ep_size and ZeRO stage, as if it had never had others.

Every run is compared with `one-moce`, which one process made without a stop. Few starts of processes: the stopped run
of a start is copied for each way in which it goes on.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
from harness import run_distributed
from jobs import Job, Told, run_jobs
from tiny_run import STEPS, TinyData, assert_same, tiny_settings

from moce_ds.checkpoint_files import find

Shape = tuple[int, int, int]
"""Processes, ep_size and ZeRO stage."""

FIRST: list[Shape] = [(4, 4, 1), (2, 2, 2), (1, 1, 1)]
THEN: dict[Shape, list[Shape]] = {
    (4, 4, 1): [(4, 1, 1), (4, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 2)],
    (2, 2, 2): [(4, 4, 1)],
    (1, 1, 1): [(4, 4, 2)],
}
WAYS = [(first, then) for first in FIRST for then in THEN[first]]


def name_of(*shapes: Shape) -> str:
    return "-then-".join(f"{world}x{ep_size}-zero{stage}" for world, ep_size, stage in shapes)


@pytest.fixture(scope="module")
def made(data: TinyData, runs: Path, one: object) -> dict[str, Told]:
    """What the first rank was told, by name: `4x4-zero1` is a run that was stopped, `4x4-zero1-then-...` went on."""
    told: dict[str, Told] = {}

    def words(name: str, shape: Shape) -> list[str]:
        other = (f"experts.ep_size={shape[1]}", f"engine.zero_stage={shape[2]}")
        return tiny_settings(data.shards, runs / name, *other, clusters=data.clusters)

    def start(world: int, *more: tuple[Shape, Shape]) -> None:
        """All that `world` processes begin, and those ways of `more` by which they go on."""
        begun = [shape for shape in FIRST if shape[0] == world and name_of(shape) not in told]
        jobs = {name_of(shape): Job(words(name_of(shape), shape), stop_after=4) for shape in begun}
        for way in more:
            stopped, name = runs / name_of(way[0]), name_of(*way)
            jobs[name] = Job(words(name, way[1]), before=partial(shutil.copytree, stopped, runs / name))
        told.update(run_distributed(run_jobs, world, jobs, seconds=200)[0])

    def ways(world: int) -> list[tuple[Shape, Shape]]:
        return [way for way in WAYS if way[1][0] == world]

    start(1)
    start(2)
    start(4, *ways(4))
    start(2, *ways(2))
    start(1, *ways(1))
    return told


@pytest.mark.parametrize("way", WAYS, ids=lambda way: name_of(*way))
def test_going_on_elsewhere(runs: Path, made: dict[str, Told], way: tuple[Shape, Shape]) -> None:
    stopped, gone_on = made[name_of(way[0])].steps, made[name_of(*way)]
    assert 4 <= stopped < STEPS == gone_on.steps
    assert f"after step {stopped}." in gone_on.text
    assert_same(runs, "one-moce", name_of(*way))
    manifest = find(runs / name_of(*way)).manifest
    assert manifest["placement"]["ep_size"] == way[1][1] and manifest["images_read"] == STEPS * 16


def test_the_files_do_not_know_who_wrote_them(runs: Path, made: dict[str, Told]) -> None:
    files = {name: sorted(find(runs / name).manifest["files"]) for name in (name_of(*way) for way in WAYS)}
    assert len({tuple(names) for names in files.values()}) == 1
