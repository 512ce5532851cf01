"""The simple feature pyramid: its maps, the weights it takes from an encoder, attention in windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moce_ds.common.errors import ConfigError
from moce_ds.data.transform import ImageInput
from moce_ds.models.vit import Encoder, ViTShape, load_encoder, timm_vit
from moce_ds.tuning.pyramid import SimpleFeaturePyramid, WindowedViT, from_windows, to_windows
from moce_ds.tuning.settings import BackboneSettings


def encoder(patch: int = 4, grid: int = 4, depth: int = 6) -> Encoder:
    """An encoder with random weights, of patch x grid pixels."""
    torch.manual_seed(0)
    shape = ViTShape(patch * grid, patch, 32, depth, 2)
    return Encoder(timm_vit(shape).eval(), shape, ImageInput(shape.image_size), {})


def settings(**given: Any) -> BackboneSettings:
    return BackboneSettings(**{"image_size": 64, "channels": 8} | given)


@pytest.mark.parametrize(
    ("patch", "image_size", "strides"),
    [(16, 128, [4, 8, 16, 32]), (8, 64, [4, 8, 16, 32]), (4, 64, [4, 8, 16, 32]), (14, 112, [3.5, 7, 14, 28])],
)
def test_maps_by_patch_size(patch: int, image_size: int, strides: list[float]) -> None:
    pyramid = SimpleFeaturePyramid(encoder(patch), settings(image_size=image_size), extra="max_pool").eval()
    maps = pyramid(torch.zeros(2, 3, image_size, image_size))
    assert pyramid.strides == strides
    sides = [image_size / stride for stride in [*strides, 2 * strides[-1]]]
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        name: (2, 8, side, side) for name, side in zip(["0", "1", "2", "3", "pool"], sides, strict=True)
    }


def test_all_weights_learn_and_come_from_the_encoder(tiny_encoder: Path) -> None:
    given = load_encoder(tiny_encoder)
    pyramid = SimpleFeaturePyramid(given, settings(image_size=32, drop_path=0.0))
    for name, weight in pyramid.body.vit.state_dict().items():
        if name != "pos_embed":
            torch.testing.assert_close(weight, given.model.state_dict()[name])
    assert pyramid.body.vit.pos_embed.shape == (1, 64, 16)
    sum(m.square().sum() for m in pyramid(torch.rand(1, 3, 32, 32)).values()).backward()  # type: ignore[union-attr]
    assert not [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]


def test_stochastic_depth_leaves_a_block_out_for_whole_images() -> None:
    """All sixteen windows of an image or none of them, and what is kept is scaled."""
    vit = WindowedViT(encoder(grid=16), settings(window=4, drop_path=0.5))
    assert 4 not in vit.sees_all
    block, images, keep = vit.vit.blocks[4], 40, 0.6
    torch.manual_seed(1)
    x_NTD = torch.randn(images * 16, 4, 32)
    dropped_BK = (block.drop_path1(x_NTD) == 0).flatten(1).all(1).view(images, 16)
    assert torch.equal(dropped_BK, dropped_BK[:, :1].expand(-1, 16)) and 0 < dropped_BK[:, 0].sum() < images
    torch.testing.assert_close(block.drop_path2(torch.ones_like(x_NTD)).unique(), torch.tensor([0, 1 / keep]))
    assert torch.equal(block.eval().drop_path1(x_NTD), x_NTD)


def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass() -> None:
    """Training mode too: blocks are not dropped, or the encoder would not be what it was."""
    given, x_BCHW = encoder(), torch.rand(2, 3, 64, 64)
    pyramid = SimpleFeaturePyramid(given, settings(frozen=True, drop_path=0.9)).train()
    map_BDHW = pyramid.body(x_BCHW)
    assert not map_BDHW.requires_grad and torch.equal(map_BDHW, pyramid.body(x_BCHW))
    learning = {name for name, p in pyramid.named_parameters() if p.requires_grad}
    assert learning and not any(name.startswith("body.") for name in learning)


def test_at_its_own_size_the_encoder_computes_what_it_did() -> None:
    """The tokens of timm's own model, once its cls token is out of everyone's sight."""
    given = encoder()
    x_BCHW = torch.rand(2, 3, 16, 16)
    body = WindowedViT(given, settings(image_size=16)).eval()
    x_BTD = given.model.patch_embed(x_BCHW) + given.model.pos_embed[:, 1:]
    expected_BTD = given.model.norm(given.model.blocks(x_BTD))
    torch.testing.assert_close(body(x_BCHW), expected_BTD.transpose(1, 2).unflatten(2, (4, 4)))


def test_positions_are_resized() -> None:
    """A ramp over the grid of the encoder is a ramp over the larger one, but for its ends."""
    given = encoder()
    ramp_HW = torch.arange(4.0).expand(4, 4)
    given.model.pos_embed.data[:, 1:] = ramp_HW.flatten()[None, :, None]
    resized_HW = WindowedViT(given, settings(image_size=32)).vit.pos_embed[0, :, 0].unflatten(0, (8, 8))
    torch.testing.assert_close(resized_HW[0], resized_HW[5])
    steps = resized_HW[0].diff()
    assert (steps > 0).all() and steps[2:5].sub(0.5).abs().max() < 0.1


def test_windows_are_cut_and_put_together() -> None:
    tokens_BHWD = torch.arange(2 * 6 * 6).reshape(2, 6, 6, 1)
    windows_NTD = to_windows(tokens_BHWD, 3)
    assert windows_NTD.shape == (8, 9, 1)
    torch.testing.assert_close(windows_NTD[1, :, 0].reshape(3, 3), tokens_BHWD[0, :3, 3:, 0])
    torch.testing.assert_close(windows_NTD[6, :, 0].reshape(3, 3), tokens_BHWD[1, 3:, :3, 0])
    torch.testing.assert_close(from_windows(windows_NTD, 3, 6), tokens_BHWD)


def reach(body: WindowedViT, block: int) -> Tensor:
    """Which tokens of the grid the token (0, 0) of a block's output depends on, [H, W] of bool."""
    x_BHWD = torch.rand(1, body.side, body.side, 32, requires_grad=True)
    window = body.side if block in body.sees_all else body.window
    out = from_windows(body.vit.blocks[block](to_windows(x_BHWD, window)), window, body.side)
    out[0, 0, 0].sum().backward()
    assert x_BHWD.grad is not None
    return x_BHWD.grad[0].abs().sum(-1) > 0


def test_four_blocks_see_all_and_the_others_their_window() -> None:
    body = WindowedViT(encoder(depth=12), settings(window=4)).eval()
    assert body.sees_all == {2, 5, 8, 11}
    inside_HW = torch.zeros(16, 16, dtype=torch.bool)
    inside_HW[:4, :4] = True
    assert torch.equal(reach(body, 1), inside_HW)
    assert reach(body, 2).all()


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        body = WindowedViT(encoder(), settings(window=8, drop_path=0.5))
        body.vit.set_grad_checkpointing(again)
        torch.manual_seed(1)
        body(torch.ones(4, 3, 64, 64)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in body.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"image_size": 72}, "model.image_size: got 72; expected a multiple of 32 pixels"),
        ({"window": 5}, "model.window: got 5; it must divide the 16 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SimpleFeaturePyramid(encoder(), settings(**given))
