"""The masked autoencoder against the paper written down a second time, in loops.

Axes: B images, N patches, T tokens, D width, P pixels of a patch x 3.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, linear

from moce_ds.models.mae import (
    DecoderShape,
    MaskedAutoencoder,
    mask_noise,
    normalised_patches,
    patchify,
    random_masking,
    sincos_positions,
    unpatchify,
)
from moce_ds.models.vit import ViTShape

SHAPE, DECODER = ViTShape(16, 4, 16, 3, 2), DecoderShape(8, 2, 2)


def model(seed: int = 0) -> MaskedAutoencoder:
    """A tiny MAE in float64 with every parameter random, zeros and ones of the start included."""
    torch.manual_seed(seed)
    made = MaskedAutoencoder(SHAPE, DECODER, 0.75).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


@pytest.fixture(scope="module")
def images(photo_pixels: Tensor) -> Tensor:
    return photo_pixels[::2]


# The paper, in loops: one image at a time.


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def transformer_block(x_TD: Tensor, block: Any, heads: int) -> Tensor:
    T, D = x_TD.shape
    normed = layer_norm(x_TD, block.norm1)
    qkv = linear(normed, block.attn.qkv.weight, block.attn.qkv.bias).reshape(T, 3, heads, D // heads)
    mixed = []
    for head in range(heads):
        q, k, v = (qkv[:, part, head] for part in range(3))
        mixed.append(torch.softmax(q @ k.T / math.sqrt(D // heads), dim=-1) @ v)
    x_TD = x_TD + linear(torch.cat(mixed, dim=1), block.attn.proj.weight, block.attn.proj.bias)
    hidden = gelu(linear(layer_norm(x_TD, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x_TD + linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)


def patches_of(image: Tensor, side: int) -> list[Tensor]:
    """Patches row by row; the pixels of one run over (row, column, channel)."""
    found = []
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            patch = image[:, top : top + side, left : left + side]
            found.append(torch.stack([patch[c, y, x] for y in range(side) for x in range(side) for c in range(3)]))
    return found


def paper_loss(mae: MaskedAutoencoder, images: Tensor, noise: Tensor, keep: int) -> Tensor:
    squared = []
    for image, order in zip(images, noise, strict=True):
        patches = patches_of(image, SHAPE.patch_size)
        visible = sorted(range(len(patches)), key=lambda n: order[n].item())[:keep]
        # timm's patch embedding is a convolution: its weights run over (channel, row, column).
        kernel = mae.patch_embed.proj.weight.permute(0, 2, 3, 1).reshape(SHAPE.width, -1)
        tokens = [mae.cls_token[0, 0] + mae.pos_embed[0, 0]]
        tokens += [kernel @ patches[n] + mae.patch_embed.proj.bias + mae.pos_embed[0, 1 + n] for n in visible]
        x = torch.stack(tokens)
        for block in mae.blocks:
            x = transformer_block(x, block, SHAPE.heads)
        x = linear(layer_norm(x, mae.norm), mae.decoder_embed.weight, mae.decoder_embed.bias)
        whole = [x[1 + visible.index(n)] if n in visible else mae.mask_token[0, 0] for n in range(len(patches))]
        x = torch.stack([x[0], *whole]) + mae.decoder_pos_embed[0]
        for block in mae.decoder_blocks:
            x = transformer_block(x, block, DECODER.heads)
        predicted = linear(layer_norm(x, mae.decoder_norm), mae.decoder_pred.weight, mae.decoder_pred.bias)[1:]
        for n in set(range(len(patches))) - set(visible):
            target = (patches[n] - patches[n].mean()) / (patches[n].var(unbiased=True) + 1e-6).sqrt()
            squared.append(((predicted[n] - target) ** 2).mean())
    return torch.stack(squared).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_those_of_the_paper(images: Tensor, seed: int) -> None:
    mae = model(seed)
    noise = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
    expected = paper_loss(mae, images, noise, keep=4)
    found = mae(images, noise).loss
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    names, parameters = zip(*mae.named_parameters(), strict=True)
    gradients = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for name, mine, reference in zip(names, *gradients, strict=True):
        assert (mine - reference).abs().max() < 1e-6 * max(1, reference.abs().max().item()), name


def test_visible_patches_are_not_in_the_loss(images: Tensor) -> None:
    output = model()(images, torch.rand(6, 16)).reconstruction
    target = normalised_patches(patchify(images, 4))
    hidden = output.mask_BN.bool()
    assert hidden.sum(dim=1).tolist() == [12] * 6
    assert output.loss.item() == pytest.approx(((output.patches_BNP - target)[hidden] ** 2).mean().item(), abs=1e-6)


def test_names_are_those_of_the_public_mae() -> None:
    tiny = MaskedAutoencoder(ViTShape(16, 4, 16, 1, 2), DecoderShape(8, 1, 2), 0.75)

    def block(prefix: str) -> set[str]:
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        return {f"{prefix}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    layers = ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
    assert set(tiny.state_dict()) == {
        "cls_token", "pos_embed", "mask_token", "decoder_pos_embed",
        *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")),
        *block("blocks.0"), *block("decoder_blocks.0"),
    }  # fmt: skip
    assert set(tiny.state_dict()) - {name for name, _ in tiny.named_parameters()} == {"pos_embed", "decoder_pos_embed"}


def test_public_sizes() -> None:
    """ViT-B/16 with the public decoder has 111.9 million parameters, position tables included, as the public code's."""
    with torch.device("meta"):
        public = MaskedAutoencoder(ViTShape(224, 16, 768, 12, 12), DecoderShape(512, 8, 16), 0.75)
    assert sum(tensor.numel() for tensor in public.state_dict().values()) == 111_907_840
    assert public.pos_embed.shape == (1, 197, 768) and public.decoder_pos_embed.shape == (1, 197, 512)


@pytest.mark.parametrize("width", [16, 64])
def test_position_table(width: int) -> None:
    """Channels in quarters: sine and cosine of the column, then of the row; frequency falls from 1 to 1e-4."""
    table = sincos_positions(SHAPE, width)
    assert table.shape == (1, 17, width) and table.dtype == torch.float32
    assert not table[0, 0].any()  # cls
    quarter = width // 4
    for row in range(4):
        for column in range(4):
            found = table[0, 1 + 4 * row + column].tolist()
            frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
            expected = [math.sin(column * f) for f in frequencies] + [math.cos(column * f) for f in frequencies]
            expected += [math.sin(row * f) for f in frequencies] + [math.cos(row * f) for f in frequencies]
            assert found == pytest.approx(expected, abs=1e-7)


def test_positions_are_not_trained() -> None:
    assert not any(name.endswith("pos_embed") for name, _ in model().named_parameters())


@given(st.integers(1, 80), st.floats(0, 0.99), st.integers(0, 2**32 - 1))
def test_masking_keeps_the_lowest_noise(num_patches: int, ratio: float, seed: int) -> None:
    noise = torch.rand(5, num_patches, generator=torch.Generator().manual_seed(seed))
    masking = random_masking(noise, ratio)
    keep = int(num_patches * (1 - ratio))
    assert masking.visible_BV.shape == (5, keep)
    for b in range(5):
        visible = masking.visible_BV[b].tolist()
        hidden = [n for n in range(num_patches) if n not in visible]
        assert masking.mask_BN[b].nonzero().flatten().tolist() == hidden
        assert not visible or not hidden or noise[b, visible].max() <= noise[b, hidden].min()
        restored = [sorted(range(num_patches), key=lambda n: noise[b, n].item())[k] for k in masking.restore_BN[b]]
        assert restored == list(range(num_patches))  # the shuffle is undone


def test_masks_are_a_function_of_seed_epoch_and_image() -> None:
    ids, epochs = np.array([5, 6, 10**9, 5]), np.array([0, 0, 3, 1])
    noise = mask_noise(3, ids, epochs, 49)
    assert noise.shape == (4, 49) and noise.dtype == torch.float32
    back = np.array([2, 0, 3, 1])
    assert torch.equal(mask_noise(3, ids[back], epochs[back], 49), noise[torch.from_numpy(back)])
    assert torch.equal(mask_noise(3, ids[1:2], epochs[1:2], 49), noise[1:2])
    everything = torch.cat([noise, mask_noise(4, ids, epochs, 49)])  # another seed, epoch or id: another mask
    masks = {tuple(mask) for mask in random_masking(everything, 0.75).mask_BN.int().tolist()}
    assert len(masks) == 8


def test_every_patch_is_hidden_equally_often() -> None:
    noise = mask_noise(0, np.arange(4000), np.zeros(4000, np.int64), 16)
    share = random_masking(noise, 0.75).mask_BN.mean(dim=0)
    assert (share - 0.75).abs().max() < 0.03


def test_patches_are_cut_row_by_row_and_put_together_again(images: Tensor) -> None:
    patches = patchify(images, 4)
    assert torch.equal(patches, torch.stack([torch.stack(patches_of(image, 4)) for image in images]))
    assert torch.equal(unpatchify(patches, 4), images)


def test_a_patch_of_one_colour_has_target_zero() -> None:
    flat = torch.full((1, 1, 48), 0.3)
    assert torch.equal(normalised_patches(flat), torch.zeros(1, 1, 48))


def test_a_fresh_model_predicts_no_better_than_the_mean(images: Tensor) -> None:
    """Targets have unit variance, so a sensible start has a loss near 1."""
    torch.manual_seed(0)
    loss = MaskedAutoencoder(SHAPE, DECODER, 0.75)(images.float(), torch.rand(6, 16)).loss
    assert 0.8 < loss.item() < 3 and loss.dtype == torch.float32
