"""A task of classification: its splits, model, targets and losses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from moce_ds.common.config.settings import load
from moce_ds.common.errors import ConfigError, DataError
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.listing import Listed, Listing
from moce_ds.models.vit import load_encoder
from moce_ds.tuning.classification import Batch, Classification, make_splits
from moce_ds.tuning.settings import FinetuneSettings
from tests.examples.alone import ALONE

Make = Callable[..., Classification]
MakeShards = Callable[..., ShardSet]
PLAIN = ("augment.mixup=0", "augment.cutmix=0", "augment.rand_augment=null", "augment.erase=0")
TARGETS = np.tile(np.array([[1, 0, 0], [1, 1, 0], [-1, 0, 1]], np.int8), (20, 1))


@pytest.fixture
def make(tiny_shards: Path, tiny_encoder: Path, tmp_path: Path) -> Make:
    """The task of three classes in `tiny_shards`, or with `several` of many labels an image."""

    def made(*words: str, several: bool = False) -> Classification:
        named = {"data.encoder": tiny_encoder, "data.train": tiny_shards, "data.test": tiny_shards, "run.out": tmp_path}
        config = load(FinetuneSettings, None, [*(f"{k}={v}" for k, v in named.items()), *words])
        shards = ShardSet.open(tiny_shards)
        shards = dataclasses.replace(shards, targets=TARGETS) if several else shards
        splits = make_splits(shards, 0.2, shards, 0)
        parts = (config.data, config.augment, config.optim, config.engine, config.run)
        return Classification(load_encoder(tiny_encoder), splits, *parts, ALONE)

    return made


def batch_of(task: Classification, *ids: int) -> Batch:
    return task.batch(np.array(ids), np.zeros(len(ids), np.int64))


def test_the_head_sees_the_features_of_the_encoder(make: Make, tiny_encoder: Path, photo_pixels: Tensor) -> None:
    model, encoder, images = make().model.eval(), load_encoder(tiny_encoder), photo_pixels.float()
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.head(encoder.features(images)))
    assert model.head.weight.abs().max() < 1e-3 and model.blocks[2].drop_path1.drop_prob == pytest.approx(0.1)


def test_another_image_size_fits_the_positions(make: Make, photo_pixels: Tensor) -> None:
    task = make("data.image_size=32")
    assert task.model.pos_embed.shape == (1, 1 + 64, 16)
    assert batch_of(task, 0, 1).images_BCHW.shape == (2, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"data.image_size: 30 is not a multiple of the encoder's patch size 4"):
        make("data.image_size=30")


def test_smoothed_targets(make: Make) -> None:
    task = make(*PLAIN, "augment.smoothing=0.3")
    label = task._splits.train.labels[5]
    batch = batch_of(task, 5, 7)
    assert batch.targets_BK[0].tolist() == pytest.approx([0.8 if k == label else 0.1 for k in range(3)])
    with torch.no_grad():
        expected = cross_entropy(task.model(batch.images_BCHW), batch.targets_BK)
        torch.testing.assert_close(task.loss(task.model, batch), expected)


def test_what_is_not_counted_has_no_loss(make: Make) -> None:
    task = make(*PLAIN, "augment.smoothing=0", several=True)
    ids = [int(np.flatnonzero((task._splits.train.labels == row).all(axis=1))[0]) for row in TARGETS[:3]]
    batch = batch_of(task, *ids)
    assert batch.counted_BK.tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    with torch.no_grad():
        each = binary_cross_entropy_with_logits(task.model(batch.images_BCHW), batch.targets_BK, reduction="none")
        loss = task.loss(task.model, batch)
    torch.testing.assert_close(loss, (each.sum() - each[2, 0]) / 9)
    assert batch.targets_BK[:, 1:].tolist() == [[0, 0], [1, 0], [0, 1]] and task.criterion == "map11"


def test_mixed_labels_share_what_counts(make: Make) -> None:
    task = make("augment.cutmix=0", "augment.smoothing=0", several=True)
    unsure = int(np.flatnonzero(task._splits.train.labels[:, 0] == -1)[0])
    sure = int(np.flatnonzero((task._splits.train.labels == TARGETS[0]).all(axis=1))[0])
    batch = batch_of(task, unsure, sure)
    share = batch.counted_BK[:, 0]  # of the image that counts for the first class, in both
    assert 0 < share[0] < 1 and share.sum() == pytest.approx(1)
    torch.testing.assert_close(batch.targets_BK[:, 0], torch.ones(2))  # of what counts, all shows it
    torch.testing.assert_close(batch.targets_BK[:, 2], 1 - share)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("data.metric=map11",), "data.metric: map11 does not apply to images with one label"),
        (("optim.batch_size=15",), "optim.batch_size: 15 gives a process an odd number of images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Make, words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make(*words)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.val_share=5", "data.val_share: got 5(.0)?; expected a number less than 1"),
        ("data.val_share=0.1 & data.val=x", "expected one of the two"),
        ("augment.rand_augment=random", "augment.rand_augment"),
        ("augment.crop_scale=[1, 0.5]", r"augment.crop_scale: \[1.0, 0.5\]; expected \[low, high\]"),
        ("optim.layer_decay=0", "optim.layer_decay: got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Make, word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make(*word.split(" & "))


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
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


def test_labels_go_by_name(make_shards: MakeShards) -> None:
    splits = make_splits(make_shards("train", ant=2, bee=2, cow=2), None, make_shards("test", bee=1, cow=2), seed=0)
    assert splits.classes == ["ant", "bee", "cow"] and splits.val is None
    assert splits.test.labels.tolist() == [1, 2, 2]


def test_a_share_of_every_class_validates(make_shards: MakeShards) -> None:
    splits = make_splits(make_shards("train", ant=10, bee=20), 0.2, make_shards("test", bee=1), seed=0)
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
    make_shards: MakeShards, train: dict[str, int], val: float | None, test: dict[str, int], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        make_splits(make_shards("train", **train), val, make_shards("test", **test), seed=0)


def test_several_labels_go_by_name_too(make_shards: MakeShards, tmp_path: Path) -> None:
    def listed(classes: list[str], *images: Listed) -> Listing:
        return Listing(images, classes, multi_label=True)

    train = listed(["cat", "dog"], Listed("x/0.png", ("cat",)), Listed("x/1.png", ("cat", "dog"), ()))
    test = listed(["dog", "cat"], Listed("x/0.png", ("dog",), ("cat",)))
    splits = make_splits(make_shards("train", train, x=2), None, make_shards("test", test, x=1), seed=0)
    assert splits.multi_label and splits.train.labels.tolist() == [[1, 0], [1, 1]]
    assert splits.test.labels.tolist() == [[-1, 1]]
    with pytest.raises(
        DataError, match=r"one label per image, .* has several: expected the same kind in all splits of a task"
    ):
        make_splits(splits.train.images, None, make_shards("single", cat=1, dog=1), seed=0)
