"""`moce bench checkpoint`: saving and loading a run's state beside the disk's own speed, and the pause of training.

The state is that of a dense MAE with AdamW in DeepSpeed's engine, three numbers of 4 bytes a parameter.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from moce_ds.checkpoint_files import Checkpoint, step_folder
from moce_ds.runtime import started
from moce_ds.training.attempt import Attempt
from moce_ds.training.checkpoint import load_checkpoint
from moce_ds.training.engine import start_engine
from moce_ds.training.saver import Saver
from moce_ds.training.settings import DataSettings, ModelSettings, PretrainSettings, RunSettings, batch_arithmetic
from moce_ds.training.setup import build_for_training

_BLOCK = 4 * 2**20  # bytes a write, as `dd bs=4M`


def bench_checkpoint(vit: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows (name, gigabytes, seconds, GB a second, ratio): of a raw write and read, a save, its pause, and a load.

    The ratio of writes and reads is their speed over the raw one; that of the pause its length over the whole save.

    Args:
        vit: encoder by timm's name; `vit_base_patch16_224` with the default decoder makes 1.3 GB.
        folder: on the disk to measure; what is written there is removed again.
    """
    scratch = Path(tempfile.mkdtemp(prefix=".moce-bench-", dir=folder))
    try:
        with started() as runtime:
            config = PretrainSettings(
                model=ModelSettings(vit=vit),
                data=DataSettings(shards=scratch / "none"),
                run=RunSettings(out=scratch / "run", keep_checkpoints=1),
            )
            engine = _stepped_engine(config)
            with Saver(engine, config.run, Attempt.claim(config.run.out, runtime), runtime) as saver:
                seconds, size = _rounds(saver, scratch, repeats, lambda c: load_checkpoint(engine, c, runtime))
    finally:
        shutil.rmtree(scratch)
    raw = {"raw write": "raw write", "save": "raw write", "raw read": "raw read", "load": "raw read"}
    rows = [
        {"name": name, "GB": size / 1e9, "seconds": s, "GB/s": size / 1e9 / s, "ratio": seconds[raw[name]] / s}
        for name, s in seconds.items()
        if name in raw
    ]
    pause = seconds["pause"]
    return [
        *rows,
        {"name": "pause", "GB": size / 1e9, "seconds": pause, "GB/s": None, "ratio": pause / seconds["save"]},
    ]


def _stepped_engine(config: PretrainSettings) -> DeepSpeedEngine:
    """An engine that has made one update, so that Adam has its moments."""
    model = build_for_training(config, None)
    engine = start_engine(model, config, batch_arithmetic(config, 1))
    size = model.shape.image_size
    images_BCHW = torch.randn(1, 3, size, size, device=engine.device)
    engine.backward(engine(images_BCHW, torch.rand(1, model.shape.num_patches, device=engine.device)).loss)
    engine.step()
    return engine


def _rounds(
    saver: Saver, scratch: Path, repeats: int, load: Callable[[Checkpoint], None]
) -> tuple[dict[str, float], int]:
    """Median seconds of each part, taken in turn after a round that warms up, and the bytes of a checkpoint."""
    seconds: dict[str, list[float]] = {}
    block, raw, size = os.urandom(_BLOCK), scratch / "raw", 0

    def timed(name: str, run: Callable[..., object], *given: object) -> None:
        began = time.perf_counter()
        run(*given)
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    for step in range(1, repeats + 2):
        began = time.perf_counter()
        timed("pause", saver.start, {"step": step, "skipped": 0, "routing": None})
        saver.finish()
        seconds.setdefault("save", []).append(time.perf_counter() - began)
        checkpoint = Checkpoint.open(step_folder(scratch / "run", step))
        size = sum(record["bytes"] for record in checkpoint.manifest["files"].values())
        timed("raw write", _write, raw, block, size)
        timed("raw read", _read, raw)
        timed("load", load, checkpoint)
        raw.unlink()
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, size


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
