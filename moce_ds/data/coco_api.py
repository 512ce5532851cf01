"""The one door to pycocotools: masks packed and unpacked, and the average precision.

Axes: N objects, H x W pixels of an image.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.errors import ConfigError

try:
    from pycocotools import mask as masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    raise ConfigError("Sets in COCO's format need the package pycocotools: pip install 'moce-ds[dense]'.") from None

SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""The first six numbers of pycocotools' summary, 0 to 1; -1 where the set has no such object."""


def is_rle(shape: Any) -> bool:
    """Whether a segmentation is run-length encoded, packed or not."""
    return isinstance(shape, dict) and "size" in shape and isinstance(shape.get("counts"), str | list)


def is_polygons(shape: Any) -> bool:
    """Whether a segmentation is polygons; pycocotools fails on other lists, or takes them for boxes."""
    return (
        isinstance(shape, list)
        and bool(shape)
        and all(isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 for points in shape)
    )


def unpack(shape: Any, height: int, width: int) -> NDArray[np.uint8]:
    """The mask of a segmentation that is RLE or polygons, [H, W] of 0 and 1."""
    if is_rle(shape):
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


def average_precision(truth: Path, detections: list[dict[str, Any]]) -> dict[str, float]:
    """Average precision of boxes and of masks: box_ap, box_ap50, ..., mask_ap, ... (see `SCORES`).

    Args:
        truth: COCO's JSON of the images.
        detections: with image_id, category_id, score, bbox and packed segmentation, as COCO's servers take them.
    """
    if not detections:  # pycocotools cannot take none
        return {f"{kind}_{score}": 0.0 for kind in ("box", "mask") for score in SCORES}
    told: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        opened = _opened(truth)
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(opened, opened.loadRes([dict(found) for found in detections]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            told |= {f"{name}_{score}": float(evaluation.stats[n]) for n, score in enumerate(SCORES)}
    return told


def _opened(truth: Path) -> COCO:
    """The set as pycocotools wants it; what only crowds and servers need may be left out of the file."""
    opened = COCO()
    opened.dataset = json.loads(truth.read_text(encoding="utf-8"))
    opened.dataset.setdefault("info", {})
    for thing in opened.dataset["annotations"]:
        thing.setdefault("iscrowd", 0)
        thing.setdefault("area", thing["bbox"][2] * thing["bbox"][3])
    opened.createIndex()
    return opened
