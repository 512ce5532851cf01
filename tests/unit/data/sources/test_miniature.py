"""The miniature set: both formats tell the same, and cut-outs of validation are not in training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.data.sources.ade20k import Ade20kSet
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.miniature import Cut, Material, write_miniature


@pytest.fixture(scope="module")
def material() -> Material:
    return Material.from_packages()


@pytest.fixture(scope="module")
def written(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature") / "set"
    write_miniature(folder, material, side=64, train=12, val=4, seed=1)
    return folder


def test_the_tool_tells_errors_as_the_verbs_do(written: Path) -> None:
    command = [sys.executable, "-m", "tools.miniature_coco", written]
    root = Path(__file__).parents[4]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert (said.returncode, said.stderr) == (1, f"Error: {written} exists: choose another folder, or delete it.\n")


def test_both_formats_tell_the_same(written: Path) -> None:
    coco = CocoSet.open(written / "train" / "instances.json", written / "train" / "images")
    ade = Ade20kSet.open(written / "train", classes=11, reduce_zero_label=True)
    assert len(coco) == len(ade) == 12 and list(coco.categories.values()) == [str(digit) for digit in range(10)]
    shown = 0
    for number in range(12):
        _, labels_HW = ade.read(number)
        objects_HW = np.zeros((64, 64), bool)
        for thing in coco.objects[number]:
            mask_HW = coco.mask(number, thing).astype(bool)
            assert (labels_HW[mask_HW] == coco.labels[thing.category_id] + 1).all()
            rows, columns = np.nonzero(mask_HW)
            x, y, width, height = thing.bbox
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert not (objects_HW & mask_HW).any(), "two objects share a pixel"
            objects_HW |= mask_HW
        assert (labels_HW[~objects_HW] == 0).all()
        assert np.asarray(coco.image(number))[objects_HW].mean() > 150  # digits are white
        shown += len(coco.objects[number])
    assert 12 <= shown <= 48


def test_the_same_seed_gives_the_same_pictures(written: Path, material: Material, tmp_path: Path) -> None:
    for seed, same in ((1, True), (2, False)):
        write_miniature(tmp_path / str(seed), material, side=64, train=1, val=1, seed=seed)
        path = Path("val", "images", "00001.jpg")
        assert ((tmp_path / str(seed) / path).read_bytes() == (written / path).read_bytes()) == same


def test_no_cut_out_is_in_both_parts(material: Material, tmp_path: Path) -> None:
    """Of ten cut-outs two, the first and the sixth, are for the one picture of validation, the others for training."""
    used: list[int] = []

    def cut(number: int) -> Cut:
        def draw() -> Image.Image:
            used.append(number)
            return Image.new("RGBA", (8, 8), "red")

        return draw

    ten = Material(material.backgrounds, {"square": [cut(number) for number in range(10)]})
    write_miniature(tmp_path / "a", ten, side=32, train=40, val=1)
    last = len(used) - next(n for n, number in enumerate(reversed([-1, *used])) if number % 5)
    assert set(used[:last]) == {1, 2, 3, 4, 6, 7, 8, 9} and set(used[last:]) <= {0, 5} and used[last:]


def test_what_is_there_is_not_overwritten(written: Path, material: Material) -> None:
    with pytest.raises(DataError, match="exists: choose another folder"):
        write_miniature(written, material, side=64, train=1, val=1)


def test_packages_that_are_not_unpacked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 landscapes and 0 stamps: unpack"):
        Material.from_debian(tmp_path)
