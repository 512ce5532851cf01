"""Small real sets in COCO's and ADE20K's format, and an encoder, for the tests of detection and segmentation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

# Two photographs cut to 48 x 32 pixels: a rectangle, a triangle and a crowd; and one with nothing on it.
CATEGORIES = [{"id": 7, "name": "roof"}, {"id": 3, "name": "petal"}]
OBJECTS: list[dict[str, Any]] = [
    {"id": 1, "image_id": 20, "category_id": 7, "bbox": [4, 8, 16, 10], "iscrowd": 0,
     "segmentation": [[4, 8, 20, 8, 20, 18, 4, 18]]},
    {"id": 2, "image_id": 20, "category_id": 3, "bbox": [30, 10, 10, 20],
     "segmentation": [[30, 10, 40, 10, 30, 30]]},
    {"id": 3, "image_id": 20, "category_id": 3, "bbox": [0, 0, 8, 32], "iscrowd": 1,
     "segmentation": {"size": [32, 48], "counts": [0, 256, 1280]}},
    {"id": 4, "image_id": 10, "category_id": 3, "bbox": [8, 0, 8, 32], "iscrowd": 0,
     "segmentation": {"size": [32, 48], "counts": [256, 256, 1024]}},
]  # fmt: skip


def write_coco(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """The JSON file and the folder of images of a set of three; `changes` replace parts of the JSON."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, photo in zip((10, 20), load_sample_images().images, strict=True):
        Image.fromarray(photo[100:132, 200:248]).save(images / f"{number}.png")
    Image.fromarray(photo[:32, :48]).save(images / "30.png")
    listed = [{"id": number, "file_name": f"{number}.png", "width": 48, "height": 32} for number in (30, 20, 10)]
    content = {"images": listed, "annotations": OBJECTS, "categories": CATEGORIES} | changes
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path, images


def write_ade(folder: Path, value: int = 2) -> Path:
    """A set of one photograph of 48 x 32 pixels: class 1, a band of `value` and a band of 0."""
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    Image.fromarray(load_sample_images().images[0][:32, :48]).save(folder / "images" / "a.jpg")
    mask_HW = np.ones((32, 48), np.uint8)
    mask_HW[:8], mask_HW[24:] = value, 0
    Image.fromarray(mask_HW).save(folder / "annotations" / "a.png")
    return folder
