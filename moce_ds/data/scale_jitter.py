"""Images and their masks on a square canvas of fixed size, as a function of (seed, epoch, image id).

Training sees an image at a random scale, cropped if it is larger than the canvas, padded if it is smaller, and possibly
mirrored (large-scale jitter; Ghiasi et al., 2021). Image and masks go through the same `View`.

Axes: C channels, H x W pixels of the canvas.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moce_ds.distributed.randomness import CROP, FLIP, uniform

Fit = Literal["longer", "shorter"]
"""The side of an image that equals the side of the canvas at scale 1."""


@dataclass(frozen=True)
class View:
    """The part `box` (x1, y1, x2, y2, pixels of the image), drawn as `width` x `height` pixels at the top left corner
    of the canvas, possibly mirrored."""

    box: tuple[float, float, float, float]
    width: int
    height: int
    mirror: bool = False


@dataclass(frozen=True)
class Jitter:
    """Random views: uniform scale in `scale`, uniform crop position, and mirroring with probability 1/2.

    Attributes:
        side: of the canvas, pixels.
        scale: range of the size relative to the size that fits (see `Fit`).
    """

    side: int
    scale: tuple[float, float]
    fit: Fit
    seed: int
    flip: bool = True

    def view(self, size: tuple[int, int], epoch: int, image: int) -> View:
        """The view of image number `image`, of `size` (width, height), in an epoch."""
        scale, left, top = (float(uniform(CROP, self.seed, epoch, image, what)[()]) for what in range(3))
        factor = (self.scale[0] + scale * (self.scale[1] - self.scale[0])) * self.side
        factor /= max(size) if self.fit == "longer" else min(size)
        scaled = [max(1, round(length * factor)) for length in size]
        width, height = (min(self.side, length) for length in scaled)
        x, y = left * (scaled[0] - width), top * (scaled[1] - height)
        across, down = size[0] / scaled[0], size[1] / scaled[1]
        box = (x * across, y * down, min(size[0], (x + width) * across), min(size[1], (y + height) * down))
        return View(box, width, height, self.flip and bool(uniform(FLIP, self.seed, epoch, image)[()] < 0.5))


def draw_image(image: Image.Image, view: View, side: int, mean: tuple[float, float, float]) -> Tensor:
    """An RGB image on a canvas padded with the colour `mean`: [3, H, W] float32 in [0, 1]."""
    resized = image.resize((view.width, view.height), Image.Resampling.BILINEAR, view.box)
    pixels_HWC = torch.from_numpy(np.array(resized)).float() / 255
    canvas_CHW = torch.tensor(mean)[:, None, None].repeat(1, side, side)
    canvas_CHW[:, : view.height, : view.width] = _mirrored(pixels_HWC.permute(2, 0, 1), view)
    return canvas_CHW


def draw_mask(mask_HW: NDArray[np.uint8], view: View, side: int, fill: int) -> Tensor:
    """A mask of the image's size on a canvas padded with `fill`: [H, W] uint8, with nearest-neighbour values."""
    resized = Image.fromarray(mask_HW).resize((view.width, view.height), Image.Resampling.NEAREST, view.box)
    canvas_HW = torch.full((side, side), fill, dtype=torch.uint8)
    canvas_HW[: view.height, : view.width] = _mirrored(torch.from_numpy(np.array(resized)), view)
    return canvas_HW


def _mirrored(pixels: Tensor, view: View) -> Tensor:
    return pixels.flip(-1) if view.mirror else pixels
