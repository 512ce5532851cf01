"""timm's augmentations, with random numbers that depend only on the seed, the epoch and the image (or pair of images).

Axes: B images, C channels, H, W pixels, K classes.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moce_ds.common.compat import repair_torchvision
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.randomness import AUGMENT, hashed
from moce_ds.tuning.settings import AugmentSettings

repair_torchvision()
from timm.data import Mixup, create_transform  # noqa: E402  (needs the repair)

Transform = Callable[[Image.Image], Tensor]
"""An RGB image to [C, H, W] float32, normalised."""

_MIXING = 1  # separates the draws for a pair from those for its first image


def training_transform(input: ImageInput, config: AugmentSettings) -> Transform:
    """Crop, flip, RandAugment and erasing; draws from the global random generators."""
    transform: Transform = create_transform(
        input.size,
        is_training=True,
        scale=config.crop_scale,
        hflip=0.5 * config.flip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.rand_augment,
        interpolation="bicubic",
        mean=input.mean,
        std=input.std,
        re_prob=config.erase,
        re_mode="pixel",
    )
    return transform


def centre_transform(input: ImageInput) -> Transform:
    """The centre crop of the encoder's input format."""
    transform: Transform = create_transform(
        input.size, crop_pct=input.center_crop, interpolation="bicubic", mean=input.mean, std=input.std
    )
    return transform


class Mixing:
    """Mixup and cutmix of neighbouring images: the first with the second, the third with the fourth, ...

    The order of images is random, so neighbours are a random pair. One process reads both, so a pair is mixed in the
    same way for any number of processes.
    """

    def __init__(self, config: AugmentSettings, seed: int) -> None:
        self._seed = seed
        self._mix = None
        if config.mixup or config.cutmix:  # timm mixes two classes: first or second image
            self._mix = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=2)

    @property
    def in_pairs(self) -> bool:
        """Whether images are mixed, which requires an even number of images per batch."""
        return self._mix is not None

    def __call__(
        self, images_BCHW: Tensor, targets_BK: Tensor, ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]
    ) -> None:
        """Mix the images in place, and the rows of `targets_BK` in the same shares."""
        if self._mix is None:
            return
        for first in range(0, len(ids_B), 2):
            pair = slice(first, first + 2)
            seed_item(self._seed, int(epochs_B[first]), int(ids_B[first]), _MIXING)
            images_BCHW[pair], shares_22 = self._mix(images_BCHW[pair], torch.arange(2))
            targets_BK[pair] = shares_22 @ targets_BK[pair]


def seed_item(seed: int, epoch: int, item: int, use: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators, from which timm draws, for one item in one epoch.

    The draws that follow depend on neither processes, workers, nor where a run was resumed. `use` separates draws for
    different purposes.
    """
    bits = int(hashed(AUGMENT, seed, epoch, item, use)[()])
    random.seed(bits)
    np.random.seed(bits % 2**32)  # timm's mixup draws from this generator
    torch.manual_seed(bits >> 1)
