"""A list of paths as a source of shards."""

from pathlib import Path

import pytest

from moce_ds.common.errors import DataError
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.any_source import source_at
from tests.examples.images import crop, rejections, save

SETTINGS = ShardSettings(images_per_shard=2, workers=1)


def test_images_are_those_of_the_list_in_its_order(tmp_path: Path) -> None:
    for number in range(4):
        save(crop(number), tmp_path / "images" / f"{'ab'[number % 2]}/{number}.png", "PNG")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/pipe").symlink_to("/dev/null")
    (tmp_path / "lists/empty.png").touch()
    absolute = tmp_path / "images/a/2.png"
    lines = ["../images/b/3.png\tsecond class", f"{absolute}\t", "", "../images/a/0.png", "missing.png", "pipe",
             "empty.png", "../images/b/1.png\tfirst class"]  # fmt: skip
    (tmp_path / "lists/train.txt").write_text("\n".join(lines))
    report = write_shards(source_at(tmp_path / "lists/train.txt"), tmp_path / "set", SETTINGS)
    shards = ShardSet.open(tmp_path / "set")
    assert [shards.source(i) for i in range(4)] == [
        "../images/b/3.png", str(absolute), "../images/a/0.png", "../images/b/1.png",
    ]  # fmt: skip
    assert shards.classes == ["../images/a", "first class", "second class"]
    assert shards.labels.tolist() == [2, -1, 0, 1] and report.count == 4
    reasons = {path: reason for path, (reason, _) in rejections(tmp_path / "set").items()}
    assert reasons == {"missing.png": "not a regular file", "pipe": "not a regular file", "empty.png": "empty"}


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(
        DataError, match=r"x\.txt is damaged .*: expected a text file in UTF-8 with a path on each line"
    ):
        write_shards(source_at(tmp_path / "x.txt"), tmp_path / "set", SETTINGS)
    assert not (tmp_path / "set").exists()
    with pytest.raises(DataError, match=r"y\.txt is missing"):
        write_shards(source_at(tmp_path / "y.txt"), tmp_path / "set", SETTINGS)
