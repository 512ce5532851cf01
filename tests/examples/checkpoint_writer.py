"""Processes that write checkpoints, to be killed by `test_kill_while_saving.py`.

A module of its own, light to import: more than a hundred of these processes are started.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from moce_ds.checkpoint.format import (
    OPTIMIZER,
    WEIGHTS,
    find,
    grouped,
    prune,
    publish,
    step_folder,
    steps_of,
    write_files,
)

KEEP = 2
_TOUCHES_FILES = ("open", "os.", "shutil.")


def weights_of(step: int) -> dict[str, torch.Tensor]:
    """Weights that tell which step they are from; some hundred kB a file, so that a kill can fall inside of one."""
    names = ["cls_token", "blocks.0.mlp.fc1.weight", *(f"blocks.1.mlp.experts.{e}.fc1.weight" for e in range(2))]
    return {name: torch.full((256, 256), float(step)) for name in names}


def write_draft(run: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """All files of a checkpoint, and what its manifest says."""
    draft = run / "attempts" / f"{os.getpid()}-{step}"
    draft.mkdir(parents=True)
    moments = {f"{name}.exp_avg": weight for name, weight in weights_of(step).items()}
    files = write_files(draft, (grouped(WEIGHTS, weights_of(step)) | grouped(OPTIMIZER, moments)).items())
    return draft, {"step": step, "files": files}


def write_on(run: Path, reports: Connection) -> None:
    """Go on after the newest checkpoint, for ever; tells each step that it has published, 0 when it begins."""
    step = find(run).step if steps_of(run) else 0
    reports.send_bytes(b"0")
    while True:
        step += 1
        draft, manifest = write_draft(run, step)
        publish(draft, step_folder(run, step), manifest)
        reports.send_bytes(str(step).encode())
        prune(run, KEEP)


def publish_until(run: Path, dies_before: int, reports: Connection) -> None:
    """Publish one more checkpoint, but be killed where the file system is touched for that many-th time."""
    step = find(run).step + 1 if steps_of(run) else 1
    draft, manifest = write_draft(run, step)
    touched = 0

    def die(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touched
        touched += event.startswith(_TOUCHES_FILES)
        if touched == dies_before:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    publish(draft, step_folder(run, step), manifest)
    reports.send_bytes(str(step).encode())
    prune(run, KEEP)
