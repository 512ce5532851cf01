"""Several runs of `moce finetune` one after the other in one world."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jobs import interrupted
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import MoceError
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.listing import Listed, Listing
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.models.vit import ViTShape, save_encoder, timm_vit
from moce_ds.tuning.classification import Classification, finetune
from moce_ds.tuning.settings import FinetuneSettings

CLASSES = 4
SHOWN: list[tuple[str, ...]] = [("even",), (), ("even", "large"), ("large",)]
"""What a digit shows where classes are shared."""

COUNTS = {"train": 240, "val": 40, "test": 120}


@dataclass(frozen=True)
class Tune:
    """One call.

    Attributes:
        words: its settings.
        stop_after: the step after whose record the last rank gets a SIGINT.
        not_finite: the steps (from 1) at which the last rank's loss is not a number.
        before: what rank 0 does first.
    """

    words: list[str]
    stop_after: int | None = None
    not_finite: tuple[int, ...] = ()
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Tuned:
    """What a call returned, printed, and the error that it ended with, "Class: message"."""

    record: dict[str, Any] | None
    text: str
    error: str = ""


def write_task(root: Path) -> Path:
    """Handwritten digits of four classes as shards `train`, `val`, `test`, and an untrained `encoder`; the same as
    `several-train` and `several-test` with classes that they share."""
    digits, first = load_digits(n_class=CLASSES), 0
    for split, count in COUNTS.items():
        for number in range(first, first + count):
            path = root / "images" / split / str(digits.target[number]) / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).resize((16, 16)).save(path)
        write_shards(root / "images" / split, root / split, ShardSettings(workers=1))
        images = [
            Listed(source, SHOWN[int(source[0])]) for source in map(ShardSet.open(root / split).source, range(count))
        ]
        several = Listing(images, ["even", "large"], multi_label=True)
        write_shards(root / "images" / split, root / f"several-{split}", ShardSettings(workers=1), several)
        first += count
    torch.manual_seed(0)
    shape = ViTShape(image_size=16, patch_size=4, width=32, depth=2, heads=2)
    (root / "encoder").mkdir()
    save_encoder(root / "encoder", timm_vit(shape).state_dict(), shape, ImageInput(16, center_crop=1.0), {})
    return root


def run_tunings(jobs: dict[str, Tune]) -> dict[str, Tuned]:
    """One job after the other in this rank."""
    with started() as runtime:
        return {name: _run(job, runtime) for name, job in jobs.items()}


def _run(job: Tune, runtime: Runtime) -> Tuned:
    config = read_settings(FinetuneSettings, job.words)
    if job.before is not None and runtime.is_main:
        job.before()
    runtime.barrier()
    last = runtime.rank == runtime.world_size - 1
    acts = job.stop_after if last else None
    with (
        redirect_stderr(io.StringIO()) as text,
        interrupted(config.run.out, acts),
        _faulty(job.not_finite if last else (), config.optim.accumulation),
    ):
        try:
            return Tuned(finetune(config, runtime), text.getvalue())
        except MoceError as error:
            return Tuned(None, text.getvalue(), f"{type(error).__name__}: {error}")


@contextmanager
def _faulty(steps: tuple[int, ...], accumulation: int) -> Iterator[None]:
    """Let the loss go wrong in some steps of this process."""
    right, calls = Classification.loss, 0

    def wrong(self: Classification, model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return right(self, model, batch) * (float("nan") if -(-calls // accumulation) in steps else 1.0)

    with patch.object(Classification, "loss", wrong):
        yield
