"""SIGKILL at any moment of a save: the newest complete checkpoint stays whole, and the next writer goes on.

A kill finds a writer in one of four states: writing files, publishing, removing an old checkpoint, between two saves.
The last test kills it once at each step of publishing and removing, without chance. Kills at random times are needed
for the first state alone, into which about one in five falls. `make soak` makes 200 of them.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from moce_ds.checkpoint.format import WEIGHTS, find, prune, steps_of
from tests.examples.checkpoint_writer import KEEP, publish_until, weights_of, write_on

KILLS = int(os.environ.get("KILLS", "40"))
_SAVES = 1.5  # a process is killed before it has written so many checkpoints, or soon after

nursery = multiprocessing.get_context("forkserver")  # its processes have imported what they need already


@pytest.fixture(autouse=True, scope="module")
def own_nursery() -> None:
    """The process that other tests fork theirs from has not imported what is needed here: a second for each kill."""
    multiprocessing.forkserver._forkserver._stop()
    nursery.set_forkserver_preload(["torch", "moce_ds.checkpoint.format"])


def begin(writer: Callable[..., None], *args: object) -> tuple[BaseProcess, Connection]:
    """A new process, and the end of a pipe at which it reports."""
    receiver, sender = nursery.Pipe(duplex=False)
    process = nursery.Process(target=writer, args=(*args, sender), daemon=True)
    process.start()
    sender.close()  # the process's copy is the only one left, so that its end is seen here
    return process, receiver


def last_report(reports: Connection) -> int:
    """The last step that a process has told before it was killed; half of a message tells nothing."""
    last = 0
    try:
        while reports.poll():
            last = int(reports.recv_bytes())
    except (EOFError, OSError):
        return last
    return last


def removals(run: Path) -> set[str]:
    """Checkpoints of which a part may be left."""
    return {path.name for path in run.glob("checkpoints/.step-*")}


def remains(run: Path, removed_before: set[str]) -> str:
    """What a killed process was at, by what it has left."""
    if removals(run) - removed_before:
        return "removing an old one"
    if any(run.glob("attempts/*/manifest.json")):
        return "publishing"
    return "writing files" if any(run.glob("attempts/*")) else "between two saves"


def check_newest(run: Path, published: int) -> None:
    """The newest checkpoint is whole, and none that was reported has gone; then clear up as the next attempt does."""
    if published or steps_of(run):
        newest = find(run)
        assert newest.step >= published and newest.faults() == []
        found = newest.load(WEIGHTS)
        assert all(torch.equal(found[name], weight) for name, weight in weights_of(newest.step).items())
    for draft in run.glob("attempts/*"):
        shutil.rmtree(draft)


def test_a_kill_at_any_time_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    chance, seen, published, lived = random.Random(0), Counter[str](), 0, 0.2
    for _ in range(KILLS):
        before = removals(tmp_path)
        writer, reports = begin(write_on, tmp_path)
        assert reports.recv_bytes() == b"0"
        began = time.monotonic()
        writer.join(chance.uniform(0, _SAVES * lived / max(1, published)))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL, "it could go on, and did not end by itself"
        lived += time.monotonic() - began
        published = max(published, last_report(reports))
        seen[remains(tmp_path, before)] += 1
        check_newest(tmp_path, published)
    prune(tmp_path, KEEP)
    assert not removals(tmp_path) and len(steps_of(tmp_path)) == KEEP, "what kills have left goes with the next prune"
    assert published > KILLS / 4, "writers got somewhere"
    assert seen["writing files"] > KILLS / 40 and len(seen) > 1, seen


def test_a_kill_between_any_two_steps_of_publishing_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    """Those steps take microseconds: no random time would find them all."""
    seen, published, dies_before = Counter[str](), 0, 0
    while True:
        dies_before += 1
        before = removals(tmp_path)
        writer, reports = begin(publish_until, tmp_path, dies_before)
        writer.join()
        published = max(published, last_report(reports))
        if writer.exitcode == 0:
            break
        assert writer.exitcode == -signal.SIGKILL
        seen[remains(tmp_path, before)] += 1
        check_newest(tmp_path, published)
    assert seen["writing files"] and seen["publishing"] and seen["removing an old one"], "as far as the manifest, ..."
    assert removals(tmp_path) == set() and len(steps_of(tmp_path)) == KEEP
