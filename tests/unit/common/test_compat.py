"""DeepSpeed imported in silence; torchvision's operators as `compat` writes them in torch, against plain loops."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moce_ds.common import compat

compat.supply_torchvision_operators()
from torchvision.ops import batched_nms, box_iou, nms, roi_align  # noqa: E402


def some_boxes(count: int, seed: int, size: float = 40.0) -> Tensor:
    a, b = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], dim=1)


def greedy(boxes_N4: Tensor, scores_N: Tensor, threshold: float) -> list[int]:
    """Best first: kept, unless a box that is kept overlaps by more."""
    kept: list[int] = []
    for index in scores_N.argsort(descending=True, stable=True).tolist():
        if all(box_iou(boxes_N4[[index]], boxes_N4[[other]]).item() <= threshold for other in kept):
            kept.append(index)
    return kept


@given(st.integers(0, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.3, 0.7]))
def test_nms_is_the_greedy_choice(count: int, seed: int, threshold: float) -> None:
    boxes_N4 = some_boxes(count, seed)
    scores_N = torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(seed)) / 8  # with ties
    assert compat.nms(boxes_N4, scores_N, threshold).tolist() == greedy(boxes_N4, scores_N, threshold)


def test_torchvisions_nms_is_the_same() -> None:
    boxes_N4, scores_N = some_boxes(100, seed=3), torch.linspace(0, 1, 100)
    assert nms(boxes_N4, scores_N, 0.3).tolist() == greedy(boxes_N4, scores_N, 0.3)


def test_a_chain_of_overlaps() -> None:
    """Each box overlaps its neighbours only: every other one is kept, which takes as many rounds."""
    left_N = torch.arange(30.0) * 5
    boxes_N4 = torch.stack([left_N, left_N * 0, left_N + 9, left_N * 0 + 9], dim=1)
    kept = compat.nms(boxes_N4, torch.linspace(1, 0, 30), 0.2)
    assert kept.tolist() == list(range(0, 30, 2))


def test_nms_by_class() -> None:
    boxes_N4 = torch.tensor([[0.0, 0, 10, 10]] * 4)
    kept = batched_nms(boxes_N4, torch.tensor([0.4, 0.9, 0.8, 0.7]), torch.tensor([0, 0, 1, 1]), 0.5)
    assert kept.tolist() == [1, 2]


def sample(map_HW: Tensor, y: float, x: float) -> float:
    """Bilinear interpolation between the centres of pixels; beyond the outer ones, the outer ones."""
    height, width = map_HW.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    dy, dx = y - top, x - left
    rows = torch.tensor([1 - dy, dy]), torch.tensor([1 - dx, dx])
    return float(rows[0] @ map_HW[top : top + 2, left : left + 2] @ rows[1])


def pooled(map_HW: Tensor, box: list[float], scale: float, bins: tuple[int, int], ratio: int, aligned: bool) -> Tensor:
    """One region, as the paper on Mask R-CNN has it."""
    x1, y1, x2, y2 = (v * scale - 0.5 * aligned for v in box)
    height, width = (side if aligned else max(side, 1.0) for side in (y2 - y1, x2 - x1))
    across, down = (ratio or math.ceil(side / n) for side, n in ((width, bins[1]), (height, bins[0])))
    out_HW = torch.zeros(bins)
    for row in range(bins[0]):
        for column in range(bins[1]):
            found = [
                sample(
                    map_HW,
                    y1 + (row + (i + 0.5) / down) * height / bins[0],
                    x1 + (column + (j + 0.5) / across) * width / bins[1],
                )
                for i in range(down)
                for j in range(across)
            ]
            out_HW[row, column] = sum(found) / len(found)
    return out_HW


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("align", [compat.roi_align, "of torchvision"])
def test_roi_align_is_the_mean_of_samples(align: object, ratio: int, aligned: bool) -> None:
    maps_BCHW = torch.randn(2, 2, 10, 12, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[0.0, 0, 48, 40]])  # samples lie beyond the centres of the outer pixels
    boxes_K4, image_K = torch.cat([some_boxes(5, seed=1), whole]), torch.tensor([1, 0, 0, 1, 1, 0])
    rois_K5 = torch.cat([image_K[:, None].float(), boxes_K4], dim=1)
    if align is compat.roi_align:
        found = compat.roi_align(maps_BCHW, rois_K5, 0.25, 3, 2, ratio, aligned)
    else:
        found = roi_align(maps_BCHW, rois_K5, (3, 2), 0.25, ratio, aligned)
    for k, (image, box) in enumerate(zip(image_K.tolist(), boxes_K4.tolist(), strict=True)):
        for channel in range(2):
            expected = pooled(maps_BCHW[image, channel], box, 0.25, (3, 2), ratio, aligned)
            torch.testing.assert_close(found[k, channel], expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_map_where_the_region_is() -> None:
    map_BCHW = torch.zeros(2, 1, 16, 16, requires_grad=True)
    compat.roi_align(map_BCHW, torch.tensor([[1.0, 4, 4, 8, 8]]), 1.0, 2, 2, 2, True).sum().backward()
    assert map_BCHW.grad is not None and float(map_BCHW.grad.sum()) == pytest.approx(4)  # a mean for each of 4 bins
    assert float(map_BCHW.grad[1, 0, 4:8, 4:8].sum()) == pytest.approx(4, rel=0.2) and not map_BCHW.grad[0].any()


def test_no_regions() -> None:
    assert compat.roi_align(torch.zeros(1, 3, 8, 8), torch.zeros(0, 5), 1.0, 7, 7, 2, False).shape == (0, 3, 7, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed says nothing where there is a GPU")
@pytest.mark.parametrize("module", ["moce_ds.training.pretrain", "moce_ds.checkpoint.manager", "moce_ds.moe.layer"])
def test_deepspeed_is_imported_in_silence(module: str) -> None:
    """Whichever module needs it first."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    started = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {module}, deepspeed"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
