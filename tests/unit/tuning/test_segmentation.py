"""UperNet's loss, scores and sliding canvases, against computations by hand."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from moce_ds.data.sources.ade20k import IGNORED
from moce_ds.models.vit import load_encoder
from moce_ds.tuning.segmentation import (
    Segmenter,
    confusion,
    fitted,
    pixel_loss,
    segmentation_scores,
    slide,
    starts,
)
from moce_ds.tuning.settings import SegmenterSettings


def test_scores_by_hand() -> None:
    """Class 0: 3 of 4 found, one taken for 1. Class 1: both found. Class 2: its one taken for 0. Class 3: nowhere."""
    truth = torch.tensor([[0, 0, 0, 0], [1, 1, 2, IGNORED]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 2]])
    counts_KK = confusion(predicted, truth, classes=4)
    assert counts_KK.tolist() == [[3, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    scores = segmentation_scores(counts_KK)
    assert scores["miou"] == pytest.approx((3 / 5 + 2 / 3 + 0 / 1) / 3)
    assert scores["accuracy"] == pytest.approx(5 / 7)


def test_nothing_to_count() -> None:
    assert segmentation_scores(torch.zeros(3, 3, dtype=torch.int64)) == {"miou": 0.0, "accuracy": 0.0}


def test_the_loss_is_the_mean_over_pixels_with_a_class() -> None:
    logits_BKHW = torch.randn(1, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    labels_BHW = torch.tensor([[[2, IGNORED, 0]]], dtype=torch.uint8)
    log_KW = logits_BKHW.log_softmax(1)[0, :, 0]
    expected = -(log_KW[2, 0] + log_KW[0, 2]) / 2
    torch.testing.assert_close(pixel_loss(logits_BKHW, labels_BHW), expected)
    assert pixel_loss(logits_BKHW, torch.full_like(labels_BHW, IGNORED)) == 0


@pytest.mark.parametrize(
    ("length", "expected"), [(30, [0]), (31, [0, 1]), (50, [0, 20]), (51, [0, 10, 21]), (90, [0, 20, 40, 60])]
)
def test_canvases_cover_an_image(length: int, expected: list[int]) -> None:
    """A side of 30 may move on by 20 at most, so that a third overlaps."""
    assert starts(length, 30) == expected


class Dimmed(nn.Module):
    """The sum of the colours, less towards the canvas' right end."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        across_W = torch.linspace(1, 0, images_BCHW.shape[-1])
        return images_BCHW.sum(1, keepdim=True) * torch.stack([across_W, 1 - across_W])[None, :, None]


def test_logits_are_averaged_where_canvases_meet() -> None:
    image_CHW = torch.rand(3, 6, 10, generator=torch.Generator().manual_seed(0))
    logits_KHW = slide(Dimmed(), image_CHW, side=6, classes=2)
    # Every pixel's two logits add up to its colours, however many canvases see it.
    torch.testing.assert_close(logits_KHW.sum(0), image_CHW.sum(0))
    left, right = Dimmed()(image_CHW[None, :, :, :6])[0], Dimmed()(image_CHW[None, :, :, 4:])[0]
    torch.testing.assert_close(logits_KHW[:, :, 4:6], (left[:, :, 4:] + right[:, :, :2]) / 2)
    torch.testing.assert_close(logits_KHW[:, :, :4], left[:, :, :4])


def test_an_image_is_fitted_by_its_shorter_side() -> None:
    assert fitted(Image.new("RGB", (300, 200)), 64).shape == (3, 64, 96)
    assert fitted(Image.new("RGB", (2, 301)), 64).shape == (3, 9632, 64)


def test_the_segmenter_learns_a_picture_by_heart(tiny_encoder: Path) -> None:
    """Loss falls, every weight has a gradient, and nothing depends on the other images of a batch."""
    torch.manual_seed(0)
    config = SegmenterSettings(image_size=32, channels=16, hidden=16, drop_path=0.0)
    model = Segmenter(load_encoder(tiny_encoder), config, classes=3)
    images_BCHW = torch.rand(2, 3, 32, 32)
    labels_BHW = torch.zeros(2, 32, 32, dtype=torch.uint8)
    labels_BHW[:, :, 16:], labels_BHW[:, 20:] = 1, 2
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = pixel_loss(model(images_BCHW), labels_BHW)
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    torch.testing.assert_close(model(images_BCHW)[:1], model(images_BCHW[:1]), rtol=1e-3, atol=1e-4)
