"""Windows of crops: inside the image, distributed as torchvision's, a function of (seed, epoch, image id)."""

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from moce_ds.common.compat import repair_torchvision
from moce_ds.data.transform import CenterCrop, ImageInput, RandomCrop, Windows

repair_torchvision()
from torchvision.transforms import RandomResizedCrop  # noqa: E402  (needs the repair)

SIDES = st.integers(1, 3000)


def windows(crop: RandomCrop | CenterCrop, ids: np.ndarray, height: int, width: int, epoch: int = 0) -> Windows:
    sizes = (np.full(len(ids), side, np.int32) for side in (height, width))
    return crop.windows(ids, np.full_like(ids, epoch), *sizes)


def columns(found: Windows) -> np.ndarray:
    """[B, 5]: top, left, height, width, mirror."""
    return np.concatenate([found.start_B2, found.shape_B2, found.mirror_B[:, None]], axis=1)


@given(SIDES, SIDES, st.integers(0, 2**63 - 1), st.sampled_from([(0.2, 1.0), (0.001, 0.01), (1.0, 1.0)]))
def test_windows_lie_inside_the_image(height: int, width: int, seed: int, scale: tuple[float, float]) -> None:
    for crop in (RandomCrop(seed, scale), CenterCrop(scale[0])):
        found = windows(crop, np.arange(20), height, width)
        assert found.start_B2.dtype == found.shape_B2.dtype == found.mirror_B.dtype == np.int32
        assert (found.start_B2 >= 0).all() and (found.shape_B2 >= 1).all()
        assert (found.start_B2 + found.shape_B2 <= [height, width]).all()


def test_area_ratio_and_place_are_distributed_as_torchvision_s() -> None:
    torch.manual_seed(0)
    image, n = torch.empty(3, 300, 400), 3000
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    ours = columns(windows(RandomCrop(0), np.arange(n), 300, 400)).astype(float)
    for measure in (
        lambda w: w[:, 2] * w[:, 3],  # area
        lambda w: w[:, 3] / w[:, 2],  # aspect ratio
        lambda w: w[:, 0] + w[:, 2] / 2,  # centre
        lambda w: w[:, 1] + w[:, 3] / 2,
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@given(SIDES, SIDES)
@example(10, 2000)
@example(2000, 10)
@example(100, 134)  # an odd pixel is left on one side
@example(135, 100)
@example(1, 1)
def test_where_no_try_fits_the_window_is_torchvision_s(height: int, width: int) -> None:
    """The largest centred window of an allowed ratio; an area share of 2 never fits."""
    size = torch.empty(1).expand(3, height, width)  # costs no memory
    theirs = RandomResizedCrop.get_params(size, [2.0, 2.0], [3 / 4, 4 / 3])
    ours = columns(windows(RandomCrop(0, (2.0, 2.0)), np.arange(2), height, width))
    assert ours[:, :4].tolist() == [list(theirs)] * 2


def test_half_of_the_images_are_mirrored_or_none() -> None:
    ids = np.arange(4000)
    assert abs(windows(RandomCrop(0), ids, 30, 40).mirror_B.mean() - 0.5) < 0.03
    assert not windows(RandomCrop(0, flip=False), ids, 30, 40).mirror_B.any()
    assert not windows(CenterCrop(1.0), ids, 30, 40).mirror_B.any()


@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_window_depends_on_seed_epoch_and_id_only(order: list[int], size: int) -> None:
    ids = np.array(order) * 10**9
    heights, widths = (np.array(order) * 7 + 30).astype(np.int32), (np.array(order) * 3 + 50).astype(np.int32)
    epochs = np.array(order) % 3
    whole = columns(RandomCrop(5).windows(ids, epochs, heights, widths))
    cut = slice(0, size)
    part = columns(RandomCrop(5).windows(ids[cut], epochs[cut], heights[cut], widths[cut]))
    np.testing.assert_array_equal(part, whole[cut])
    rank = np.argsort(order)
    in_order = columns(RandomCrop(5).windows(ids[rank], epochs[rank], heights[rank], widths[rank]))
    np.testing.assert_array_equal(in_order, whole[rank])


def test_seed_epoch_and_id_each_give_another_window() -> None:
    ids = np.arange(50)
    first = columns(windows(RandomCrop(0), ids, 300, 400))
    assert len(np.unique(first, axis=0)) == 50
    for other in (windows(RandomCrop(1), ids, 300, 400), windows(RandomCrop(0), ids, 300, 400, epoch=1)):
        assert (columns(other) == first).all(axis=1).sum() == 0


def test_center_crop_keeps_its_share_of_the_shorter_side() -> None:
    found = columns(windows(CenterCrop(0.875), np.arange(1), 256, 400))[0]
    assert found.tolist() == [16, 88, 224, 224, 0]
    assert columns(windows(CenterCrop(1.0), np.arange(1), 31, 20))[0].tolist() == [5, 0, 20, 20, 0]


def test_image_input_survives_json() -> None:
    chosen = ImageInput(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0)
    assert ImageInput.from_tree(chosen.to_tree()) == chosen
    assert type(chosen.to_tree()["mean"]) is list
