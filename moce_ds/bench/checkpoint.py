"""`moce bench checkpoint`: saving and loading a run's state beside the disk's own speed, and the pause of training.

The state is that of a dense MAE with AdamW in DeepSpeed's engine, three numbers of 4 bytes a parameter. The pause is
how long training stands still for a save that is written beside it; the delay is how much later its next update comes,
which on a machine without a GPU has to share the cores with the writing.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moce_ds.checkpoint.deepspeed_state import load_checkpoint
from moce_ds.checkpoint.format import Checkpoint, step_folder
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.storage.drafts import scratch_folder
from moce_ds.training.engine import parameter_groups, start_engine
from moce_ds.training.model import build_for_training
from moce_ds.training.settings import (
    DataSettings,
    ModelSettings,
    PretrainRunSettings,
    PretrainSettings,
    batch_arithmetic,
)

_BLOCK = 4 * 2**20  # bytes a write, as `dd bs=4M`


def bench_checkpoint(vit: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows (name, gigabytes, seconds, GB a second, ratio): of a raw write and read, a save, a load, and what training
    loses by a save.

    The ratio of writes and reads is their speed over the raw one; that of pause and delay their length over the save's.

    Args:
        vit: encoder by timm's name; `vit_base_patch16_224` with the default decoder makes 1.3 GB.
        folder: on the disk to measure; what is written there is removed again.
    """
    with scratch_folder(folder) as scratch, started() as runtime:
        config = PretrainSettings(
            model=ModelSettings(vit=vit),
            data=DataSettings(shards=scratch / "none"),
            run=PretrainRunSettings(out=scratch / "run", keep_checkpoints=1),
        )
        bench = _Rounds(config, runtime, scratch)
        with CheckpointManager(bench.engine, config.run, RunLease.claim(config.run.out, runtime), runtime) as saver:
            for turn in range(repeats + 1):  # the first warms up
                bench.round(saver, 2 * turn + 1)
    seconds, size = bench.medians(), bench.size
    raw = {"raw write": "raw write", "save": "raw write", "raw read": "raw read", "load": "raw read"}
    rows = [
        {"name": name, "GB": size / 1e9, "seconds": s, "GB/s": size / 1e9 / s, "ratio": seconds[raw[name]] / s}
        for name, s in seconds.items()
        if name in raw
    ]
    waits = [
        {"name": name, "GB": size / 1e9, "seconds": s, "GB/s": None, "ratio": s / seconds["save"]}
        for name, s in seconds.items()
        if name in ("pause", "delay")
    ]
    return [*rows, *waits]


class _Rounds:
    """An engine that has made one update, so that Adam has its moments, and the seconds of what was done to it."""

    def __init__(self, config: PretrainSettings, runtime: Runtime, scratch: Path) -> None:
        self._config, self._runtime, self._scratch = config, runtime, scratch
        model = build_for_training(config.model_spec, None, 1, config.run.seed)
        groups = parameter_groups(model, config.optim, 1.0)
        self.engine = start_engine(model, groups, config.optim, config.engine, batch_arithmetic(config, 1))
        size, device = model.shape.image_size, self.engine.device
        self._inputs = (
            torch.randn(1, 3, size, size, device=device),
            torch.rand(1, model.shape.num_patches, device=device),
        )
        self._to_update()
        self.engine.step()
        self._block = os.urandom(_BLOCK)
        self._seconds: dict[str, list[float]] = {}
        self.size = 0

    def round(self, saver: CheckpointManager, step: int) -> None:
        """A whole save, a load, a raw write and read, and a training step without and with a save on its way."""
        self._timed("save", lambda: self._save(saver, step))
        checkpoint, raw = Checkpoint.open(step_folder(self._config.run.out, step)), self._scratch / "raw"
        self.size = sum(record["bytes"] for record in checkpoint.manifest["files"].values())
        self._timed("raw write", lambda: _write(raw, self._block, self.size))
        self._timed("raw read", lambda: _read(raw))
        self._timed("load", lambda: load_checkpoint(self.engine, checkpoint, self._runtime))
        raw.unlink()
        self._timed("alone", self._to_update)
        self.engine.step()
        self._timed("start", lambda: saver.start(_manifest(step + 1)))
        self._timed("beside", self._to_update)
        self._timed("staging", saver.wait_for_staging)
        self.engine.step()
        saver.finish()

    def medians(self) -> dict[str, float]:
        """Of each part over the rounds but the first, and of the pause and the delay in each."""
        times = {name: np.array(found[1:]) for name, found in self._seconds.items()}
        times["pause"] = times["start"] + times["staging"]
        times["delay"] = times["pause"] + times["beside"] - times["alone"]
        return {name: float(np.median(found)) for name, found in times.items()}

    def _save(self, saver: CheckpointManager, step: int) -> None:
        saver.start(_manifest(step))
        saver.finish()

    def _to_update(self) -> None:
        self.engine.backward(self.engine(*self._inputs).loss)

    def _timed(self, name: str, run: Callable[[], object]) -> None:
        began = time.perf_counter()
        run()
        self._seconds.setdefault(name, []).append(time.perf_counter() - began)


def _manifest(step: int) -> dict[str, Any]:
    return {"step": step, "skipped": 0, "routing": None}


def _write(path: Path, block: bytes, size: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    buffer = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
