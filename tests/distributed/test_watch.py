"""The watch over peers raises no false alarm: a pause of all processes, or one that computes for long, is no loss."""

import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from harness import run_distributed

from moce_ds import liveness
from moce_ds.runtime import started

SILENCE = 3.0
"""Seconds after which a silent rank counts as lost, here; and in every wait below, a rank is silent for longer."""
LONG = 2 * SILENCE


def live_through(folder: Path) -> list[str]:
    """A rank that computes for long while the other waits; then a pause of both."""
    lived = []
    with patch.object(liveness, "_BEAT_SECONDS", SILENCE / 6), started(peer_timeout=SILENCE) as runtime:
        if runtime.rank == 1:
            began, product = time.monotonic(), torch.eye(600)
            while time.monotonic() - began < LONG:
                product = product @ product
        runtime.barrier()
        lived.append("a long computation")
        (folder / f"rank-{runtime.rank}.pid").write_text(str(os.getpid()))
        while not (folder / "continued").exists():
            time.sleep(0.05)
        runtime.barrier()
        lived.append("a pause")
    return lived


def pause(folder: Path) -> None:
    """Stop both processes for long; the second goes on a little later than the first, as on a busy machine."""
    pids = [folder / f"rank-{rank}.pid" for rank in range(2)]
    while not all(pid.exists() and pid.read_text() for pid in pids):
        time.sleep(0.05)
    for pid in pids:
        os.kill(int(pid.read_text()), signal.SIGSTOP)
    time.sleep(LONG)
    for pid in pids:
        os.kill(int(pid.read_text()), signal.SIGCONT)
        time.sleep(SILENCE / 3)
    (folder / "continued").touch()


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What both ranks have lived through."""
    folder = tmp_path_factory.mktemp("watch")
    pausing = threading.Thread(target=pause, args=(folder,), daemon=True)
    pausing.start()
    return run_distributed(live_through, 2, folder, seconds=90)


@pytest.mark.parametrize("what", ["a long computation", "a pause"])
def test_no_false_alarm(lived: list[list[str]], what: str) -> None:
    assert all(what in rank for rank in lived)
