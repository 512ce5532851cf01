"""The only module that imports pycocotools: packing and unpacking masks, and the average precision.

Axes: N objects, H x W pixels of an image.
"""

import contextlib
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.common.errors import ConfigError

try:
    from pycocotools import mask as masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    raise ConfigError("Sets in COCO's format need the package pycocotools: pip install 'moce-ds[dense]'.") from None

SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first six numbers of pycocotools' summary, 0 to 1; -1 if the set has no such object."""

_LONGEST_OUTLINE = 1_000_000  # total for the polygons of an object, pixels; unpacking needs a hundred bytes for each
_MOST_POLYGONS = 10_000  # per object; each is merged with all earlier ones
_LARGEST_SHIFT = 60  # bits of a run in a packed RLE; a longer one would take very long


def segmentation_fault(shape: Any, height: int, width: int, slack: float) -> str | None:
    """The fault of an object's segmentation on an image of this size, or None; does not unpack it.

    The time is proportional to its length. pycocotools fails on most faults, but takes some for boxes and some for
    masks of another size. Corners far outside of the image exhaust the memory or end the process.

    Args:
        shape: polygons or RLE.
        height, width: of the image.
        slack: pixels by which corners may leave the image.
    """
    if shape is None:
        return "is missing; boxes alone do not suffice, because masks are trained and evaluated"
    if not _is_rle(shape):
        if not _is_polygons(shape):
            return "is neither polygons, of three points or more, nor RLE"
        return _outline_fault(shape, height, width, slack)
    if not isinstance(shape["size"], list) or shape["size"] != [height, width]:
        return f"is of height and width {shape['size']}; its image has {[height, width]}"
    runs = _runs_of(shape)
    if not set(map(type, runs)) <= {int} or min(runs, default=0) < 0 or sum(runs) != height * width:
        return f"is RLE whose runs do not add up to the {height} x {width} pixels of its image"
    return None


def polygons_of(shape: Any) -> list[list[float]] | None:
    """The polygons of a valid segmentation; None for RLE."""
    return None if _is_rle(shape) else shape


def has_pixels(shape: Any, height: int, width: int) -> bool:
    """Whether a valid segmentation covers a pixel of its image."""
    if _is_rle(shape):
        return any(_runs_of(shape)[1::2])
    return bool(masks.area(masks.frPyObjects(shape, height, width)).any())


def _is_rle(shape: Any) -> bool:
    return isinstance(shape, dict) and "size" in shape and isinstance(shape.get("counts"), str | list)


def _is_polygons(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and bool(shape)
        and all(
            isinstance(points, list)
            and len(points) >= 6
            and len(points) % 2 == 0
            and set(map(type, points)) <= {int, float}
            and _are_finite(points)
            for points in shape
        )
    )


def _are_finite(numbers: list[float]) -> bool:
    try:
        return math.isfinite(sum(numbers))
    except OverflowError:  # an integer that is too large for a float
        return False


def _outline_fault(polygons: list[list[float]], height: int, width: int, slack: float) -> str | None:
    """The fault of the position or size of polygons, or None."""
    for points in polygons:
        for name, ends, length in (("x", points[0::2], width), ("y", points[1::2], height)):
            for end in (min(ends), max(ends)):
                if not -slack <= end <= length + slack:
                    return f"has a corner of {name} {end:g}, outside of its image of {width} x {height} pixels"
    if len(polygons) > _MOST_POLYGONS:
        return f"has {len(polygons)} polygons; expected {_MOST_POLYGONS} at most"
    if sum(map(len, polygons)) // 2 * max(height, width) > _LONGEST_OUTLINE:  # only then it may be too long
        corners = (np.array(points, np.float64).reshape(-1, 2) for points in polygons)
        outline = sum(np.abs(c - np.roll(c, 1, axis=0)).max(axis=1).sum() for c in corners)
        if outline > _LONGEST_OUTLINE:
            return f"has an outline of {outline:.0f} pixels; expected {_LONGEST_OUTLINE} at most"
    return None


def _runs_of(shape: dict[str, Any]) -> Any:
    """The run lengths of an RLE; at least one is negative if the text is invalid."""
    counts = shape["counts"]
    return _unpacked_runs(counts) if isinstance(counts, str) else counts


def _unpacked_runs(text: str) -> list[int]:
    """The run lengths of a packed RLE: 5 bits per character; from the fourth on, each is stored as its difference from
    the run two before it."""
    runs: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > _LARGEST_SHIFT:
            return [-1]
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << (shift - 4)  # the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number, shift = 0, 0
    return runs if not shift else [-1]


def unpack(shape: Any, height: int, width: int) -> NDArray[np.uint8]:
    """The mask of a segmentation (RLE or polygons), [H, W] of 0 and 1."""
    if _is_rle(shape):
        return masks.decode(shape if isinstance(shape["counts"], str) else masks.frPyObjects(shape, height, width))
    return masks.decode(masks.merge(masks.frPyObjects(shape, height, width)))


def pack(masks_NHW: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Masks as COCO's RLE, which JSON can hold."""
    columns_first_HWN = np.asfortranarray(masks_NHW.transpose(1, 2, 0).astype(np.uint8))
    return [{"size": m["size"], "counts": m["counts"].decode("ascii")} for m in masks.encode(columns_first_HWN)]


def box_of(packed: dict[str, Any]) -> list[float]:
    """The box (x, y, width, height) of a packed mask, pixels."""
    return [float(x) for x in masks.toBbox(packed)]


def area_of(packed: dict[str, Any]) -> int:
    """Pixels of a packed mask."""
    return int(masks.area(packed))


def average_precision(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float]:
    """Average precision of boxes and of masks: box_ap, box_ap50, ..., mask_ap, ... (see `SCORES`).

    Args:
        truth: the ground truth, see `CocoSet.truth`.
        detections: with image_id, category_id, score, bbox and packed segmentation, in the format of COCO's servers.
    """
    if not detections:  # pycocotools fails without detections
        return {f"{kind}_{score}": 0.0 for kind in ("box", "mask") for score in SCORES}
    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        opened = COCO()
        opened.dataset = truth
        opened.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(opened, opened.loadRes([dict(one) for one in detections]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores |= {f"{name}_{score}": float(evaluation.stats[n]) for n, score in enumerate(SCORES)}
    return scores
