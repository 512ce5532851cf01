"""Loading: our loader compared with DALI's own reader of files, a PyTorch DataLoader, and PIL in one process.

All read the same JPEG files, and return normalised random crops of 224 px in batches on the device.
"""

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moce_ds.bench.timing import interleaved
from moce_ds.common.compat import repair_torchvision
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import ReadList, SequentialSampler
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop

# Width and height of a typical ImageNet file, and of one that is decoded at once.
PHOTO, _SMALL = (500, 375), (100, 75)
_INPUT, _SMALL_INPUT = ImageInput(224), ImageInput(32)
_BATCH = 64
_SCALE, _RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
# Seconds of a step and of a slow read; images of a step; number of steps.
_STEP, _DELAY = 0.4, 0.005
_STEP_IMAGES, _STEPS = 256, 10
_BASE = "PIL + torchvision"


def bench_load(images: int, threads: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows (name, images, threads, seconds, images_per_second, ratio to PIL + torchvision in one thread, wait_ms).

    `threads` decode, or as many worker processes. `wait_ms` of our loader: milliseconds that a step of 0.4 s waits for
    256 small images, if every read of a file takes 5 ms longer.
    """
    with scratch_folder() as scratch:
        shards = write_photos(scratch / "photos", images, PHOTO)
        files = sorted((scratch / "photos").iterdir())
        photos = _Photos([file.read_bytes() for file in files])
        workers = DataLoader(
            _Photos(files), _BATCH, num_workers=threads, persistent_workers=True, pin_memory=device.type == "cuda"
        )
        cases: dict[str, Callable[[], object]] = {  # the worker processes start before DALI's threads
            _BASE: lambda: _take_all(photos[number] for number in range(images)),
            "PyTorch DataLoader": lambda: _take_all(batch.to(device, non_blocking=True) for batch in workers),
            "DALI's file reader": lambda: _read_with_dali(files, threads, device),
            "moce_ds": lambda: _take_all(sequential_loader(shards, _INPUT, _BATCH, threads, device)),
        }
        seconds = interleaved(cases, repeats, warmup=1)
        wait_ms = _wait_ms(write_photos(scratch / "small", _STEP_IMAGES, _SMALL), threads, device)
    return [
        {
            "name": name,
            "images": images,
            "threads": 1 if name == _BASE else threads,
            "seconds": s,
            "images_per_second": images / s,
            "ratio": s / seconds[_BASE],
            "wait_ms": wait_ms if name == "moce_ds" else None,
        }
        for name, s in seconds.items()
    ]


def _take_all(items: Iterable[object]) -> None:
    for _ in items:
        pass


def sequential_loader(
    shards: ShardSet, input: ImageInput, batch_size: int, threads: int, device: torch.device, passes: int = 1
) -> Loader:
    """Every image once in each pass, in order."""
    sampler = SequentialSampler(0, shards.count, batch_size)

    def read_list(index: int) -> ReadList:
        return sampler.batch(index % sampler.num_batches)

    return Loader(
        shards,
        read_list,
        RandomCrop(0, _SCALE),
        input,
        first=0,
        last=passes * sampler.num_batches,
        batch_size=batch_size,
        threads=threads,
        device=device,
    )


@dataclass(frozen=True, eq=False)
class _SlowShards(ShardSet):
    """A shard set on a storage that takes long to answer."""

    def read(self, image_id: int) -> bytes:
        """The stored bytes, later."""
        time.sleep(_DELAY)
        return super().read(image_id)


def _wait_ms(shards: ShardSet, threads: int, device: torch.device) -> float:
    """Median milliseconds that training waits for a batch from slow storage, if a step takes `_STEP` seconds."""
    slow = _SlowShards.open(shards.path)
    batches = iter(sequential_loader(slow, _SMALL_INPUT, _STEP_IMAGES, threads, device, passes=_STEPS + 1))
    next(batches)
    waits = []
    for _ in range(_STEPS):
        time.sleep(_STEP)  # the device computes
        began = time.perf_counter()
        next(batches)
        waits.append(1000 * (time.perf_counter() - began))
    return median(waits)


class _Photos(Dataset[Tensor]):
    """Images as torchvision's transforms prepare them, from files or from their bytes."""

    def __init__(self, files: list[Path] | list[bytes]) -> None:
        self._files = files

    @cached_property
    def _steps(self) -> Callable[[Image.Image], Tensor]:
        """Made where it is first used: a worker process must repair torchvision before it unpickles any of it."""
        repair_torchvision()
        from torchvision import transforms

        steps: Callable[[Image.Image], Tensor] = transforms.Compose([
            transforms.RandomResizedCrop(_INPUT.size, _SCALE, _RATIO, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_INPUT.mean, _INPUT.std),
        ])  # fmt: skip
        return steps

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Tensor:
        file = self._files[number]
        image = Image.open(file if isinstance(file, Path) else io.BytesIO(file))
        return self._steps(image.convert("RGB"))


@pipeline_def(enable_conditionals=False)
def _file_pipeline(files: list[str], on_gpu: bool) -> Any:
    encoded, _ = fn.readers.file(files=files)
    images = fn.decoders.image_random_crop(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        random_area=list(_SCALE),
        random_aspect_ratio=list(_RATIO),
    )
    images = fn.resize(images, size=[_INPUT.size] * 2, interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * m for m in _INPUT.mean],
        std=[255 * s for s in _INPUT.std],
    )


def _read_with_dali(files: list[Path], threads: int, device: torch.device) -> None:
    """Read the files once with a new pipeline; no batch after the last one is begun."""
    batches = -(-len(files) // _BATCH)
    ahead = min(2, batches)
    on_gpu = device.type == "cuda"
    pipeline = _file_pipeline(
        [str(file) for file in files],
        on_gpu,
        batch_size=_BATCH,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=ahead,
    )
    pipeline.schedule_run()
    for index in range(batches):
        (images,) = pipeline.share_outputs()
        torch.from_dlpack(images.as_tensor())
        pipeline.release_outputs()
        if index + ahead < batches:
            pipeline.schedule_run()


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> ShardSet:
    """JPEG files, and a shard set of them: windows of this width and height of scikit-learn's two photographs."""
    folder.mkdir()
    photographs = load_sample_images().images
    random = np.random.default_rng(0)
    for number in range(count):
        photo = Image.fromarray(photographs[number % len(photographs)])
        left, top = (int(random.integers(0, photo.size[k] - size[k] + 1)) for k in (0, 1))
        crop = photo.crop((left, top, left + size[0], top + size[1]))
        crop.save(folder / f"{number:05d}.jpg", quality=90)
    shards = folder.with_name(f"{folder.name}-shards")
    write_shards(folder, shards, ShardSettings())
    return ShardSet.open(shards)
