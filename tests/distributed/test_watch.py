"""The watch over peers raises no false alarm: a pause of all processes, or one that computes for long, is no loss, and
what a stranger writes into the store is no verdict."""

import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from harness import run_distributed
from torch.distributed import TCPStore

from moce_ds.distributed import watchdog as liveness
from moce_ds.distributed.runtime import started

SILENCE = 3.0
"""Seconds after which a silent rank counts as lost, here; and in every wait below, a rank is silent for longer."""
LONG = 1.6 * SILENCE


def live_through(folder: Path) -> list[str]:
    """A rank that computes for long while the other waits; a pause of both; a stranger at the store's port."""
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
        if runtime.is_main:
            forge(int(os.environ["MASTER_PORT"]))
        time.sleep(4 * liveness._BEAT_SECONDS)  # until both have read what is forged
        runtime.barrier()
        lived.append("a stranger")
        odd = ["", "\ud800", "\x1b[2J", "é" * 1000][runtime.rank :: 2]
        lived += [f"told {text!r}" for one in odd for text in runtime.texts(one)]
        listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        lived += [f"listens at {address}" for address in listening]
    return lived


def forge(port: int) -> None:
    """What a stranger can do at that port: list all keys, and write verdicts where the beats show that they belong."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    beats = [key for key in store.list_keys() if "beat/" in key]
    assert beats, "the stranger has found where the ranks look"
    for key in beats:
        for text in ("0 \x1b]0;owned\x07", "75 owned", f"{'0' * 64} 75 owned"):
            store.set(key.partition("beat/")[0] + "verdict", text)
            store.set(key.replace("beat/", "farewell/"), text)


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
    return run_distributed(live_through, 2, folder)


@pytest.mark.parametrize("what", ["a long computation", "a pause"])
def test_no_false_alarm(lived: list[list[str]], what: str) -> None:
    assert all(what in rank for rank in lived)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stranger_at_the_store_is_not_believed(lived: list[list[str]], rank: int) -> None:
    assert "a stranger" in lived[rank]


def test_texts_arrive_as_they_are(lived: list[list[str]]) -> None:
    told = [f"told {text!r}" for text in ("", "\ud800", "\x1b[2J", "é" * 1000)]
    assert all([line for line in rank if line.startswith("told")] == told for rank in lived)


def test_processes_of_one_machine_listen_on_the_loopback_alone(lived: list[list[str]]) -> None:
    found = [line for rank in lived for line in rank if line.startswith("listens")]
    assert found and set(found) == {"listens at 127.0.0.1"}, "gloo waits for its peers somewhere"
