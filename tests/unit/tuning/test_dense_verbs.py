"""What `moce detect` and `moce segment` refuse, before a run folder is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moce_ds.checkpoint.format import step_folder
from moce_ds.common.config.settings import load
from moce_ds.common.errors import DataError
from moce_ds.tuning.segmentation import SegmentationTask
from moce_ds.tuning.settings import SegmentSettings
from tests.examples.alone import ALONE
from tests.examples.dense_sets import CATEGORIES, OBJECTS, write_ade, write_coco
from tests.examples.moce_command import refused

SMALL = ("model.image_size=32", "model.channels=8")


def detect(tmp_path: Path, encoder: Path, *words: object) -> str:
    path, images = tmp_path / "coco" / "instances.json", tmp_path / "coco" / "images"
    if not path.exists():
        write_coco(tmp_path / "coco")
    given = ("--train", path, "--images", images, "--out", tmp_path / "run", *SMALL)
    return refused("detect", encoder, *given, *words)


def test_something_must_be_measured(tmp_path: Path, tiny_encoder: Path) -> None:
    assert "data.val, data.test: give at least one of them" in detect(tmp_path, tiny_encoder)


def test_splits_have_the_same_categories(tmp_path: Path, tiny_encoder: Path) -> None:
    other, _ = write_coco(tmp_path / "other", categories=[CATEGORIES[0], {"id": 3, "name": "leaf"}])
    told = detect(tmp_path, tiny_encoder, "--val", other)
    assert "{3: 'leaf', 7: 'roof'}" in told and "must be the same" in told


def test_there_must_be_something_to_learn_from(tmp_path: Path, tiny_encoder: Path) -> None:
    path, _ = write_coco(tmp_path / "coco")
    content = json.loads(path.read_text())
    content["annotations"] = [thing for thing in content["annotations"] if thing.get("iscrowd")]
    path.write_text(json.dumps(content))
    assert "has no annotation to learn from" in detect(tmp_path, tiny_encoder, "--test", path)


@pytest.mark.parametrize(
    ("annotations", "told"),
    [
        ([], "has no annotation to evaluate on"),
        ([{k: v for k, v in OBJECTS[0].items() if k != "segmentation"}], "annotation 1: segmentation is missing"),
    ],
)
@pytest.mark.parametrize("split", ["--val", "--test"])
def test_what_cannot_be_measured_is_refused_before_training(
    tmp_path: Path, tiny_encoder: Path, split: str, annotations: list[Any], told: str
) -> None:
    other, _ = write_coco(tmp_path / "other", annotations=annotations)
    said = detect(tmp_path, tiny_encoder, split, other)
    assert str(other) in said and told in said
    assert not (tmp_path / "run").exists()


def test_an_image_of_another_size_is_refused_before_training(tmp_path: Path, tiny_encoder: Path) -> None:
    other, images = write_coco(tmp_path / "other")
    Image.new("RGB", (48, 31)).save(images / "30.png")
    said = detect(tmp_path, tiny_encoder, "--test", other, "--eval-images", images)
    assert "30.png has 48 x 31 pixels" in said


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.scale=[2,1]", "data.scale: [2.0, 1.0]; expected [low, high]"),
        ("model.image_size=40", "model.image_size: got 40; expected a multiple of 32"),
        ("model.windows=3", "model.windows: no such setting. Did you mean model.window?"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, tiny_encoder: Path, word: str, told: str) -> None:
    write_coco(tmp_path / "coco")
    assert told in detect(tmp_path, tiny_encoder, "--val", tmp_path / "coco" / "instances.json", word)
    assert not (tmp_path / "run").exists()


def test_what_is_no_encoder_or_no_set(tmp_path: Path, tiny_encoder: Path) -> None:
    ade = write_ade(tmp_path / "ade")
    out = ("--out", tmp_path / "run", *SMALL)
    assert "none not found: expected an encoder" in refused(
        "segment", tmp_path / "none", "--train", ade, "--val", ade, *out
    )
    told = refused("segment", tiny_encoder, "--train", tmp_path, "--val", ade, *out)
    assert "images is not a folder: expected ADE20K's format" in told


def test_a_mask_that_cannot_be_measured_by_is_refused_before_training(tmp_path: Path, tiny_encoder: Path) -> None:
    train, test = write_ade(tmp_path / "train"), write_ade(tmp_path / "test")
    (test / "annotations" / "a.png").write_text("no mask")
    words = ("--out", tmp_path / "run", "data.classes=2", *SMALL)
    told = refused("segment", tiny_encoder, "--train", train, "--test", test, *words)
    assert f"{test / 'annotations' / 'a.png'} is not a readable mask" in told
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_does_not_look_at_its_masks_again(tmp_path: Path, tiny_encoder: Path) -> None:
    ade = write_ade(tmp_path / "ade")
    (ade / "annotations" / "a.png").write_text("no mask")
    paths = {"data.encoder": tiny_encoder, "data.train": ade, "data.val": ade, "run.out": tmp_path / "run"}
    words = [f"{key}={path}" for key, path in paths.items()]
    config = load(SegmentSettings, None, [*words, "data.classes=2", *SMALL])
    task = SegmentationTask(config.data, config.model, config.optim, config.engine, config.run)
    with pytest.raises(DataError, match=r"a\.png is not a readable mask"):
        task.check_data(ALONE)
    step_folder(tmp_path / "run", 1).mkdir(parents=True)
    task.check_data(ALONE)


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_of_all_splits_are_looked_at_before_training(tmp_path: Path, tiny_encoder: Path, workers: int) -> None:
    train, test = write_ade(tmp_path / "train", value=9), write_ade(tmp_path / "test")
    words = ("--out", tmp_path / "run", "data.classes=2", f"data.workers={workers}", *SMALL)
    told = refused("segment", tiny_encoder, "--train", train, "--test", test, *words)
    assert told == f"{train}/annotations/a.png holds the class 9; data.classes=2 from 1 were expected.\n"
    _, images = write_coco(tmp_path / "coco")
    (images / "10.png").write_bytes((images / "10.png").read_bytes()[:-100])
    instances = tmp_path / "coco" / "instances.json"
    told = detect(tmp_path, tiny_encoder, "--test", instances, f"data.workers={workers}")
    assert told.startswith(f"{images}/10.png is not a readable image")
    assert not (tmp_path / "run").exists()


def test_palettes_that_number_classes_differently_are_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    train = write_ade(tmp_path / "train")
    shutil.copy(train / "images" / "a.jpg", train / "images" / "b.jpg")
    mask = Image.open(train / "annotations" / "a.png")
    for name, colours in (("a", [0, 0, 0, 128, 0, 0, 0, 128, 0]), ("b", [0, 0, 0, 0, 128, 0, 128, 0, 0])):
        mask.putpalette(colours)
        mask.save(train / "annotations" / f"{name}.png")
    words = ("--out", tmp_path / "run", "data.classes=2", "data.workers=0", *SMALL)
    told = refused("segment", tiny_encoder, "--train", train, "--test", train, *words)
    assert "b.png: the palette shows 1 as (0, 128, 0), that of" in told


def test_larger_images_are_refused_with_the_setting_that_allows_them(tmp_path: Path, tiny_encoder: Path) -> None:
    train = write_ade(tmp_path / "train")
    words = ("--out", tmp_path / "run", "data.classes=2", *SMALL)
    told = refused("segment", tiny_encoder, "--train", train, "--test", train, "data.max_pixels=1535", *words)
    assert f"{train}/images/a.jpg: 1536 pixels; max_pixels=1535 were allowed" in told and "data.max_pixels" in told
    path, _ = write_coco(tmp_path / "coco")
    assert "raise data.max_pixels" in detect(tmp_path, tiny_encoder, "--val", path, "data.max_pixels=1535")


def test_a_run_is_no_file_and_a_step_no_more_than_the_set(tmp_path: Path, tiny_encoder: Path) -> None:
    path, _ = write_coco(tmp_path / "coco")
    assert "optim.batch_size: 64 images in a step exceed the 2 training images" in detect(
        tmp_path, tiny_encoder, "--val", path
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").write_text("")
    assert f"run.out: {tmp_path / 'run'} is a file" in detect(tmp_path, tiny_encoder, "--val", path)
