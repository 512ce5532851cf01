"""Mask R-CNN around an encoder: it finds what it was shown, and what it finds is in pixels of the image."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moce_ds.common.config.settings import load
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.files import sha256_of
from moce_ds.data.scale_jitter import View, draw_image
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.coco_api import average_precision, unpack
from moce_ds.data.transform import ImageInput
from moce_ds.models.vit import Encoder, ViTShape, load_encoder, timm_vit
from moce_ds.tuning.detection import DetectionTask, build_detector, results, training_example, whole_view
from moce_ds.tuning.settings import DetectorSettings, DetectSettings
from tests.examples.dense_sets import OBJECTS, write_coco

GREY = (0.5, 0.5, 0.5)
SMALL = DetectorSettings(image_size=64, channels=16, proposals=40, samples=16, anchor=4.0, drop_path=0.0)


def test_it_learns_an_image_by_heart(tmp_path: Path, tiny_encoder: Path) -> None:
    """All parts at once: after some steps on one image both objects on it are found, boxes and masks."""
    data = CocoSet.open(*write_coco(tmp_path))
    torch.manual_seed(0)
    model = build_detector(load_encoder(tiny_encoder), SMALL, classes=2)
    view = whole_view((48, 32), 64)
    image_CHW, target = training_example(data, 1, view, 64, GREY)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(1, 401):
        losses = model.train()([image_CHW], [target])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        assert step > 1 or not [name for name, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        if step % 20 == 0:
            with torch.no_grad():
                (found,) = model.eval()([image_CHW])
            if learnt(data, results(data, 1, view, found)):
                return
    pytest.fail(f"not learnt after {step} steps: {found}")


def learnt(data: CocoSet, found: list[dict[str, Any]]) -> bool:
    """Whether the best detection of each class is the object of that class on image 1, and covers it."""
    best = {one["category_id"]: one for one in reversed(found)}  # they come best first
    rectangle, triangle, _ = data.objects[1]
    for thing in (rectangle, triangle):
        one, told_HW = best.get(thing.category_id), data.mask(1, thing)
        if one is None or one["image_id"] != 20 or one["bbox"] != pytest.approx(thing.bbox, abs=5):
            return False
        mask_HW = unpack(one["segmentation"], 32, 48)
        if (mask_HW & told_HW).sum() < 0.5 * (mask_HW | told_HW).sum():
            return False
    return True


def task_of(folder: Path, encoder: Path, *more: dict[str, Any]) -> DetectionTask:
    """A task of the small set with `more` annotations, and so many good ones that one without pixels is allowed."""
    good = [{**OBJECTS[1], "id": 10 + n} for n in range(12)]
    path, images = write_coco(folder, annotations=[OBJECTS[0], *good, *more])
    words = [
        f"data.train={path}",
        f"data.images={images}",
        f"data.encoder={encoder}",
        f"data.val={path}",
        f"run.out={folder / 'run'}",
    ]
    config = load(DetectSettings, overrides=[*words, "model.image_size=64", "model.channels=16"])
    return DetectionTask(config.data, config.model, config.optim, config.engine, config.run)


def test_a_run_knows_the_images_that_it_leaves_out(tmp_path: Path, tiny_encoder: Path) -> None:
    """Earlier versions learned from them: their runs must not go on with other images in each step."""
    empty = {"id": 4, "image_id": 10, "category_id": 3, "bbox": [8, 0, 1, 1], "segmentation": [[8, 0, 8, 0, 8, 0]]}
    all_seen, one_left_out = task_of(tmp_path / "a", tiny_encoder), task_of(tmp_path / "b", tiny_encoder, empty)
    assert all_seen.count == one_left_out.count == 1 and one_left_out.train.empty
    sums = [sha256_of(task.train.path) + load_encoder(tiny_encoder).fingerprint for task in (all_seen, one_left_out)]
    assert all_seen.fingerprint == hashlib.sha256(sums[0].encode()).hexdigest(), "as earlier versions wrote it"
    assert one_left_out.fingerprint != hashlib.sha256(sums[1].encode()).hexdigest()


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (200, 50), (7, 9)])
def test_results_are_in_pixels_of_the_image(tmp_path: Path, size: tuple[int, int]) -> None:
    """A box over the left half of the image on its canvas, with a mask that fills it, is the left half."""
    told = [{"id": 1, "file_name": "10.png", "width": size[0], "height": size[1]}]
    data = CocoSet.open(*write_coco(tmp_path, images=told, annotations=[]))
    view = whole_view(size, 64)
    found = {
        "boxes": torch.tensor([[0, 0, view.width / 2, view.height]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
        "masks": torch.ones(1, 1, 28, 28),
    }
    (one,) = results(data, 0, view, found)
    assert one["bbox"] == pytest.approx([0, 0, size[0] / 2, size[1]]) and one["score"] == 0.5
    mask_HW = unpack(one["segmentation"], size[1], size[0])
    assert mask_HW.shape == (size[1], size[0])
    assert abs(int(mask_HW.sum()) - size[0] * size[1] / 2) <= 2 * sum(size) and not mask_HW[:, size[0] // 2 + 2 :].any()


def test_the_whole_image_is_on_the_canvas() -> None:
    assert whole_view((100, 50), 64) == View((0, 0, 100, 50), 64, 32)
    assert whole_view((1, 1000), 64) == View((0, 0, 1, 1000), 1, 64)


def test_maps_are_taken_at_their_strides(tmp_path: Path) -> None:
    """torchvision takes strides from the sizes of maps and image; the padding of a canvas must not mislead it."""
    data = CocoSet.open(*write_coco(tmp_path))
    shape = ViTShape(64, 16, 32, 2, 2)
    encoder = Encoder(timm_vit(shape).eval(), shape, ImageInput(64), {})
    model = build_detector(encoder, SMALL, classes=2).eval()
    flat = View((0, 0, 48, 6), 64, 8)  # on a canvas that is nearly empty
    with torch.no_grad():
        model([draw_image(data.image(0), flat, 64, GREY)])
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_nothing_found_and_nothing_to_find(tmp_path: Path, tiny_encoder: Path) -> None:
    data = CocoSet.open(*write_coco(tmp_path))
    model = build_detector(load_encoder(tiny_encoder), SMALL, classes=2)
    image_CHW, target = training_example(data, 2, whole_view((48, 32), 64), 64, GREY)
    losses: dict[str, Tensor] = model([image_CHW], [target])
    assert torch.stack(list(losses.values())).isfinite().all() and losses["loss_mask"] == 0
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0), "masks": torch.zeros(0)}
    assert average_precision(data.truth, results(data, 2, whole_view((48, 32), 64), empty))["box_ap"] == 0


def test_patches_that_are_no_power_of_two_are_refused() -> None:
    shape = ViTShape(56, 14, 32, 2, 2)
    encoder = Encoder(timm_vit(shape), shape, ImageInput(56), {})
    with pytest.raises(ConfigError, match="patches have 14 pixels"):
        build_detector(encoder, SMALL, classes=2)
