"""`moce bench peers`: images per second of `moce pretrain`, dense and MoCE, compared with a plain PyTorch loop.

Every turn is a whole program in a new process: reading, decoding, steps, logging. The programs take turns, so that
other load on the machine affects them alike. Speeds are read from the TensorBoard files that each program writes
itself; its start and its first steps do not count.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moce_ds.bench.pictures import write_pictures
from moce_ds.bench.plain_mae import PlainRun
from moce_ds.clustering.build import build_clusters
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.common.config.settings import from_tree, word
from moce_ds.common.errors import DataError, MoceError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.image_folder import list_files
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime, lone_device
from moce_ds.encoders.features import write_features
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.models.settings import ModelSettings
from moce_ds.models.shapes import ViTShape
from moce_ds.models.vit import load_encoder, save_encoder, timm_vit
from moce_ds.training.loggers import LOSS_TAG

_CLUSTERS = 32
_BESIDE = ViTShape(32, 16, 32, 1, 2)  # the random encoder that clusters the images: its size does not matter
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class PeerSize:
    """One comparison.

    Attributes:
        model: settings of the group `model`; experts: of the group `experts`.
        picture: width and height of the image files, pixels.
        images: number of files.
        crop_scale: area of a random crop.
        warmup, steps: steps of a turn before the clock starts, and after it.
        log_every: steps between records of `moce pretrain`; divides `warmup` and `steps`.
    """

    name: str
    model: Mapping[str, Any]
    experts: Mapping[str, Any]
    image_size: int
    picture: tuple[int, int]
    images: int
    crop_scale: tuple[float, float]
    flip: bool
    batch: int
    warmup: int
    steps: int
    log_every: int

    @property
    def all_steps(self) -> int:
        """Steps of a turn."""
        return self.warmup + self.steps


_DEMO_MODEL = {
    "patch_size": 4, "width": 96, "depth": 6, "heads": 3, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
DEMO = PeerSize(
    name="demo, 32 px",
    model=_DEMO_MODEL,
    experts={"num": 4, "layers": [3, 5]},
    image_size=32,
    picture=(64, 64),
    images=2048,
    crop_scale=(0.5, 1.0),
    flip=False,
    batch=128,
    warmup=10,
    steps=40,
    log_every=10,
)
VIT_SMALL = PeerSize(
    name="ViT-S/16, 224 px",
    model={"vit": "vit_small_patch16_224"},
    experts={"num": 8},
    image_size=224,
    picture=(500, 375),
    images=64,
    crop_scale=(0.2, 1.0),
    flip=True,
    batch=16,
    warmup=1,
    steps=3,
    log_every=1,
)
SIZES = {"demo": DEMO, "vit-small": VIT_SMALL}


@dataclass(frozen=True)
class _Program:
    """A program that trains: its command, and the folder of its TensorBoard files."""

    command: list[str]
    log: Path


def bench_peers(sizes: Sequence[PeerSize], images: Path | None, workers: int, repeats: int) -> list[dict[str, Any]]:
    """Rows (size, name, B, images per second with those of all turns, ratio to the plain loop with those of all turns).

    Args:
        images: a folder of images to use; None: made ones.
        workers: processes of the DataLoader, and decoding threads of ours.
        repeats: turns of every program.

    Raises:
        DataError: there are no images in `images`.
        MoceError: a program ended with an error.
    """
    rows = []
    for size in sizes:
        with scratch_folder() as scratch:
            rows += _compared(size, _inputs(size, images, scratch), workers, repeats)
    return rows


def _compared(size: PeerSize, inputs: Path, workers: int, repeats: int) -> list[dict[str, Any]]:
    makers: dict[str, Callable[[Path], _Program]] = {
        "plain PyTorch": lambda turn: _plain(size, inputs, turn, workers),
        "moce pretrain, dense": lambda turn: _ours(size, inputs, turn, workers, {}),
        "moce pretrain, MoCE": lambda turn: _ours(
            size, inputs, turn, workers, {"model.arch": "moce", "experts.clusters": inputs / "clusters"}
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in makers}
    turns = [(number, name) for number in range(repeats) for name in makers]
    for number, name in progress_bar(turns, desc=f"measuring {size.name}", leave=False, delay=2):
        folder = inputs / f"turn {number} {name}"
        folder.mkdir()
        rates[name].append(_images_per_second(makers[name](folder), size))
    base = rates["plain PyTorch"]
    return [_row(size, name, measured, base) for name, measured in rates.items()]


def _row(size: PeerSize, name: str, rates: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    ratios = [rate / plain for rate, plain in zip(rates, base, strict=True)]
    return {
        "size": size.name,
        "name": name,
        "B": size.batch,
        "images_per_second": statistics.median(rates),
        "rates": list(rates),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "load": os.getloadavg()[0],
    }


def _images_per_second(program: _Program, size: PeerSize) -> float:
    """Run a program to its end; its speed between the step `warmup` and the last one, by its own records."""
    done = subprocess.run(program.command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise MoceError(f"{' '.join(program.command[:4])} ... ended with status {done.returncode}:\n{last}")
    record = EventAccumulator(str(program.log), size_guidance={"scalars": 0})
    record.Reload()
    at = {event.step: event.wall_time for event in record.Scalars(LOSS_TAG)}
    return size.steps * size.batch / (at[size.all_steps] - at[size.warmup])


def _plain(size: PeerSize, inputs: Path, turn: Path, workers: int) -> _Program:
    model = from_tree(ModelSettings, dict(size.model), "bench peers")
    run = PlainRun(
        images=str(inputs / "images"),
        log=str(turn / "log"),
        steps=size.all_steps,
        batch_size=size.batch,
        workers=workers,
        crop_scale=size.crop_scale,
        flip=size.flip,
        shape=model.vit_shape(size.image_size),
        decoder=model.decoder,
    )
    run.write(turn / "plain.json")
    return _Program([sys.executable, "-m", "moce_ds.bench.plain_mae", str(turn / "plain.json")], turn / "log")


def _ours(size: PeerSize, inputs: Path, turn: Path, workers: int, further: Mapping[str, Any]) -> _Program:
    count = ShardSet.open(inputs / "shards").count
    values = {
        **{f"model.{key}": value for key, value in size.model.items()},
        **{f"experts.{key}": value for key, value in size.experts.items()},
        "data.shards": inputs / "shards",
        "data.image_size": size.image_size,
        "data.crop_scale": list(size.crop_scale),
        "data.flip": size.flip,
        "data.threads": workers,
        "optim.epochs": (size.all_steps - 0.5) * size.batch / count,  # the number of steps is rounded up
        "optim.batch_size": size.batch,
        "engine.precision": "bf16" if torch.cuda.is_available() else "fp32",
        "run.out": turn / "run",
        "run.log_every": size.log_every,
        **further,
    }
    words = [word(key, value) for key, value in values.items()]
    return _Program([sys.executable, "-m", "moce_ds", "pretrain", *words], turn / "run" / "tensorboard")


def _inputs(size: PeerSize, images: Path | None, scratch: Path) -> Path:
    """A folder with `images`, the `shards` of them, and `clusters` of these by a random encoder."""
    inputs = scratch / "inputs"
    if images is None:
        write_pictures(inputs / "images", size.images, size.picture)
    else:
        _link(images, inputs / "images" / "0", size.images)
    write_shards(inputs / "images", inputs / "shards", ShardSettings())
    encoder, features = inputs / "encoder", inputs / "features"
    encoder.mkdir()
    torch.manual_seed(0)
    save_encoder(encoder, timm_vit(_BESIDE).state_dict(), _BESIDE, ImageInput(_BESIDE.image_size), {})
    device = lone_device()
    write_features(
        load_encoder(encoder, device),
        ShardSet.open(inputs / "shards"),
        features,
        FeatureSettings(),
        Runtime.alone(device),
    )
    build_clusters(features, inputs / "clusters", ClusterSettings(method="kmeans", num_clusters=_CLUSTERS))
    return inputs


def _link(images: Path, folder: Path, count: int) -> None:
    """Link the first `count` image files below `images` into a new folder."""
    files = (file.path for file in list_files(images) if file.path.lower().endswith(_SUFFIXES))
    chosen = [path for path, _ in zip(files, range(count), strict=False)]
    if not chosen:
        raise DataError(f"--images: {images} holds no image file ({', '.join(_SUFFIXES)}).")
    folder.mkdir(parents=True)
    for number, path in enumerate(chosen):
        (folder / f"{number:05d}{Path(path).suffix}").symlink_to((images / path).resolve())
