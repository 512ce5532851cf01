"""Images and masks on canvases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moce_ds.data.scale_jitter import Jitter, View, draw_image, draw_mask

SIDE = 24
GREY = (0.5, 0.5, 0.5)


def picture() -> tuple[Image.Image, np.ndarray]:
    """White with a black rectangle, and the mask of that: 40 x 30 pixels."""
    mask_HW = np.zeros((30, 40), np.uint8)
    mask_HW[5:20, 12:34] = 1
    return Image.fromarray((1 - mask_HW) * 255).convert("RGB"), mask_HW


@given(st.integers(0, 5), st.integers(0, 10_000), st.sampled_from(["longer", "shorter"]), st.integers(0, 3))
def test_image_and_mask_stay_together(epoch: int, image: int, fit: str, seed: int) -> None:
    drawn, mask_HW = picture()
    view = Jitter(SIDE, (0.4, 2.0), fit, seed).view(drawn.size, epoch, image)  # type: ignore[arg-type]
    x1, y1, x2, y2 = view.box
    assert 0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 30 and 1 <= view.width <= SIDE and 1 <= view.height <= SIDE
    image_CHW, seen_HW = draw_image(drawn, view, SIDE, GREY), draw_mask(mask_HW, view, SIDE, fill=9)
    outside_HW = seen_HW == 9
    assert int((~outside_HW).sum()) == view.width * view.height
    assert (image_CHW[:, outside_HW] == 0.5).all()
    # But for the blurred edges of the rectangle, black is where the mask is.
    differs_HW = (image_CHW[0] - (1 - seen_HW.float())).abs() > 0.6
    assert int((differs_HW & ~outside_HW).sum()) <= 0.1 * view.width * view.height


def test_views_are_functions_of_seed_epoch_and_image() -> None:
    def view(seed: int, epoch: int, image: int) -> View:
        return Jitter(SIDE, (0.5, 2.0), "longer", seed).view((40, 30), epoch, image)

    assert view(0, 1, 2) == view(0, 1, 2)
    assert len({view(0, 1, 2), view(1, 1, 2), view(0, 2, 2), view(0, 1, 3)}) == 4


def test_scale_and_mirroring_are_spread() -> None:
    views = [Jitter(100, (0.5, 2.0), "longer", 0).view((100, 100), 0, image) for image in range(400)]
    assert 0.4 < np.mean([view.mirror for view in views]) < 0.6
    scales = np.array([view.width / (view.box[2] - view.box[0]) for view in views])
    assert 0.5 <= scales.min() < 0.53 and 1.95 < scales.max() <= 2.0 and 1.18 < scales.mean() < 1.32
    assert not any(Jitter(100, (1, 1), "longer", 0, flip=False).view((9, 9), 0, n).mirror for n in range(20))


@pytest.mark.parametrize(("fit", "width", "height"), [("longer", 24, 18), ("shorter", 24, 24)])
def test_which_side_fits(fit: str, width: int, height: int) -> None:
    view = Jitter(SIDE, (1, 1), fit, 0).view((40, 30), 0, 0)  # type: ignore[arg-type]
    assert (view.width, view.height) == (width, height)
    x1, y1, x2, y2 = view.box
    assert (x2 - x1, y2 - y1) == pytest.approx((40 if fit == "longer" else 30, 30))


def test_at_its_own_size_an_image_stays_as_it_is() -> None:
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
    canvas_CHW = draw_image(drawn, View((0, 0, SIDE, SIDE), SIDE, SIDE), SIDE, GREY)
    expected = torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(canvas_CHW, expected)
    mirrored = draw_image(drawn, View((0, 0, SIDE, SIDE), SIDE, SIDE, mirror=True), SIDE, GREY)
    torch.testing.assert_close(mirrored, expected.flip(2))
