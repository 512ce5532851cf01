"""The crop window of an image that the model sees, as a function of (seed, epoch, image id).

Windows are computed on the host from the sizes in the shard index. So the decoder reads only the required part, and the
result depends neither on ranks nor on threads.

Axes: B images, K tries, C channels, H, W pixels; a window is (top, left) and (height, width) in pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.distributed.randomness import CROP, FLIP, uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
"""Range of the aspect ratio (width / height) of a random crop."""


@dataclass(frozen=True)
class ImageInput:
    """The input format of a model; stored with every exported encoder and with the clusters.

    Attributes:
        size: side in pixels.
        mean, std: normalisation.
        center_crop: share of the shorter side that the centre crop of evaluation keeps.
    """

    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    center_crop: float = 0.875

    def pixels(self, image_CHW: NDArray[np.float32]) -> NDArray[np.uint8]:
        """A normalised image as a person sees it, [H, W, 3]."""
        std, mean = (np.array(values, np.float32)[:, None, None] for values in (self.std, self.mean))
        return ((image_CHW * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)

    def to_tree(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std), "center_crop": self.center_crop}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "ImageInput":
        """Rebuild from JSON, where tuples are lists."""
        return cls(tree["size"], tuple(tree["mean"]), tuple(tree["std"]), tree["center_crop"])


@dataclass(frozen=True)
class Windows:
    """Per image: `start_B2` (top, left) and `shape_B2` (height, width), int32, and `mirror_B` (0 or 1), int32."""

    start_B2: NDArray[np.int32]
    shape_B2: NDArray[np.int32]
    mirror_B: NDArray[np.int32]


@dataclass(frozen=True)
class RandomCrop:
    """The training crop of MAE: an area share in `scale`, a log-uniform aspect ratio, and a flip.

    The first of ten tries that fits inside the image is used. If none fits, the window is the largest centred one with
    an allowed ratio, pixel-identical to that of torchvision's RandomResizedCrop.
    """

    seed: int
    scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True

    def windows(
        self,
        ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        heights_B: NDArray[np.int32],
        widths_B: NDArray[np.int32],
    ) -> Windows:
        """The windows of a batch."""
        tries = np.arange(_TRIES)

        def draw(what: int) -> NDArray[np.float64]:
            return uniform(CROP, self.seed, epochs_B[:, None], ids_B[:, None], tries, what)

        h_B, w_B = heights_B.astype(np.float64), widths_B.astype(np.float64)
        area_BK = (h_B * w_B)[:, None] * (self.scale[0] + draw(0) * (self.scale[1] - self.scale[0]))
        low, high = np.log(_RATIO)
        ratio_BK = np.exp(low + draw(1) * (high - low))
        width_BK = np.round(np.sqrt(area_BK * ratio_BK))
        height_BK = np.round(np.sqrt(area_BK / ratio_BK))
        fits_BK = (width_BK >= 1) & (height_BK >= 1) & (width_BK <= w_B[:, None]) & (height_BK <= h_B[:, None])
        first_B = fits_BK.argmax(axis=1)
        rows = np.arange(len(ids_B))
        fallback = _largest_window(h_B, w_B)
        any_fits_B = fits_BK.any(axis=1)
        height_B = np.where(any_fits_B, height_BK[rows, first_B], fallback[0])
        width_B = np.where(any_fits_B, width_BK[rows, first_B], fallback[1])
        place_B2 = np.stack([draw(2)[rows, first_B], draw(3)[rows, first_B]], axis=1)
        shape_B2 = np.stack([height_B, width_B], axis=1)
        room_B2 = np.stack([h_B, w_B], axis=1) - shape_B2
        random_B2 = np.minimum(np.floor(place_B2 * (room_B2 + 1)), room_B2)
        start_B2 = np.where(any_fits_B[:, None], random_B2, room_B2 // 2)
        mirror_B = (uniform(FLIP, self.seed, epochs_B, ids_B) < 0.5) & self.flip
        return Windows(start_B2.astype(np.int32), shape_B2.astype(np.int32), mirror_B.astype(np.int32))


@dataclass(frozen=True)
class CenterCrop:
    """The crop of evaluation: the centred square with `share` of the shorter side; no flip."""

    share: float

    def windows(
        self,
        ids_B: NDArray[np.int64],
        epochs_B: NDArray[np.int64],
        heights_B: NDArray[np.int32],
        widths_B: NDArray[np.int32],
    ) -> Windows:
        """The windows of a batch, independent of ids and epochs."""
        side_B = np.maximum(1, np.round(np.minimum(heights_B, widths_B) * self.share))
        shape_B2 = np.stack([side_B, side_B], axis=1)
        start_B2 = np.floor((np.stack([heights_B, widths_B], axis=1) - shape_B2) / 2)
        return Windows(start_B2.astype(np.int32), shape_B2.astype(np.int32), np.zeros(len(ids_B), np.int32))


def _largest_window(
    h_B: NDArray[np.float64], w_B: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Height and width of the largest window whose aspect ratio is within `_RATIO`."""
    height_B = np.maximum(1, np.minimum(h_B, np.round(w_B / _RATIO[0])))
    width_B = np.maximum(1, np.minimum(w_B, np.round(h_B * _RATIO[1])))
    return height_B, width_B
