"""The splits of a task, and what of them is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.listing import Listed, Listing
from moce_ds.errors import DataError
from moce_ds.tuning.labelled import make_splits

Make = Callable[..., ShardSet]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A shard set with so many images of each class; with `several`, what each image shows."""

    def write(name: str, several: Listing | None = None, **counts: int) -> ShardSet:
        for folder, count in counts.items():
            folder = folder.replace("_", ".")  # `_`: directly in the source folder
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / folder / f"{number}.png")
        write_shards(tmp_path / name, tmp_path / f"{name}-shards", ShardSettings(workers=1), several)
        return ShardSet.open(tmp_path / f"{name}-shards")

    return write


def test_labels_go_by_name(make: Make) -> None:
    splits = make_splits(make("train", ant=2, bee=2, cow=2), None, make("test", bee=1, cow=2), seed=0)
    assert splits.classes == ["ant", "bee", "cow"] and splits.val is None
    assert splits.test.labels.tolist() == [1, 2, 2]


def test_a_share_of_every_class_validates(make: Make) -> None:
    splits = make_splits(make("train", ant=10, bee=20), 0.2, make("test", bee=1), seed=0)
    assert splits.val is not None and np.bincount(splits.val.labels).tolist() == [2, 4]
    assert sorted([*splits.val.ids_N, *splits.train.ids_N]) == list(range(30))
    assert splits.fingerprint != make_splits(splits.train.images, 0.2, splits.test.images, seed=1).fingerprint


@pytest.mark.parametrize(
    ("train", "val", "test", "told"),
    [
        ({"ant": 2, "bee": 1}, 0.1, {"ant": 1}, "class bee has a single image, which cannot both train and validate"),
        ({"ant": 2, "bee": 2}, None, {"cow": 1}, r"classes \['cow'\] are not among the training classes"),
        ({"ant": 2}, None, {"ant": 1}, "1 class"),
        (
            {"ant": 2, "bee": 2},
            None,
            {"_": 1, "ant": 1},
            "has no class; expected every image in the folder of its class",
        ),
    ],
)
def test_a_task_that_cannot_be_learnt_is_refused(
    make: Make, train: dict[str, int], val: float | None, test: dict[str, int], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        make_splits(make("train", **train), val, make("test", **test), seed=0)


def test_several_labels_go_by_name_too(make: Make, tmp_path: Path) -> None:
    def listed(classes: list[str], *images: Listed) -> Listing:
        return Listing(images, classes, multi_label=True)

    train = listed(["cat", "dog"], Listed("x/0.png", ("cat",)), Listed("x/1.png", ("cat", "dog"), ()))
    test = listed(["dog", "cat"], Listed("x/0.png", ("dog",), ("cat",)))
    splits = make_splits(make("train", train, x=2), None, make("test", test, x=1), seed=0)
    assert splits.multi_label and splits.train.labels.tolist() == [[1, 0], [1, 1]]
    assert splits.test.labels.tolist() == [[-1, 1]]
    with pytest.raises(
        DataError, match=r"one label per image, .* has several: expected the same kind in all splits of a task"
    ):
        make_splits(splits.train.images, None, make("single", cat=1, dog=1), seed=0)
