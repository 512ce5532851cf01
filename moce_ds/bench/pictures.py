"""Images for measurements, the same on every machine: coloured shapes under noise, which JPEG compresses like a
photograph."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_SHAPES = 12
_NOISE = 9.0  # standard deviation; with it a picture of 500 x 375 pixels takes about 70 KB


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write `count` JPEG files of `size` (width, height) pixels into a new folder `folder`/0."""
    inside = folder / "0"
    inside.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        _picture(random, *size).save(inside / f"{number:05d}.jpg", quality=90)


def _picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), _colour(random))
    canvas = ImageDraw.Draw(image)
    for number in range(_SHAPES):
        (left, right), (top, bottom) = (sorted(random.integers(side, size=2).tolist()) for side in (width, height))
        draw = canvas.rectangle if number % 2 else canvas.ellipse
        draw((left, top, right, bottom), fill=_colour(random))
    noisy = np.asarray(image, dtype=np.float32) + random.normal(0, _NOISE, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.integers(256, size=3).tolist()
    return red, green, blue
