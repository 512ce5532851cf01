"""What is damage when a checkpoint is read, and what may pass. Several processes: distributed/test_read_once.py."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint, step_folder, steps_of, write_checkpoint
from moce_ds.checkpoint.shared_read import SharedReader, resume
from moce_ds.common.errors import LOST_PEER, ArtefactError, DamagedError, OtherVersionError
from tests.examples.alone import ALONE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        write_checkpoint(step_folder(tmp_path, step), {"cls_token": torch.full((3,), float(step))}, {}, {"step": step})
    return tmp_path


def loaded(reader: SharedReader) -> float:
    return float(reader.load(WEIGHTS)["cls_token"][0])


def damage(run: Path, step: int) -> None:
    file = step_folder(run, step) / WEIGHTS / "shared.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")


def test_the_newest_intact_checkpoint_is_loaded(run: Path) -> None:
    damage(run, 2)
    checkpoint, value = resume(run, [1, 2], loaded, ALONE)
    assert (checkpoint.step, value, steps_of(run)) == (1, 1.0, [1])


@pytest.mark.parametrize("method", ["content", "open"])
def test_a_fault_that_may_pass_is_no_damage(run: Path, method: str) -> None:
    """Nothing is set aside, and the status is that of a command that is worth another try."""
    fault = ArtefactError("step-00000002: Stale file handle")
    fault.status = LOST_PEER
    with patch.object(Checkpoint, method, side_effect=fault), pytest.raises(ArtefactError, match="Stale") as caught:
        resume(run, [1, 2], loaded, ALONE)
    assert not isinstance(caught.value, DamagedError) and caught.value.status == LOST_PEER
    assert steps_of(run) == [1, 2]


def test_a_checkpoint_of_a_newer_version_is_no_damage(run: Path) -> None:
    """An older program that is run by mistake must not set the work of the newer one aside."""
    (step_folder(run, 2) / "manifest.json").write_text(json.dumps({"format": "moce_ds checkpoint 9"}))
    with pytest.raises(OtherVersionError, match=r"checkpoint 9'.* Use the version that wrote it"):
        resume(run, [1, 2], loaded, ALONE)
    assert steps_of(run) == [1, 2]
