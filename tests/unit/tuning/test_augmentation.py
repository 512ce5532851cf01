"""Augmentations depend on the image, the epoch and the seed, and targets follow what was mixed."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moce_ds.data.transform import ImageInput
from moce_ds.tuning.augmentation import Mixing, centre_transform, seed_item, training_transform
from moce_ds.tuning.settings import AugmentSettings

IDS, EPOCHS = np.array([5, 2, 9, 7]), np.array([0, 0, 1, 1])
SHADES = torch.tensor([0.0, 1.0, 0.2, 0.6])


def mixed(config: AugmentSettings, seed: int = 0, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Four images of one shade each, mixed, with the shares of the four in each."""
    images = SHADES[:, None, None, None].expand(4, 3, 8, 8).clone()[part]
    shares = torch.eye(4)[part]
    Mixing(config, seed)(images, shares, IDS[part], EPOCHS[part])
    return images, shares


@pytest.mark.parametrize("kind", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}], ids=str)
def test_targets_are_the_shares_of_the_pixels(kind: dict[str, float]) -> None:
    for seed in range(20):
        images, shares = mixed(AugmentSettings(**kind), seed)
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), shares @ SHADES)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
        assert not shares[:2, 2:].any() and not shares[2:, :2].any(), "neighbours are mixed, and nobody else"
    assert any((0.05 < mixed(AugmentSettings(**kind), seed)[1][0, 1] < 0.95) for seed in range(20))


def test_a_pair_is_mixed_alike_in_any_batch() -> None:
    config = AugmentSettings()
    whole, halves = mixed(config), [mixed(config, part=part) for part in (slice(0, 2), slice(2, 4))]
    for k in range(2):
        assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    assert not torch.equal(whole[1], mixed(config, seed=1)[1])


def test_without_mixing_nothing_changes() -> None:
    images, shares = mixed(AugmentSettings(mixup=0, cutmix=0))
    assert torch.equal(images[:, 0, 0, 0], SHADES) and torch.equal(shares, torch.eye(4))


@pytest.fixture
def photo() -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).resize((48, 48))


def test_an_image_is_augmented_by_epoch_and_seed_alone(photo: Image.Image) -> None:
    transform = training_transform(ImageInput(16), AugmentSettings(erase=1.0))

    def drawn(*counters: int) -> Tensor:
        np.random.rand(), torch.rand(1)  # what was drawn before does not matter
        seed_item(*counters)
        return transform(photo)

    first = drawn(0, 3, 7)
    assert first.shape == (3, 16, 16) and torch.equal(first, drawn(0, 3, 7))
    for other in ((1, 3, 7), (0, 4, 7), (0, 3, 8)):
        assert not torch.equal(first, drawn(*other))


def test_a_test_image_is_the_centre(photo: Image.Image) -> None:
    input = ImageInput(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), center_crop=0.5)
    crop = photo.crop((12, 12, 36, 36)).resize((16, 16), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    assert (centre_transform(input)(photo) - expected).abs().mean() < 0.02
