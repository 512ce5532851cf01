"""Tar files as a source of shards: every image with its class, whoever reads it, and what is damaged."""

import io
import tarfile
from pathlib import Path

import pytest

from moce_ds.common.errors import DataError
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.any_source import source_at
from moce_ds.data.sources.image_folder import FolderSource
from moce_ds.data.sources.tar_files import TarSource
from tests.examples.images import contents, crop, rejections, save

SETTINGS = ShardSettings(images_per_shard=3, workers=1)


def image(number: int) -> bytes:
    file = io.BytesIO()
    crop(number).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars: classes as members before and after their image, classes as folders, none, and other members."""
    write_tar(
        tmp_path / "tars/b.tar",
        {"0.png": image(0), "0.cls": b"10\n", "1.cls": b"9", "1.png": image(1), "1.json": b"{}", "2.png": image(2)},
    )
    write_tar(
        tmp_path / "tars/a.tar",
        {"10/x.seg.png": image(3), "10/x.png": image(4), "9/y.PNG": b"", "9/z.jpeg": b"no image", "9/._z.jpg": b"x"},
    )
    (tmp_path / "tars/README.md").write_text("a set")
    return tmp_path / "tars"


def test_images_and_classes_are_those_of_the_members(tars: Path, tmp_path: Path) -> None:
    report = write_shards(source_at(tars), tmp_path / "set", SETTINGS)
    shards = ShardSet.open(tmp_path / "set")
    names = [shards.source(i) for i in range(shards.count)]
    assert names == ["a.tar/10/x.seg.png", "a.tar/10/x.png", "b.tar/0.png", "b.tar/1.png", "b.tar/2.png"]
    assert [shards.read(i) for i in range(5)] == [image(number) for number in (3, 4, 0, 1, 2)]
    assert shards.classes == ["9", "10"] and shards.labels.tolist() == [1, 1, 1, 0, -1]
    reasons = {path: reason for path, (reason, _) in rejections(tmp_path / "set").items()}
    assert reasons == {"a.tar/9/y.PNG": "empty", "a.tar/9/z.jpeg": "not an image", "a.tar/9/._z.jpg": "not an image"}
    assert write_shards(source_at(tars), tmp_path / "set", SETTINGS).already_complete and report.shards == 3


def test_several_workers_write_the_same(tars: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        write_shards(source_at(tars), tmp_path / name, ShardSettings(images_per_shard=3, workers=workers))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_a_path_names(tars: Path, tmp_path: Path) -> None:
    assert source_at(tars / "a.tar") == TarSource(tars / "a.tar")
    assert [entry.path for entry in source_at(tars / "b.tar").entries()] == [
        "b.tar/0.png",
        "b.tar/1.png",
        "b.tar/2.png",
    ]
    save(crop(1), tars / "photo.jpg")  # a folder of images in which tar files lie
    assert source_at(tars) == FolderSource(tars)
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match=r"x\.zip is a file: expected a folder, a \.tar or \.parquet file, or a list"):
        source_at(tmp_path / "x.zip")


def test_damaged_tars_are_named(tars: Path, tmp_path: Path) -> None:
    whole = (tars / "b.tar").read_bytes()
    (tars / "b.tar").write_bytes(b"x" * len(whole))
    with pytest.raises(DataError, match=r"b\.tar is not a readable tar file \(.*\): copy it again from its source"):
        write_shards(TarSource(tars), tmp_path / "set", SETTINGS)
    assert not (tmp_path / "set").exists()
    (tars / "b.tar").write_bytes(whole)
    entries = [entry for entry in TarSource(tars).entries() if entry.path.startswith("b.tar")]
    (tars / "b.tar").write_bytes(whole[: 512 + 100])  # in the middle of the first image, after it was listed
    (verdict,) = TarSource(tars).examine(entries[:1], 10**6)
    assert verdict == ("damaged", "the tar file ends before the image")
