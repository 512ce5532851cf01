"""`moce bench checkpoint`: saving and loading the state of a run compared with the raw disk speed, and the pause in
training.

The state is that of a dense MAE with AdamW in DeepSpeed's engine: three numbers of 4 bytes per parameter. The pause is
the time for which training stops for an asynchronous save. The delay is how much later the next update follows; without
a GPU, training shares the cores with the writer.
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
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.build import ModelSpec
from moce_ds.models.settings import ModelSettings
from moce_ds.training.engine import parameter_groups, start_engine
from moce_ds.training.placed_model import build_for_training
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import EngineSettings, PretrainOptimSettings, PretrainRunSettings

_BLOCK = 4 * 2**20  # bytes per write


def bench_checkpoint(model: ModelSettings, folder: Path, repeats: int, runtime: Runtime) -> list[dict[str, Any]]:
    """Rows (name, gigabytes, seconds, GB per second, ratio) of a raw write and read, a save, a load, and the time lost
    in training.

    The ratio of writes and reads is their speed relative to the raw one; the ratio of pause and delay is their duration
    relative to the save.

    Args:
        model: sizes of a dense MAE; the default makes 1.3 GB.
        folder: on the disk to measure; everything written there is removed again.
    """
    with scratch_folder(folder) as scratch:
        run = PretrainRunSettings(out=scratch / "run", keep_checkpoints=1)
        bench = _Rounds(_dense_spec(model), run.out, runtime)
        with CheckpointManager(bench.engine, run, RunLease.claim(run.out, runtime), runtime) as saver:
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


def _dense_spec(model: ModelSettings) -> ModelSpec:
    shape = model.vit_shape(None)
    return ModelSpec(shape, model.decoder, model.mask_ratio, ImageInput(shape.image_size), None)


class _Rounds:
    """An engine after one update, so that Adam's moments exist, and the measured times."""

    def __init__(self, spec: ModelSpec, run: Path, runtime: Runtime) -> None:
        self._run, self._runtime, optim = run, runtime, PretrainOptimSettings()
        model = build_for_training(spec, None, 1, 0)
        groups = parameter_groups(model, optim, 1.0)
        self.engine = start_engine(model, groups, optim, EngineSettings(), batch_arithmetic(optim, 1))
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
        """One save, one load, one raw write and read, and a training step without and with a save in progress."""
        self._timed("save", lambda: self._save(saver, step))
        checkpoint, raw = Checkpoint.open(step_folder(self._run, step)), self._run.with_name("raw")
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
        """Medians over all rounds but the first, including pause and delay."""
        times = {name: np.array(values[1:]) for name, values in self._seconds.items()}
        times["pause"] = times["start"] + times["staging"]
        times["delay"] = times["pause"] + times["beside"] - times["alone"]
        return {name: float(np.median(values)) for name, values in times.items()}

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
        file.write(block[: size % len(block)])
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    buffer = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
