"""A process that writes checkpoint after checkpoint, to be killed by `test_kill_while_saving.py`.

A module of its own, light to import: a hundred of these processes are started.
"""

import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from moce_ds.checkpoint_files import (
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


def weights_of(step: int) -> dict[str, torch.Tensor]:
    """Weights that tell which step they are from; some hundred kB a file, so that a kill can fall inside of one."""
    names = ["cls_token", "blocks.0.mlp.fc1.weight", *(f"blocks.1.mlp.experts.{e}.fc1.weight" for e in range(2))]
    return {name: torch.full((256, 256), float(step)) for name in names}


def write_on(run: Path, reports: Connection) -> None:
    """Go on after the newest checkpoint, for ever; tells each step that it has published, 0 when it begins."""
    step = find(run).step if steps_of(run) else 0
    reports.send_bytes(b"0")
    while True:
        step += 1
        draft = run / "attempts" / f"{os.getpid()}-{step}"
        draft.mkdir(parents=True)
        moments = {f"{name}.exp_avg": weight for name, weight in weights_of(step).items()}
        files = write_files(draft, grouped(WEIGHTS, weights_of(step)) | grouped(OPTIMIZER, moments))
        publish(draft, step_folder(run, step), {"step": step, "files": files})
        reports.send_bytes(str(step).encode())
        prune(run, KEEP)
