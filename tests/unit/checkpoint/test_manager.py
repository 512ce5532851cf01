"""A save copies what it writes beside training: an update waits for the copy, and the file holds what was before it."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from torch import Tensor

from moce_ds.checkpoint import manager as saving
from moce_ds.checkpoint.deepspeed_state import Files, HostBuffers
from moce_ds.checkpoint.format import WEIGHTS, Checkpoint, step_folder
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.host.machine import MachineError
from moce_ds.distributed.runtime import Runtime

ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
FILE = f"{WEIGHTS}/shared.safetensors"


class Held(HostBuffers):
    """Buffers that copy once they are released, or then fail with `error`."""

    def __init__(self) -> None:
        super().__init__()
        self.released = Event()
        self.error: Exception | None = None

    def copies(self, files: Files, ready: torch.cuda.Event | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        self.released.wait()
        if self.error is not None:
            raise self.error
        yield from super().copies(files, ready)


@pytest.fixture
def weight() -> Tensor:
    return torch.ones(4)


@pytest.fixture
def buffers() -> Held:
    return Held()


@pytest.fixture
def saver(
    tmp_path: Path, weight: Tensor, buffers: Held, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CheckpointManager]:
    """A manager that saves one weight in the place of an engine's, through `buffers`."""
    monkeypatch.setattr(saving, "snapshot", lambda *_: {FILE: {"cls_token": weight}})
    monkeypatch.setattr(saving, "HostBuffers", lambda: buffers)
    lease = RunLease.claim(tmp_path / "run", ALONE)
    with CheckpointManager(None, RunSettings(out=tmp_path / "run"), lease, ALONE) as opened:
        yield opened


def test_an_update_waits_for_the_copy(saver: CheckpointManager, buffers: Held, weight: Tensor, tmp_path: Path) -> None:
    saver.start({"step": 1, "skipped": 0, "routing": None})
    update = Thread(target=lambda: (saver.wait_for_staging(), weight.zero_()))
    update.start()
    update.join(timeout=0.2)
    assert update.is_alive() and weight.sum() == 4, "the update did not wait"
    buffers.released.set()
    update.join()
    saver.finish()
    saved = Checkpoint.open(step_folder(tmp_path / "run", 1)).load(WEIGHTS, ["cls_token"])["cls_token"]
    assert torch.equal(saved, torch.ones(4)) and torch.equal(weight, torch.zeros(4))
    saver.wait_for_staging()  # with nothing on its way there is nothing to wait for


def test_a_copy_that_fails_holds_nobody_up(saver: CheckpointManager, buffers: Held) -> None:
    buffers.error = MemoryError("no memory for a copy")
    buffers.released.set()
    saver.start({"step": 1, "skipped": 0, "routing": None})
    saver.wait_for_staging()
    with pytest.raises(MachineError, match="no memory"):
        saver.finish()
