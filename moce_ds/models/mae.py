"""The masked autoencoder (He et al., 2022), with timm's blocks and the parameter names of the public code.

Axes: B images, N patches, V visible patches, T tokens (visible patches and cls), D width, P pixels of a patch x 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moce_ds.common.compat import repair_torchvision
from moce_ds.distributed.randomness import MASK, uniform
from moce_ds.models.shapes import DecoderShape
from moce_ds.models.vit import ViTShape

repair_torchvision()
from timm.layers import Mlp, PatchEmbed  # noqa: E402  (needs the repair)
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

NORM_EPS = 1e-6

RunBlock = Callable[[int, Block, Tensor], Tensor]
"""Runs the encoder block with a given index on tokens [B, T, D]."""


@dataclass(frozen=True)
class Masking:
    """The visible patches.

    Attributes:
        visible_BV: indices of the visible patches.
        restore_BN: inverse of the shuffle that puts the visible patches first.
        mask_BN: 1 for a hidden patch, else 0.
    """

    visible_BV: Tensor
    restore_BN: Tensor
    mask_BN: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """The output of the decoder: the loss (scalar) and the predicted patches [B, N, P]."""

    loss: Tensor
    patches_BNP: Tensor
    mask_BN: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """The output of the forward pass of any masked autoencoder.

    It is a dataclass because DeepSpeed would put a hook on every tensor of a dictionary.

    Attributes:
        losses: named losses, each 0-d. "loss" is the weighted sum for the backward pass; "reconstruction" and the
            model's own losses are unweighted.
        reconstruction: the predicted patches, and the mask of hidden patches.
    """

    losses: dict[str, Tensor]
    reconstruction: Reconstruction

    @property
    def loss(self) -> Tensor:
        """The weighted sum of the losses."""
        return self.losses["loss"]


class MaskedAutoencoder(nn.Module):
    """Encoder on the visible patches, decoder on all patches, mean squared error on the hidden ones."""

    agrees_before_forward: ClassVar[bool] = False
    """Whether the ranks must agree on a step before the forward pass, which contains collectives without a plan."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, shape: ViTShape, decoder: DecoderShape, mask_ratio: float) -> None:
        super().__init__()
        self.shape = shape
        self.mask_ratio = mask_ratio
        self.checkpoint_activations = False  # recompute encoder blocks in the backward pass
        D, pixels = shape.width, shape.patch_size**2 * 3
        self.patch_embed = PatchEmbed(shape.image_size, shape.patch_size, 3, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer("pos_embed", sincos_positions(shape, D))
        self.blocks = nn.ModuleList(make_block(D, shape.heads, shape.mlp_ratio) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(D, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(D, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.register_buffer("decoder_pos_embed", sincos_positions(shape, decoder.width))
        self.decoder_blocks = nn.ModuleList(make_block(decoder.width, decoder.heads, 4.0) for _ in range(decoder.depth))
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(decoder.width, pixels)
        self._initialise()

    def _initialise(self) -> None:
        """The initialisation of the public MAE: Xavier for matrices, normal(0.02) for the tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.shape.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> ModelOutput:
        """Reconstruct masked images; the patches with the lowest noise stay visible."""
        reconstruction = self.reconstruct(images_BCHW, noise_BN, run_plainly)
        return ModelOutput({"loss": reconstruction.loss, "reconstruction": reconstruction.loss}, reconstruction)

    def reconstruct(self, images_BCHW: Tensor, noise_BN: Tensor, run_block: RunBlock) -> Reconstruction:
        """Reconstruct masked images; `run_block(index, block, tokens)` runs each encoder block."""
        masking = random_masking(noise_BN, self.mask_ratio)
        return self.from_tokens(self.encode(images_BCHW, masking, run_block), images_BCHW, masking)

    def from_tokens(self, x_BTD: Tensor, images_BCHW: Tensor, masking: Masking) -> Reconstruction:
        """Reconstruct images from the output of `encode`."""
        patches_BNP = self.decode(x_BTD, masking)
        error_BN = patch_errors(images_BCHW, patches_BNP, self.shape.patch_size)
        loss = (error_BN * masking.mask_BN).sum() / masking.mask_BN.sum()
        return Reconstruction(loss, patches_BNP, masking.mask_BN)

    def encode(self, images_BCHW: Tensor, masking: Masking, run_block: RunBlock) -> Tensor:
        """Tokens after the final norm, cls and the visible patches, [B, V + 1, D]."""
        x_BTD = visible_tokens(self, images_BCHW, masking)
        for index, block in enumerate(self.blocks):
            if self.checkpoint_activations:
                x_BTD = checkpoint(run_block, index, block, x_BTD, use_reentrant=False)
            else:
                x_BTD = run_block(index, block, x_BTD)
        return self.norm(x_BTD)

    def decode(self, x_BTD: Tensor, masking: Masking) -> Tensor:
        """Predicted patches [B, N, P] from the encoder's output."""
        x_BTD = self.decoder_embed(x_BTD)
        B, T, D = x_BTD.shape
        hidden = masking.restore_BN.shape[1] + 1 - T
        x_BND = torch.cat([x_BTD[:, 1:], self.mask_token.to(x_BTD.dtype).expand(B, hidden, -1)], dim=1)
        x_BND = x_BND.gather(1, masking.restore_BN[:, :, None].expand(-1, -1, D))
        x_BTD = torch.cat([x_BTD[:, :1], x_BND], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x_BTD = block(x_BTD)
        return self.decoder_pred(self.decoder_norm(x_BTD))[:, 1:]


def visible_tokens(vit: MaskedAutoencoder | VisionTransformer, images_BCHW: Tensor, masking: Masking) -> Tensor:
    """Input tokens of an encoder: cls and the visible patches, with positions, [B, V + 1, D]."""
    x_BND = vit.patch_embed(images_BCHW) + vit.pos_embed[:, 1:]
    index_BVD = masking.visible_BV[:, :, None].expand(-1, -1, x_BND.shape[-1])
    x_BVD = x_BND.gather(1, index_BVD)
    cls_B1D = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x_BVD), -1, -1)
    return torch.cat([cls_B1D.to(x_BVD.dtype), x_BVD], dim=1)


def run_plainly(_: int, block: Block, x_BTD: Tensor) -> Tensor:
    """Run a block as timm does."""
    return block(x_BTD)


def make_block(width: int, heads: int, mlp_ratio: float) -> Block:
    """A pre-norm block of timm with MAE's settings."""
    return Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=NORM_EPS))


def make_mlp(width: int, mlp_ratio: float) -> Mlp:
    """The MLP of such a block."""
    return Mlp(width, int(width * mlp_ratio))


def mask_noise(seed: int, ids_B: np.ndarray, epochs_B: np.ndarray, num_patches: int) -> Tensor:
    """Uniform noise that determines the hidden patches, [B, N] float32: a function of (seed, epoch, image id)."""
    noise_BN = uniform(MASK, seed, epochs_B[:, None], ids_B[:, None], np.arange(num_patches))
    return torch.from_numpy(noise_BN.astype(np.float32))


def nothing_masked(B: int, N: int) -> Masking:
    """All patches visible, in order."""
    return random_masking(torch.arange(N).expand(B, -1).float(), 0.0)


def random_masking(noise_BN: Tensor, mask_ratio: float) -> Masking:
    """Keep the int(N (1 - mask_ratio)) patches with the lowest noise."""
    N = noise_BN.shape[1]
    keep = int(N * (1 - mask_ratio))
    shuffle_BN = noise_BN.argsort(dim=1, stable=True)
    restore_BN = shuffle_BN.argsort(dim=1)
    return Masking(shuffle_BN[:, :keep], restore_BN, (restore_BN >= keep).float())


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, [B, N, P]; P iterates over (row, column, channel) as in the public MAE."""
    B, C, H, W = images_BCHW.shape
    x = images_BCHW.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch_size**2 * C)


def unpatchify(patches_BNP: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images: [B, N, P] -> [B, 3, H, W]."""
    B, N, _ = patches_BNP.shape
    side = int(N**0.5)
    x = patches_BNP.reshape(B, side, side, patch_size, patch_size, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, side * patch_size, side * patch_size)


def normalised_patches(patches_BNP: Tensor) -> Tensor:
    """Patches with zero mean and unit (unbiased) variance, eps 1e-6: the target of MAE."""
    mean = patches_BNP.mean(dim=-1, keepdim=True)
    variance = patches_BNP.var(dim=-1, keepdim=True)
    return (patches_BNP - mean) / (variance + 1e-6).sqrt()


def masked_images(images_BCHW: Tensor, mask_BN: Tensor, patch_size: int) -> Tensor:
    """What the model sees of the images, [B, 3, H, W]: hidden patches are 0, the mean colour."""
    true_BNP = patchify(images_BCHW, patch_size)
    return unpatchify(torch.where(mask_BN[:, :, None] > 0, torch.zeros_like(true_BNP), true_BNP), patch_size)


def filled_images(images_BCHW: Tensor, reconstruction: Reconstruction, patch_size: int) -> Tensor:
    """The images with reconstructed patches in the place of hidden ones, [B, 3, H, W].

    The model predicts patches of zero mean and unit variance; they are shown at the true patch's mean and variance,
    as is usual for MAE.
    """
    true_BNP = patchify(images_BCHW, patch_size)
    mean, std = true_BNP.mean(-1, keepdim=True), (true_BNP.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden_BN1 = reconstruction.mask_BN[:, :, None] > 0
    return unpatchify(torch.where(hidden_BN1, reconstruction.patches_BNP.float() * std + mean, true_BNP), patch_size)


def patch_errors(images_BCHW: Tensor, patches_BNP: Tensor, patch_size: int) -> Tensor:
    """Mean squared error of each predicted patch, hidden or not, [B, N] float32."""
    target_BNP = normalised_patches(patchify(images_BCHW, patch_size))
    return (patches_BNP.float() - target_BNP).square().mean(dim=-1)


def sincos_positions(shape: ViTShape, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings, [1, N + 1, width] float32, zeros for cls, as in the public MAE."""
    side = shape.image_size // shape.patch_size
    row, column = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64), indexing="ij")
    frequency = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    # The public code uses the column in the first half of the channels.
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    patches = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    table = np.concatenate([np.zeros((1, width)), patches])
    return torch.from_numpy(table).float()[None]
