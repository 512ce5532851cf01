"""Data sets that the `datasets` library saved: their images and classes as a task's, and what cannot be read."""

import io
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from moce_ds.common.errors import ConfigError, DataError
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.saved_dataset import _class_names
from moce_ds.data.task_images import opened_images
from tests.examples.images import crop
from tests.examples.moce_command import refused

KINDS = ClassLabel(names=["small", "large", "none of these"])


def encoded(number: int, kind: str = "PNG") -> dict[str, object]:
    file = io.BytesIO()
    crop(number).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Seven rows: two classes, one image without a class, one row without an image, one image that is damaged."""
    images = [encoded(number) for number in range(5)] + [None, {"bytes": b"\x89PNG, or not", "path": None}]
    columns = {"name": [*"abcdefg"], "picture": images, "size": [0, 1, 0, 1, -1, 0, 0]}
    features = Features({"name": Value("string"), "picture": ImageFeature(), "size": KINDS})
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def fault(path: Path) -> str:
    """What is said where a data set cannot be read."""
    with pytest.raises(DataError) as raised, opened_images(path):
        pass
    return str(raised.value)


def test_images_and_classes_are_those_of_the_rows(saved: Path) -> None:
    with opened_images(saved) as images:
        assert images.classes == ["small", "large", "none of these"]
        assert images.labels.tolist() == [0, 1, 0, 1, -1]
        assert [images.source(i) for i in range(5)] == [f"{row:09d}" for row in range(5)]
        assert images.read(3) == encoded(3)["bytes"]
        scratch = images.path
    assert not scratch.exists()


def test_of_several_columns_the_one_of_a_usual_name_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"mask": [encoded(8)], "image": [encoded(1)], "fine": [2], "coarse": [0]}
    features = Features({"mask": ImageFeature(), "image": ImageFeature(), "fine": KINDS, "coarse": KINDS})
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    with opened_images(tmp_path / "saved") as images:
        assert images.read(0) == encoded(1)["bytes"] and images.labels.tolist() == [2]
    assert "columns mask, image all have type Image; using image." in caplog.text
    assert "columns fine, coarse all have type ClassLabel; using fine." in caplog.text


def test_without_classes_images_have_none(tmp_path: Path) -> None:
    Dataset.from_dict({"img": [encoded(0, "JPEG")]}, features=Features({"img": ImageFeature()})).save_to_disk(
        tmp_path / "saved"
    )
    with opened_images(tmp_path / "saved") as images:
        assert images.classes == [] and images.labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("kind", "values", "classes", "labels"),
    [
        ("int64", [10, 9, -1, None, 10], ["9", "10"], [1, 0, -1, -1, 1]),
        ("string", ["b", "a", "", None, "b"], ["a", "b"], [1, 0, -1, -1, 1]),
        ("bool", [True, False, None, True, True], ["False", "True"], [1, 0, -1, 1, 1]),
    ],
)
def test_plain_values_called_label_are_classes(
    tmp_path: Path, kind: str, values: list[object], classes: list[str], labels: list[int]
) -> None:
    features = Features({"image": ImageFeature(), "label": Value(kind)})
    rows = {"image": [encoded(number) for number in range(5)], "label": values}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with opened_images(tmp_path / "saved") as images:
        assert images.classes == classes and images.labels.tolist() == labels


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ({"label": Value("float32")}, "label is Value"),
        ({"kind": Value("int64")}, "there is no column label"),
    ],
)
def test_a_column_that_cannot_be_classes_is_named(
    tmp_path: Path, features: dict[str, Value], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = features
    columns = {"image": [encoded(1)], name: [1]}
    Dataset.from_dict(columns, features=Features({"image": ImageFeature(), **features})).save_to_disk(
        tmp_path / "saved"
    )
    with opened_images(tmp_path / "saved") as images:
        assert images.labels.tolist() == [-1]
    said = capsys.readouterr().err
    assert "its images have no classes" in said and told in said


def test_a_class_beyond_the_names_is_named(tmp_path: Path) -> None:
    """The library checks it when it writes, not when it reads."""
    with pytest.raises(DataError, match="row 1 has the class 3 of 3"):
        _class_names(tmp_path, KINDS, [2, 3])


def test_a_split_has_to_be_named(saved: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    one = Dataset.load_from_disk(saved)
    DatasetDict(train=one, test=one.select(range(2))).save_to_disk(both)
    assert f"{both} holds several splits: name one of them, train, test, such as {both / 'train'}" in fault(both)
    with opened_images(both / "test") as images:
        assert images.count == 2


def test_no_column_of_images(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"], "kind": ["b"]}).save_to_disk(tmp_path / "saved")
    assert "has no column of images; its columns: text, kind" in fault(tmp_path / "saved")


def test_no_image_that_decodes(tmp_path: Path) -> None:
    features = Features({"image": ImageFeature()})
    Dataset.from_dict({"image": [None, {"bytes": b"none", "path": None}]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    assert "of 2 files none could be decoded" in fault(tmp_path / "saved")


@pytest.mark.parametrize("damaged", ["state.json", "data-00000-of-00001.arrow"])
def test_damage_is_named(saved: Path, damaged: str) -> None:
    (saved / damaged).write_bytes((saved / damaged).read_bytes()[:20])
    said = fault(saved)
    assert said.startswith(f"{saved} cannot be read (") and said.endswith("write it again with datasets' save_to_disk.")


def test_the_extra_is_named_where_the_library_is_missing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with (
        pytest.raises(ConfigError, match=r"needs the datasets library, .* pip install 'moce-ds\[hf\]'"),
        opened_images(saved),
    ):
        pass


def test_a_shard_set_and_a_folder_do_not_need_the_library(
    tiny_images: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with opened_images(tiny_images) as images:
        assert images.fingerprint == ShardSet.open(tiny_shards).fingerprint


def test_the_verb_says_so(tmp_path: Path, tiny_moce_run: object) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    run = tiny_moce_run()  # type: ignore[operator]
    assert "has no column of images" in refused("select", run, "--data", tmp_path / "saved")
