"""Loading: the DALI pipeline compared with PIL and torchvision on the same files, from decoding to normalised 224 px
crops."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from moce_ds.bench.timing import interleaved
from moce_ds.compat import repair_torchvision
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import SequentialSampler
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop
from moce_ds.storage.drafts import scratch_folder

_PHOTO = (500, 375)  # width and height of a typical ImageNet file


def bench_load(images: int, threads: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows (name, images, threads, seconds, images_per_second, ratio to PIL + torchvision in one thread)."""
    repair_torchvision()
    from torchvision import transforms

    input = ImageInput(224)
    steps = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(input.mean, input.std),
    ])  # fmt: skip
    with scratch_folder() as scratch:
        _write_photos(scratch / "photos", images)
        write_shards(scratch / "photos", scratch / "shards", ShardSettings())
        shards = ShardSet.open(scratch / "shards")
        sampler = SequentialSampler(0, shards.count, 64)

        def with_pil() -> None:
            """Read every image once, in sequence."""
            for image_id in range(shards.count):
                steps(Image.open(io.BytesIO(shards.read(image_id))).convert("RGB"))

        def with_dali() -> None:
            """Read every image once, in batches. Each round builds a new pipeline, so that no image is read ahead."""
            last = sampler.num_batches
            loader = Loader(
                shards,
                sampler.batch,
                RandomCrop(0),
                input,
                first=0,
                last=last,
                batch_size=64,
                threads=threads,
                device=device,
            )
            for _ in loader:
                pass

        seconds = interleaved({"PIL + torchvision": with_pil, "DALI": with_dali}, repeats, warmup=1)
    base = seconds["PIL + torchvision"]
    return [
        {
            "name": name,
            "images": images,
            "threads": threads if name == "DALI" else 1,
            "seconds": s,
            "images_per_second": images / s,
            "ratio": s / base,
        }
        for name, s in seconds.items()
    ]


def _write_photos(folder: Path, count: int) -> None:
    """JPEG files of a typical size: windows of scikit-learn's two photographs."""
    folder.mkdir()
    photographs = load_sample_images().images
    random = np.random.default_rng(0)
    for number in range(count):
        photo = Image.fromarray(photographs[number % len(photographs)])
        left, top = (int(random.integers(0, photo.size[k] - _PHOTO[k] + 1)) for k in (0, 1))
        crop = photo.crop((left, top, left + _PHOTO[0], top + _PHOTO[1]))
        crop.save(folder / f"{number:05d}.jpg", quality=90)
