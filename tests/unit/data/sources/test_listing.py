"""Shard sets of listed images: classes that folders do not say, several of them an image, and sets of before."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moce_ds.common.errors import DataError
from moce_ds.common.storage.checksums import with_checksum
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.listing import Listed, Listing
from tests.examples.images import contents, crop, save

ONE = ShardSettings(workers=1)
SEVERAL = Listing(
    [
        Listed("2.jpg", ("cat", "sofa")),
        Listed("0.jpg", ("cat",), ("dog",)),
        Listed("1.jpg", (), ("cat",)),
        Listed("broken.jpg", ("dog",)),
    ],
    ["cat", "dog", "sofa"],
    multi_label=True,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("listed")
    for number in range(4):
        save(crop(number), root / f"{number}.jpg")
    (root / "broken.jpg").write_bytes((root / "0.jpg").read_bytes()[:200])
    return root


@pytest.fixture
def several(images: Path, tmp_path: Path) -> Path:
    write_shards(images, tmp_path / "several", ONE, SEVERAL)
    return tmp_path / "several"


def test_one_class_an_image(images: Path, tmp_path: Path) -> None:
    named = [Listed("3.jpg", ("b/c",)), Listed("1.jpg", ("a",)), Listed("0.jpg")]
    listing = Listing(named, ["a", "b/c"], origin=Path("/x"))
    write_shards(images, tmp_path / "set", ONE, listing)
    shards = ShardSet.open(tmp_path / "set")
    assert [shards.source(i) for i in range(shards.count)] == ["0.jpg", "1.jpg", "3.jpg"]
    assert (shards.classes, shards.labels.tolist(), shards.targets) == (["a", "b/c"], [-1, 0, 1], None)
    assert shards.verify().faults == [] and json.loads((tmp_path / "set/shards.json").read_text())["source"] == "/x"
    assert not (tmp_path / "set/targets.npy").exists()


def test_several_classes_an_image(several: Path) -> None:
    shards = ShardSet.open(several)
    assert shards.classes == ["cat", "dog", "sofa"] and shards.labels.tolist() == [-1, -1, -1]
    assert shards.targets is not None and shards.targets.dtype == np.int8
    assert shards.targets.tolist() == [[1, -1, 0], [-1, 0, 0], [1, 0, 1]]
    assert shards.verify().faults == []


def test_other_targets_are_another_set(images: Path, several: Path, tmp_path: Path) -> None:
    before = contents(several)
    assert write_shards(images, several, ONE, SEVERAL).already_complete and contents(several) == before
    other = Listing([*SEVERAL.images[:-2], Listed("1.jpg", ("sofa",)), SEVERAL.images[-1]], SEVERAL.classes, True)
    with pytest.raises(DataError, match="was begun with other inputs: labels_sha256"):
        write_shards(images, several, ONE, other)
    write_shards(images, tmp_path / "other", ONE, other)
    assert ShardSet.open(tmp_path / "other").fingerprint != ShardSet.open(several).fingerprint


def test_a_set_of_before_says_nothing_of_several_labels(images: Path, tmp_path: Path) -> None:
    write_shards(images, tmp_path / "set", ONE)
    manifest = json.loads((tmp_path / "set/shards.json").read_text())
    assert manifest.pop("multi_label") is False
    del manifest["files"], manifest["content_sha256"]
    (tmp_path / "set/shards.json").write_text(json.dumps(manifest))
    assert ShardSet.open(tmp_path / "set").targets is None


def test_altered_targets_are_found(several: Path, tmp_path: Path) -> None:
    targets = np.load(several / "targets.npy")
    for name, altered, told in (
        ("shape", targets[:2], r"\(2, 3\) of int8, expected \(3, 3\)"),
        ("type", targets.astype(np.int64), r"of int64, expected \(3, 3\) of int8"),
        ("values", targets * 5, "targets other than 1, 0 and -1"),
    ):
        copy = shutil.copytree(several, tmp_path / name)
        np.save(copy / "targets.npy", altered)
        with pytest.raises(DataError, match=told):
            ShardSet.open(copy)
    np.save(several / "targets.npy", np.where(targets == 0, 1, targets).astype(np.int8))
    with pytest.raises(DataError, match=r"targets\.npy is damaged or was exchanged"):
        ShardSet.open(several)
    manifest = json.loads((several / "shards.json").read_text())
    (several / "shards.json").write_text(json.dumps(with_checksum(manifest | {"files": None})))  # of an earlier version
    assert any("samples.npy: altered" in fault for fault in ShardSet.open(several).verify().faults)
    (several / "targets.npy").unlink()
    with pytest.raises(DataError, match=r"targets\.npy is missing"):
        ShardSet.open(several)


def test_a_listed_image_that_is_missing_is_named(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jpg is listed and cannot be read"):
        write_shards(images, tmp_path / "set", ONE, Listing([Listed("absent.jpg", ("a",))], ["a"]))
    assert not (tmp_path / "set").exists()


def test_nothing_is_left_of_images_that_cannot_be_decoded(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{images}: No image to write: of 1 files none could be decoded"):
        write_shards(images, tmp_path / "set", ONE, Listing([Listed("broken.jpg", ("a",))], ["a"]))
    assert not (tmp_path / "set").exists()
