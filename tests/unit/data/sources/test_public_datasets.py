"""Readers of the public data sets, on miniatures of what they ship."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from moce_ds.common.errors import DataError
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.public.datasets import NAMES, DatasetSettings, write_dataset
from tests.examples.images import contents
from tests.examples.moce_command import refused, run_here
from tests.examples.public_folders import MINIATURES, text

ONE = DatasetSettings(workers=1)
SPLITS = ("train", "val", "test")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., dict[str, ShardSet]]:
    """Make a miniature, write it, open it."""

    def write(name: str, config: DatasetSettings = ONE) -> dict[str, ShardSet]:
        if not (tmp_path / name).exists():
            MINIATURES[name](tmp_path / name)
        out = tmp_path / f"{name}-{config.seed}"
        write_dataset(name, tmp_path / name, out, config)
        return {split: ShardSet.open(out / split) for split in SPLITS}

    return write


def images(shards: ShardSet) -> dict[str, str]:
    """Class by source file name."""
    return {shards.source(i).rpartition("/")[2]: shards.classes[shards.labels[i]] for i in range(shards.count)}


def counts(shards: ShardSet) -> dict[str, int]:
    return dict(Counter(shards.classes[label] for label in shards.labels))


def test_every_reader_has_a_miniature() -> None:
    assert sorted(MINIATURES) == NAMES and len(NAMES) == 11


# What the lists of the miniatures say, by split; only numbers where the images are drawn.
OFFICIAL: dict[str, tuple[dict[str, str], ...]] = {
    "aircraft": (
        {"10.jpg": "707-320", "11.jpg": "F/A-18", "12.jpg": "A300 B4"},
        {"20.jpg": "F/A-18"},
        {"30.jpg": "707-320", "31.jpg": "A300 B4"},
    ),
    "dtd": tuple(
        {f"{texture}_{n:04d}.jpg": texture for texture in ("banded", "zigzagged") for n in numbers}
        for numbers in ((1, 2), (3,), (4, 5))
    ),
    "flowers102": (
        {"image_00001.jpg": "077", "image_00002.jpg": "003"},
        {"image_00003.jpg": "077", "image_00004.jpg": "003"},
        {"image_00005.jpg": "003", "image_00006.jpg": "077"},
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_splits(written: Callable[..., dict[str, ShardSet]], name: str) -> None:
    found = written(name)
    assert tuple(images(found[split]) for split in SPLITS) == OFFICIAL[name]
    assert found["train"].classes == found["val"].classes == found["test"].classes


CLASSES = {
    "cars": ("AM General Hummer", "Acura RL"),
    "cifar10": ("airplane", "automobile"),
    "cifar100": ("apple", "aquarium_fish"),
    "food101": ("apple_pie", "ramen"),
    "pets": ("Abyssinian", "american_bulldog"),
    "sun397": ("a/abbey", "c/church/indoor"),
}
ONE_OF_EACH = {name: (dict.fromkeys(classes, 1),) * 2 for name, classes in CLASSES.items()}
"""For validation, and for testing."""

DRAWN: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    "caltech101": (
        {"BACKGROUND_Google": 25, "accordion": 1, "yin_yang": 25},
        {"BACKGROUND_Google": 5, "accordion": 4, "yin_yang": 5},
        {"BACKGROUND_Google": 3, "accordion": 1, "yin_yang": 10},
    ),
    "cars": ({"AM General Hummer": 4, "Acura RL": 4}, *ONE_OF_EACH["cars"]),
    "cifar10": ({"airplane": 6, "automobile": 7}, ONE_OF_EACH["cifar10"][0], {"airplane": 1, "automobile": 2}),
    "cifar100": ({"apple": 4, "aquarium_fish": 4}, *ONE_OF_EACH["cifar100"]),
    "food101": ({"apple_pie": 1, "ramen": 1}, *ONE_OF_EACH["food101"]),
    "pets": ({"Abyssinian": 1, "american_bulldog": 1}, *ONE_OF_EACH["pets"]),
    "sun397": ({"a/abbey": 2, "c/church/indoor": 2}, *ONE_OF_EACH["sun397"]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_splits_that_are_drawn(written: Callable[..., dict[str, ShardSet]], name: str) -> None:
    found = written(name)
    assert tuple(counts(found[split]) for split in SPLITS) == DRAWN[name]
    drawn = [{found[split].source(i) for i in range(found[split].count)} for split in SPLITS]
    assert len(set.union(*drawn)) == sum(map(len, drawn)), "no image is in two splits"


def test_the_official_test_split_stays(written: Callable[..., dict[str, ShardSet]]) -> None:
    assert images(written("cars")["test"]) == {"00001.jpg": "Acura RL", "00002.jpg": "AM General Hummer"}
    assert images(written("food101")["test"]) == {"5.jpg": "ramen", "6.jpg": "apple_pie"}
    assert set(images(written("pets")["test"])) == {"Abyssinian_100.jpg", "american_bulldog_200.jpg"}


def test_a_seed_draws_the_same_images_again_and_another_seed_others(
    written: Callable[..., dict[str, ShardSet]], tmp_path: Path
) -> None:
    first, other = written("caltech101"), written("caltech101", DatasetSettings(workers=1, seed=1))
    before = contents(tmp_path / "caltech101-0")
    reports = write_dataset("caltech101", tmp_path / "caltech101", tmp_path / "caltech101-0", ONE)
    assert all(report.already_complete for report in reports.values())
    assert contents(tmp_path / "caltech101-0") == before
    assert images(first["test"]) != images(other["test"]) and counts(first["test"]) == counts(other["test"])


def test_voc_has_several_classes_an_image(written: Callable[..., dict[str, ShardSet]]) -> None:
    found = written("voc2007")
    targets = {split: shards.targets.tolist() for split, shards in found.items() if shards.targets is not None}
    assert found["train"].classes == ["cat", "sofa"]
    assert targets == {
        "train": [[1, 0], [0, 1], [1, -1]],  # the third sofa is difficult
        "val": [[0, 1]],
        "test": [[1, 1], [0, 0], [-1, 1]],
    }


def test_cifar_pixels_are_those_of_the_bytes(written: Callable[..., dict[str, ShardSet]], tmp_path: Path) -> None:
    test = written("cifar100")["test"]
    assert [test.classes[label] for label in test.labels] == ["aquarium_fish", "apple"]
    raw = np.fromfile(tmp_path / "cifar100/cifar-100-binary/test.bin", np.uint8)
    red, green = raw[2 : 2 + 1024].reshape(32, 32), raw[2 + 1024 : 2 + 2048].reshape(32, 32)
    decoded = np.asarray(test.decode(0))
    assert (decoded[..., 0] == red).all() and (decoded[..., 1] == green).all()
    assert (decoded[3, 7] == [red[3, 7], green[3, 7], raw[2 + 2048 + 3 * 32 + 7]]).all()


def test_the_verb(tmp_path: Path) -> None:
    MINIATURES["dtd"](tmp_path / "dtd")
    told = run_here("dataset", "dtd", tmp_path / "dtd", tmp_path / "out", "workers=1")
    assert told.status == 0, told
    assert re.search(rf"{tmp_path}/out/train: 4 images of 2 classes", told.out) and "/out/test: 4 images" in told.out
    assert "Unknown data set 'imagenet'; known: aircraft, caltech101" in refused(
        "dataset", "imagenet", tmp_path, tmp_path / "o"
    )
    assert "expected the data set dtd, unpacked" in refused("dataset", "dtd", tmp_path / "none", tmp_path / "o")
    assert "holds no dtd/labels and no labels: expected" in refused("dataset", "dtd", tmp_path, tmp_path / "o")


def spoil_class(root: Path) -> None:
    text(root / "dtd/labels/test1.txt", "banded/banded_0004.jpg", "striped/striped_0001.jpg")


def spoil_json(root: Path) -> None:
    (root / "food-101/meta/train.json").write_text('{"ramen": 3}')


def spoil_bytes(root: Path) -> None:
    path = root / "cifar-10-batches-bin/data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_row(root: Path) -> None:
    path = root / "cifar-10-batches-bin/data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-3073])


def spoil_test_row(root: Path) -> None:
    path = root / "cifar-100-binary/test.bin"
    path.write_bytes(path.read_bytes()[:-3074])


def spoil_label(root: Path) -> None:
    path = root / "cifar-10-batches-bin/data_batch_3.bin"
    path.write_bytes(b"\x07" + path.read_bytes()[1:])


def spoil_mat(root: Path) -> None:
    (root / "devkit/cars_train_annos.mat").write_bytes(b"no matlab")


def spoil_mat_end(root: Path) -> None:
    path = root / "setid.mat"
    path.write_bytes(path.read_bytes()[:60])


def spoil_class_number(root: Path) -> None:
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["one", "two"], object)[:1]})


def spoil_ids(root: Path) -> None:
    savemat(root / "setid.mat", {name: np.array([[99]]) for name in ("trnid", "valid", "tstid")})


def spoil_path(root: Path) -> None:
    text(root / "dtd/labels/val1.txt", "../../../etc/secret.jpg")


def spoil_line(root: Path) -> None:
    text(root / "data/images_variant_val.txt", "20 F/A-18", "21")


def spoil_empty(root: Path) -> None:
    text(root / "data/images_variant_val.txt", "")


def spoil_test_image(root: Path) -> None:
    (root / "jpg/image_00005.jpg").unlink()


def spoil_image(root: Path) -> None:
    (root / "dtd/images/banded/banded_0003.jpg").unlink()


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("dtd", spoil_class, r"the test split has classes \['striped'\] that no training image shows"),
        ("dtd", spoil_path, r"is listed and points outside"),
        ("dtd", spoil_image, r"banded_0003.jpg is listed and cannot be read"),
        ("food101", spoil_json, r"train.json is not a list of images by class"),
        ("cifar10", spoil_bytes, r"data_batch_3.bin has 9218 bytes; expected a multiple of 3073"),
        ("cifar10", spoil_row, r"data_batch_3.bin holds 2 images and test_batch.bin 3; expected 10000 and 10000"),
        ("cifar100", spoil_test_row, r"train.bin holds 10 images and test.bin 1; expected 50000 and 10000"),
        ("cifar10", spoil_label, r"names class 7 of 2"),
        ("cars", spoil_mat, r"cars_train_annos.mat: annotations cannot be read"),
        ("cars", spoil_class_number, r"names class 2 of 1"),
        ("flowers102", spoil_mat_end, r"setid.mat: trnid cannot be read"),
        ("flowers102", spoil_test_image, r"image_00005.jpg is listed and cannot be read"),
        ("flowers102", spoil_ids, r"names images that 6 labels do not cover"),
        ("aircraft", spoil_line, r"images_variant_val.txt, line 2: got '21'; expected 2 words"),
        ("aircraft", spoil_empty, r"the val split lists no image"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_data_sets_are_named(name: str, spoil: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    MINIATURES[name](tmp_path / name)
    spoil(tmp_path / name)
    with pytest.raises(DataError, match=told):
        write_dataset(name, tmp_path / name, tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists(), "nothing is written before all is looked at"


def test_complete_splits_stay_where_a_later_one_fails(tmp_path: Path) -> None:
    MINIATURES["flowers102"](tmp_path / "flowers102")
    images = [tmp_path / "flowers102/jpg" / f"image_{number:05d}.jpg" for number in (5, 6)]
    whole = [image.read_bytes() for image in images]
    for image in images:
        image.write_bytes(b"x" * image.stat().st_size)
    words = ("dataset", "flowers102", tmp_path / "flowers102", tmp_path / "out", "workers=1")
    told = refused(*words)
    assert "No image to write" in told
    assert (
        f"Complete: {tmp_path}/out/train, {tmp_path}/out/val. Fix the fault and rerun the same command to resume."
        in told
    )
    for image, content in zip(images, whole, strict=True):
        image.write_bytes(content)
    said = run_here(*words)
    assert said.status == 0 and said.out.count("(was complete)") == 2, said


def test_another_seed_is_named_where_it_draws_other_images(tmp_path: Path) -> None:
    for name in ("cars", "dtd"):
        MINIATURES[name](tmp_path / name)
        write_dataset(name, tmp_path / name, tmp_path / f"{name}-out", ONE)
    other = DatasetSettings(workers=1, seed=3)
    assert len(write_dataset("dtd", tmp_path / "dtd", tmp_path / "dtd-out", other)) == 3, "the splits are official"
    with pytest.raises(DataError, match="seed was 0, now 3, which may draw other images"):
        write_dataset("cars", tmp_path / "cars", tmp_path / "cars-out", other)


def test_the_output_is_no_file(tmp_path: Path) -> None:
    MINIATURES["dtd"](tmp_path / "dtd")
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/out is a file; expected a folder"):
        write_dataset("dtd", tmp_path / "dtd", tmp_path / "out", ONE)


def test_pickled_cifar_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"\x80")
    with pytest.raises(DataError, match="binary version"):
        write_dataset("cifar10", tmp_path, tmp_path / "out", ONE)
