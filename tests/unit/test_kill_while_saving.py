"""SIGKILL at any moment of a save: the newest complete checkpoint stays whole, and the next writer goes on."""

import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from checkpoint_writer import KEEP, weights_of, write_on

from moce_ds.checkpoint_files import WEIGHTS, find, prune, steps_of

KILLS = 100
_SAVES = 1.5  # a process is killed before it has written so many checkpoints, or soon after


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


def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    nursery = multiprocessing.get_context("forkserver")  # its processes have imported what they need already
    nursery.set_forkserver_preload(["moce_ds.checkpoint_files"])
    moments, seen, published, lived = random.Random(0), Counter[str](), 0, 0.2
    for _ in range(KILLS):
        before = removals(tmp_path)
        receiver, sender = nursery.Pipe(duplex=False)
        writer = nursery.Process(target=write_on, args=(tmp_path, sender), daemon=True)
        writer.start()
        sender.close()
        assert receiver.recv_bytes() == b"0"
        began = time.monotonic()
        writer.join(moments.uniform(0, _SAVES * lived / max(1, published)))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL, "it could go on, and did not end by itself"
        lived += time.monotonic() - began
        published = max(published, last_report(receiver))
        seen[remains(tmp_path, before)] += 1
        if published or steps_of(tmp_path):
            newest = find(tmp_path)
            assert newest.step >= published and newest.faults() == []
            found = newest.load(WEIGHTS)
            assert all(torch.equal(found[name], weight) for name, weight in weights_of(newest.step).items())
        for draft in (tmp_path / "attempts").iterdir():  # as the next attempt does
            shutil.rmtree(draft)
    prune(tmp_path, KEEP)
    assert not removals(tmp_path) and len(steps_of(tmp_path)) == KEEP, "what kills have left goes with the next prune"
    assert published > KILLS / 4, "writers got somewhere"
    assert seen["writing files"] > KILLS / 4 and seen["publishing"] and seen["removing an old one"], seen
