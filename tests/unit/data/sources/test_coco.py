"""Sets in COCO's format: what is read, what is refused, and the average precision."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.data.scale_jitter import View
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.coco_api import average_precision, box_of, has_pixels, pack, segmentation_fault
from moce_ds.tuning.detection import training_example
from tests.examples.dense_sets import CATEGORIES, OBJECTS, write_coco


def test_a_set_is_read(tmp_path: Path) -> None:
    data = CocoSet.open(*write_coco(tmp_path))
    assert [image.id for image in data.images] == [10, 20, 30]
    assert [[thing.id for thing in objects] for objects in data.objects] == [[4], [1, 2, 3], []]
    assert data.labels == {3: 0, 7: 1} and data.categories == {3: "petal", 7: "roof"}
    assert data.with_objects == [0, 1]
    assert data.image(2).size == (48, 32)


def test_masks_of_polygons_and_of_both_kinds_of_rle(tmp_path: Path) -> None:
    data = CocoSet.open(*write_coco(tmp_path))
    rectangle, triangle, crowd = data.objects[1]
    mask_HW = data.mask(1, rectangle)
    assert mask_HW.shape == (32, 48) and mask_HW[8:18, 4:20].all() and mask_HW.sum() == 160
    assert 80 < data.mask(1, triangle).sum() < 120
    assert data.mask(1, crowd)[:, :8].all() and data.mask(1, crowd).sum() == 256
    (again,) = pack(mask_HW[None].astype(bool))
    assert box_of(again) == [4, 8, 16, 10]
    np.testing.assert_array_equal(data.mask(1, type(rectangle)(9, 20, 7, (0, 0, 1, 1), again)), mask_HW)


def test_an_example_holds_what_is_seen(tmp_path: Path) -> None:
    """Magnified twice and mirrored, from pixel (16, 0): the rectangle ends at the cut, crowds are left out."""
    data = CocoSet.open(*write_coco(tmp_path))
    view = View((16, 0, 48, 32), 64, 64, mirror=True)
    image_CHW, target = training_example(data, 1, view, 80, (0.5, 0.5, 0.5))
    assert image_CHW.shape == (3, 80, 80) and (image_CHW[:, 64:] == 0.5).all() and (image_CHW[:, :, 64:] == 0.5).all()
    assert target["labels"].tolist() == [2, 1]
    assert target["boxes"][0].tolist() == [56, 16, 64, 36]  # x 16-20 and y 8-18 of the image
    assert target["masks"].shape == (2, 80, 80) and target["masks"][0].sum() == 8 * 20
    _, nothing = training_example(data, 1, View((21, 0, 29, 32), 16, 64), 80, (0.5, 0.5, 0.5))
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 80, 80)


def changed(number: int, **values: Any) -> list[dict[str, Any]]:
    """The annotations with one of them changed."""
    objects = copy.deepcopy(OBJECTS)
    objects[number] |= values
    return objects


MISSING = [{"id": 1, "file_name": "lost.png", "width": 48, "height": 32}]
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"annotations": changed(1, bbox=[30, 10, 30, 20])}, "annotation 2: box .* is not inside its image 20.png"),
    ({"annotations": changed(1, bbox=[-9, 10, 10, 20])}, "annotation 2: box"),
    ({"annotations": changed(1, category_id=8)}, "annotation 2 has category 8"),
    ({"annotations": changed(1, image_id=5)}, "annotation 2 belongs to image 5"),
    ({"annotations": changed(1, bbox=[1, 2, 3])}, r"annotations\.1\.bbox"),
    ({"images": MISSING}, "lost.png not found: it is image 1 of .*; 1 of 1"),
    ({"categories": [*CATEGORIES, {"id": 3, "name": "stalk"}]}, "categories: 2 have the id 3"),
    ({"categories": []}, "`categories` is empty"),
    ({"images": None}, r"images: .*list"),
    ({"annotations": changed(1, bbox=[1, 2, "x", 3])}, r"annotations\.1\.bbox\.2 \(id 2\)"),
    ({"annotations": [*OBJECTS, OBJECTS[1]]}, "annotations: 2 have the id 2"),
    ({"annotations": changed(1, bbox=[30, 10, -1, 20])}, "annotation 2: box"),
    ({"annotations": changed(1, bbox=[30, 10, float("nan"), 20])}, "annotation 2: box"),
    ({"annotations": changed(1, bbox=[30, 10, 10, float("inf")])}, "annotation 2: box"),
    ({"annotations": changed(1, iscrowd=2)}, "annotation 2: iscrowd is 2; expected 0 or 1"),
    ({"annotations": changed(1, area=-1)}, "annotation 2: area is -1.0; expected"),
    ({"annotations": changed(1, area=float("nan"))}, "annotation 2: area is nan; expected"),
    ({"images": [MISSING[0] | {"width": 10**6, "height": 10**3}]}, "image 1 .* has 1000000 x 1000 pixels; expected"),
    ({"images": [MISSING[0] | {"width": 2 * 10**6, "height": 1}]}, "expected .* 1000000 along a side at most"),
    *(({"images": [MISSING[0] | {"file_name": name}]}, "image 1: file_name .*; expected the path of a file below")
      for name in ("/etc/a.png", "../a.png", "x/../../a.png", "a\0.png", "", ".", "..", "\ud800.png")),
    ({"images": [MISSING[0] | {"file_name": "n" * 300}]}, "not found"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "told"), FAULTS)
def test_a_fault_of_the_file_is_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        CocoSet.open(*write_coco(tmp_path, **changes))


def packed(mask_HW: Any) -> dict[str, Any]:
    return pack(mask_HW[None])[0]


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"size": [48, 32], "counts": [0, 256, 1280]}, r"is of height and width \[48, 32\]; its image has \[32, 48\]"),
        (packed(np.ones((48, 32), bool)), "is of height and width"),
        ({"size": [32, 48], "counts": [0, 256, 1281]}, "is RLE whose runs do not add up to the 32 x 48 pixels"),
        ({"size": [32, 48], "counts": [300, -44, 1280]}, "is RLE whose runs do not add up"),
        ({"size": [32, 48], "counts": ["0"]}, "is RLE whose runs do not add up"),
        (packed(np.eye(32, 48, dtype=bool)) | {"counts": packed(np.eye(32, 48, dtype=bool))["counts"][:-3]}, "is RLE"),
        ({"size": [32, 48], "counts": "\u1234"}, "is RLE"),
        ({"size": 7, "counts": []}, "is of height and width 7"),
        ([[1, 2, 3, 4]], "is neither polygons, of three points or more, nor RLE"),
        ([[1, 2, 3, 4, 5, "6"]], "is neither"),
        ([[1, 2, 3, 4, 5, float("nan")]], "is neither"),
        (None, "is missing"),
        ([], "is neither"),
        ([[1, 2, 3, 4, 5, 10**400]], "is neither"),
        ([[1, 2, 3, 4, 5, float("inf")]], "is neither"),
        ([[1, 2, 3, 4, 5]], "is neither"),
        ([[30, 10, 40, 10, 2e8, 3e8]], r"has a corner of x 2e\+08, outside of its image of 48 x 32 pixels"),
        ([[30, 10, 40, 10, 30, 30], [30, 10, 40, -3, 30, 30]], "has a corner of y -3, outside"),
        ([[0, 0, 48, 0, 0, 0] * 20_000], "has an outline of 1920000 pixels; expected 1000000 at most"),
        ([[1, 1, 2, 1, 1, 2]] * 10_001, "has 10001 polygons"),
        ({"size": [32.0, 48], "counts": "x" * 10}, "is RLE"),
        ({"size": [32, 48], "counts": "P" * 100_000}, "is RLE"),  # one number without end
        ({"size": [32, 48], "counts": "P" * 20 + "0" + packed(np.ones((32, 48), bool))["counts"]}, "is RLE"),
    ],
)
def test_a_mask_that_cannot_be_is_named(tmp_path: Path, shape: Any, told: str) -> None:
    """When the set is opened: pycocotools would only see it after training."""
    with pytest.raises(DataError, match=rf"instances\.json: annotation 2: segmentation {told}"):
        CocoSet.open(*write_coco(tmp_path, annotations=changed(1, segmentation=shape)))


EMPTY = [
    ({"bbox": [30, 10, 10, 0]}, "a box of 10 x 0 pixels"),
    ({"segmentation": [[4, 4, 10, 10, 20, 20]]}, "a mask without a pixel"),  # on a line
    ({"segmentation": {"size": [32, 48], "counts": [1536]}}, "a mask without a pixel"),
    ({"segmentation": packed(np.zeros((32, 48), bool))}, "a mask without a pixel"),
    (
        {"segmentation": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]},
        "inside the first pixel, like coordinates relative to the image size",
    ),
    ({"bbox": [0.1, 0.1, 0.5, 0.9]}, "inside the first pixel, like coordinates relative to the image size"),
]


@pytest.mark.parametrize(("values", "why"), EMPTY)
def test_objects_without_pixels_are_left_out_where_they_are_few(
    tmp_path: Path, values: dict[str, Any], why: str
) -> None:
    """They stay what detections are compared with, as the file has them."""
    objects = [*changed(1, **values), *(OBJECTS[3] | {"id": number} for number in range(5, 12))]
    path, images = write_coco(tmp_path, annotations=objects)
    with pytest.raises(DataError, match=rf"1 of 4 annotations has nothing to learn.*\n  annotation 2: {why}"):
        CocoSet.open(*write_coco(tmp_path / "many", annotations=objects[:4]))
    data = CocoSet.open(path, images)
    assert data.warning == f"{path}: 1 of 11 annotations is skipped in training:\n  annotation 2: {why}"
    assert [thing.id for thing in data.to_learn(1)] == [1] and data.with_objects == [0, 1]
    assert len(data.truth["annotations"]) == 11
    _, target = training_example(data, 1, View((0, 0, 48, 32), 48, 32), 48, (0.5, 0.5, 0.5))
    assert target["labels"].tolist() == [2]


def test_a_time_in_proportion() -> None:
    """A million runs, of both kinds, and a polygon that winds ten thousand times."""
    many_HW = np.indices((1000, 1000)).sum(0) % 2 == 1
    counts = {"size": [1000, 1000], "counts": [0, *[1] * 10**6]}
    for shape in (packed(many_HW), counts, [[0, 0, 9, 0, 0, 9] * 10_001]):
        assert segmentation_fault(shape, 1000, 1000, 0) is None
        assert has_pixels(shape, 1000, 1000)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_packed_masks_of_any_kind_are_taken(tmp_path: Path, share: float) -> None:
    mask_HW = np.random.default_rng(0).random((32, 48)) < share
    data = CocoSet.open(*write_coco(tmp_path, annotations=changed(1, segmentation=packed(mask_HW))))
    np.testing.assert_array_equal(data.mask(1, data.objects[1][1]), mask_HW)


def test_a_file_that_is_no_json_an_image_of_other_size_and_one_that_is_damaged(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path)
    data = CocoSet.open(path, images)
    Image.new("RGB", (40, 32)).save(images / "10.png")
    for look in (partial(data.image, 0), partial(data.check_headers, range(3))):
        with pytest.raises(DataError, match=r"10\.png has 40 x 32 pixels; .* says 48 x 32"):
            look()
    (images / "20.png").write_bytes((images / "20.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"20\.png is not a readable image"):
        data.image(1)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        CocoSet.open(path, images)
    with pytest.raises(DataError, match=r"other\.json is missing: expected COCO's instances"):
        CocoSet.open(tmp_path / "other.json", images)


@pytest.mark.parametrize("first_id", [1, 0])  # pycocotools counts what is found of the annotation 0 as not found
def test_average_precision(tmp_path: Path, first_id: int) -> None:
    """What is there, found exactly, is worth 1; one of three objects missed and a box far off cost what they must."""
    objects = [thing | {"id": number} for number, thing in enumerate(OBJECTS, first_id)]
    data = CocoSet.open(*write_coco(tmp_path, annotations=objects))
    truth = [(number, thing) for number, objects in enumerate(data.objects) for thing in objects if not thing.iscrowd]
    found = [
        {
            "image_id": thing.image_id,
            "category_id": thing.category_id,
            "score": 0.9,
            "bbox": list(thing.bbox),
            "segmentation": pack(data.mask(number, thing)[None])[0],
        }
        for number, thing in truth
    ]
    perfect = average_precision(data.truth, found)
    assert perfect["box_ap"] == pytest.approx(1) and perfect["mask_ap"] == pytest.approx(1)
    assert perfect["box_ap_large"] == -1
    # Of two petals one is found: precision 1 up to a recall of a half, so 51 of the 101 points; the roof stays whole.
    missed = average_precision(data.truth, found[1:])
    assert missed["box_ap"] == pytest.approx((51 / 101 + 1) / 2)
    found[1]["bbox"] = [30, 20, 16, 10]  # the roof's box, elsewhere; its mask stays
    moved = average_precision(data.truth, found)
    assert moved["box_ap"] == pytest.approx(0.5) and moved["mask_ap"] == pytest.approx(1)
    assert average_precision(data.truth, [])["mask_ap"] == 0
