"""Sets in ADE20K's format: what is read and what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_ds.data.sources.ade20k import IGNORED, Ade20kSet
from moce_ds.errors import DataError
from tests.examples.dense_sets import write_ade


def test_zero_is_no_class(tmp_path: Path) -> None:
    image, labels_HW = Ade20kSet.open(write_ade(tmp_path), 2, reduce_zero_label=True).read(0)
    assert image.size == (48, 32) and labels_HW.shape == (32, 48)
    assert [int(labels_HW[row, 0]) for row in (0, 8, 24)] == [1, 0, IGNORED]


def test_zero_is_a_class(tmp_path: Path) -> None:
    _, labels_HW = Ade20kSet.open(write_ade(tmp_path, value=IGNORED), 2, reduce_zero_label=False).read(0)
    assert [int(labels_HW[row, 0]) for row in (0, 8, 24)] == [IGNORED, 1, 0]


def test_the_layout_of_the_release(tmp_path: Path) -> None:
    """images/training and annotations/training."""
    written = write_ade(tmp_path / "written")
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
        (written / part).rename(tmp_path / part / "training")
    assert len(Ade20kSet.open(tmp_path / "images" / "training", 2, True)) == 1


@pytest.mark.parametrize(("reduce", "told"), [(True, "class 9; data.classes=3 from 1"), (False, "class 9; .* from 0")])
def test_a_class_beyond_the_last(tmp_path: Path, reduce: bool, told: str) -> None:
    data = Ade20kSet.open(write_ade(tmp_path, value=9), 3, reduce)
    with pytest.raises(DataError, match=rf"a\.png holds the {told}"):
        data.read(0)


def test_a_mask_that_is_missing_or_of_another_size(tmp_path: Path) -> None:
    data, path = Ade20kSet.open(write_ade(tmp_path), 2, True), tmp_path / "annotations" / "a.png"
    first = data.fingerprint
    Image.fromarray(np.ones((32, 40), np.uint8)).save(path)
    assert data.fingerprint != first
    for look in (partial(data.read, 0), partial(data.check_headers, [0])):
        with pytest.raises(DataError, match=r"a\.png holds 40 x 32 pixels; expected the 48 x 32 of its image"):
            look()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png not found: the mask of .*a\.jpg; 1 of 1 image has none"):
        Ade20kSet.open(tmp_path, 2, True)


def test_folders_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images is not a folder"):
        Ade20kSet.open(tmp_path, 2, True)
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match=r"holds no \.jpg or \.png"):
        Ade20kSet.open(tmp_path, 2, True)
