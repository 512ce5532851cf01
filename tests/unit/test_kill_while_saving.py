"""SIGKILL at any moment of a save: the newest complete checkpoint stays whole, and the next writer goes on."""

import multiprocessing
import random
import signal
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from checkpoint_writer import KEEP, weights_of, write_on

from moce_ds.checkpoint_files import WEIGHTS, find, steps_of

KILLS = 100
_SAVES = 2.5  # a kill falls within so many saves of a process's life


def last_report(reports: Connection) -> int:
    """The last step that a process has told before it was killed; half of a message tells nothing."""
    last = 0
    try:
        while reports.poll():
            last = int(reports.recv_bytes())
    except EOFError:
        pass
    return last


def remains(run: Path) -> str:
    """What a killed process was at, by what it has left."""
    hidden = {path.suffix for path in (run / "checkpoints").glob(".step-*")} if steps_of(run) else set()
    drafts = [draft for draft in (run / "attempts").iterdir() if draft.is_dir()]
    if hidden:
        return "removing an old one"
    if any((draft / "manifest.json").exists() for draft in drafts):
        return "publishing"
    return "writing files" if drafts else "between two saves"


@pytest.fixture(scope="module")
def nursery() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported what they need already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moce_ds.checkpoint_files"])
    return context


def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_whole(
    nursery: multiprocessing.context.ForkServerContext, tmp_path: Path
) -> None:
    moments, seen, published, save_seconds = random.Random(0), Counter[str](), 0, 0.05
    for _ in range(KILLS):
        receiver, sender = nursery.Pipe(duplex=False)
        writer = nursery.Process(target=write_on, args=(tmp_path, sender), daemon=True)
        writer.start()
        sender.close()
        assert receiver.recv_bytes() == b"0"
        began = time.monotonic()
        writer.join(moments.uniform(0, _SAVES * save_seconds))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL, "it could go on, and did not end by itself"
        reported = last_report(receiver)
        if reported > published:
            save_seconds = (time.monotonic() - began) / (reported - published)
        published = max(published, reported)
        seen[remains(tmp_path)] += 1
        if published == 0 and not steps_of(tmp_path):
            continue
        newest = find(tmp_path)
        assert newest.step >= published and newest.faults() == []
        assert all(torch.equal(newest.load(WEIGHTS)[name], weight) for name, weight in weights_of(newest.step).items())
        assert len(steps_of(tmp_path)) <= KEEP + 1
        clear_drafts(tmp_path)
    assert published > KILLS / 2, "writers got somewhere"
    assert seen["writing files"] > KILLS / 4 and seen["publishing"] and seen["removing an old one"], seen
