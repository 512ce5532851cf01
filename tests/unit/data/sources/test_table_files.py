"""Which files are one table: folders of Parquet files, their splits, and saved data sets."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from moce_ds.common.errors import DataError
from moce_ds.data.sources.any_source import source_at
from moce_ds.data.sources.image_folder import FolderSource
from moce_ds.data.sources.table_files import holds_parquet, is_split, refuse_several_splits, table_files
from tests.examples.images import crop, save


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_of_parquet_files_has_no_images(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", "README.md", "LICENSE", "data/a.parquet", ".git/x.png", "data/.a.parquet.jpg")
    for name in ("loop", "again"):  # without care they lead to 2**40 folders
        (folder / "data" / name).symlink_to(folder)
    assert holds_parquet(folder) and table_files(folder) == ["data/a.parquet"]
    save(crop(1), folder / "data/photos/1.JPG")
    assert not holds_parquet(folder) and source_at(folder) == FolderSource(folder)
    assert not holds_parquet(touch(tmp_path / "other", "a.txt"))
    assert not holds_parquet(touch(tmp_path / "tars", "a.parquet", "b/c.tar"))


def test_linked_folders_and_files_are_part_of_it(tmp_path: Path) -> None:
    """As in the cache of the hub, whose files are links."""
    touch(tmp_path, "blobs/1", "elsewhere/b.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.parquet").symlink_to("../blobs/1")
    (tmp_path / "set/more").symlink_to(tmp_path / "elsewhere")
    assert holds_parquet(tmp_path / "set") and table_files(tmp_path / "set") == ["a.parquet", "more/b.parquet"]


@pytest.mark.parametrize(
    "names",
    [
        ["a.parquet"],
        ["0000.parquet", "0001.parquet"],
        ["part-00000-1f.snappy.parquet", "part-00001-1f.snappy.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002-0a1b.parquet"],
        ["2024/images-00000-of-00001.parquet", "2025/images-00000-of-00001.parquet"],
        ["train/0000.parquet", "train/more/0001.parquet"],
        ["train_0.parquet", "train_1.parquet"],
    ],
)
def test_files_of_one_split(tmp_path: Path, names: list[str]) -> None:
    refuse_several_splits(touch(tmp_path, *names))
    assert table_files(tmp_path) == sorted(names)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], "data/test, data/train"),
        (["test.parquet", "train.parquet"], "test, train"),
        (["test_0.parquet", "train_0.parquet"], "test, train"),
        (["default/train/0000.parquet", "default/val/0000.parquet"], "default/train, default/val"),
        (["large/train-00000-of-00001.parquet", "small/train-00000-of-00001.parquet"], "large/train, small/train"),
        (["labelled-00000-of-00001.parquet", "unlabelled-00000-of-00001.parquet"], "labelled, unlabelled"),
        (["more.parquet", "train-00000-of-00001.parquet"], "more.parquet, train"),
    ],
)
def test_each_of_several_splits_can_be_named(tmp_path: Path, names: list[str], splits: str) -> None:
    folder = touch(tmp_path / "set", *names)
    first = folder / splits.split(", ")[0]
    with pytest.raises(DataError) as raised:
        refuse_several_splits(folder)
    assert str(raised.value) == f"{folder} holds several splits: name one of them, {splits}, such as {first}."
    for split, name in zip(splits.split(", "), names, strict=True):
        assert is_split(folder / split) or (folder / split).exists()
        refuse_several_splits(folder / split)
        assert [Path(file).name for file in table_files(folder / split)] == [Path(name).name]


def test_other_names_are_no_splits(tmp_path: Path) -> None:
    touch(tmp_path, "data/train-00000-of-00001.parquet")
    assert not any(is_split(tmp_path / name) for name in ("data/tra", "data/test", "train", "data", "none/train"))


@pytest.mark.parametrize("indices", ["_indices_files", "_indices_data_files"])
def test_an_indices_mapping_is_refused(tmp_path: Path, indices: str) -> None:
    """Versions of `datasets` before 2 wrote one; without it, the rows would be others, in another order."""
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved/state.json").read_text())
    (tmp_path / "saved/state.json").write_text(json.dumps(state | {indices: []}))
    assert table_files(tmp_path / "saved") == ["data-00000-of-00001.arrow"]
    (tmp_path / "saved/state.json").write_text(json.dumps(state | {indices: [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match=r"saved with an indices mapping, .* `flatten_indices\(\)` before save_to_disk"):
        table_files(tmp_path / "saved")


@pytest.mark.parametrize(
    "state",
    [[], {}, {"_data_files": []}, {"_data_files": [{}]}, {"_data_files": [3]}, {"_data_files": [{"filename": "../a"}]}],
)
def test_another_record_of_the_files_is_refused(tmp_path: Path, state: object) -> None:
    touch(tmp_path, "dataset_info.json")
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"state\.json is damaged.*write it again with datasets' save_to_disk"):
        table_files(tmp_path)


def test_a_record_of_splits_without_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"dataset_dict\.json is damaged: expected the names of the splits"):
        source_at(tmp_path)
