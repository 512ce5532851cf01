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

from moce_ds.bench.training_step import TrainingStep
from moce_ds.checkpoint.deepspeed_state import load_checkpoint
from moce_ds.checkpoint.format import step_folder
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.shared_read import SharedReader
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime
from moce_ds.forecast.step_cost import Work
from moce_ds.models.build import ModelSpec
from moce_ds.models.settings import ExpertSettings, ModelGroups, ModelSettings, SdrSettings, TokenMoeSettings
from moce_ds.moe.placement import default_placement
from moce_ds.training.placed_model import expert_layers, place_experts
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
        step = training_step(model, ExpertSettings(), runtime)
        bench = CheckpointRounds(step, run.out, runtime)
        with CheckpointManager(step.engine, run, RunLease.claim(run.out, runtime), runtime) as saver:
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


def training_step(model: ModelSettings, experts: ExpertSettings, runtime: Runtime) -> TrainingStep:
    """A step with one image in each process, of a model whose experts, if any, lie in the default places."""
    shape = model.vit_shape(None)
    groups = ModelGroups(model, experts, TokenMoeSettings(), SdrSettings(), shape)
    spec = ModelSpec(shape, model.decoder, model.mask_ratio, ImageInput(shape.image_size), groups.expert_shape(0))
    optim = PretrainOptimSettings(batch_size=runtime.world_size)
    work = Work(spec, experts.ep_size, optim, EngineSettings(), teacher=False)
    step = TrainingStep(work, experts, groups.loss_weights, runtime)
    layers = expert_layers(step.engine.module)
    place_experts(step.engine.module, default_placement(len(layers), experts.num), runtime.rank)
    return step


class CheckpointRounds:
    """Measured saves and loads of an engine after one update, so that Adam's moments exist.

    Attributes:
        size: bytes of the checkpoint.
        read: bytes that this process read for the last load.
    """

    def __init__(self, step: TrainingStep, run: Path, runtime: Runtime) -> None:
        self._step, self._run, self._runtime = step, run, runtime
        self._step()
        self._block = os.urandom(_BLOCK)
        self._seconds: dict[str, list[float]] = {}
        self.size = self.read = 0

    def round(self, saver: CheckpointManager, step: int) -> None:
        """One save, one load, one raw write and read, and a training step without and with a save in progress.

        A collective; the first process alone writes and reads the raw file.
        """
        self._timed("save", lambda: self.save(saver, step))
        reader, raw = SharedReader.open(step_folder(self._run, step), self._runtime), self._run.with_name("raw")
        sizes = {name: record["bytes"] for name, record in reader.checkpoint.manifest["files"].items()}
        self.size = sum(sizes.values())
        self._timed("raw write", lambda: _write(raw, self._block, self.size), alone=True)
        self._timed("raw read", lambda: _read(raw), alone=True)
        self._timed("load", lambda: self._load(reader))
        self.read = sum(sizes[name] for name in reader.files_read)
        if self._runtime.is_main:
            raw.unlink()
        self._timed("alone", self._step.to_update)
        self._step.engine.step()
        self._timed("start", lambda: saver.start(_manifest(step + 1)))
        self._timed("beside", self._step.to_update)
        self._timed("staging", saver.wait_for_staging)
        self._step.engine.step()
        saver.finish()

    def medians(self) -> dict[str, float]:
        """Medians over all rounds but the first, including pause and delay, of the slowest process; a collective."""
        times = {name: np.array(values[1:]) for name, values in self._seconds.items()}
        times["pause"] = times["start"] + times["staging"]
        times["delay"] = times["pause"] + times["beside"] - times["alone"]
        slowest = self._runtime.max([float(np.median(values)) for values in times.values()])
        return dict(zip(times, slowest, strict=True))

    def save(self, saver: CheckpointManager, step: int) -> None:
        """One save from beginning to end; a collective."""
        saver.start(_manifest(step))
        saver.finish()

    def _load(self, reader: SharedReader) -> None:
        with reader.whole():
            load_checkpoint(self._step.engine, reader)

    def _timed(self, name: str, run: Callable[[], object], alone: bool = False) -> None:
        self._runtime.barrier()
        began = time.perf_counter()
        if self._runtime.is_main or not alone:
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
