"""Maps of several scales from a plain ViT: the simple feature pyramid of ViTDet (Li et al., 2022).

Transposed convolutions and pooling convert the last block's tokens to four scales. As in ViTDet there is no cls token,
and position embeddings are resized to the grid of the larger image. Unlike in ViTDet the tokens pass the encoder's
final norm, as before MAE's decoder, because their scale before it depends on the pre-training (a standard deviation of
5 was measured; an untrained encoder has 2).

Axes: B images, H x W tokens of the grid, T = H W, D width, C channels of a map, N windows.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moce_ds.common.compat import repair_torchvision
from moce_ds.common.errors import ConfigError
from moce_ds.models.vit import Encoder
from moce_ds.tuning.settings import BackboneSettings

repair_torchvision()
from timm.layers import DropPath, LayerNorm2d, resample_abs_pos_embed  # noqa: E402  (needs the repair)
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

GLOBAL_BLOCKS = 4

_FINEST = 4  # pixels: the stride of the finest map, if the patches allow it


class Normalise(nn.Module):
    """Pixels in [0, 1], normalised as an encoder expects them, [..., 3, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(encoder.input, name))
            self.register_buffer(name, values[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class WindowedViT(nn.Module):
    """A plain ViT without cls token whose blocks attend in windows, a few over the whole grid: [B, 3, S, S] to a map.

    Args:
        encoder: the source of the weights; it is not changed.
        config: size of the image, window, and stochastic depth.

    Raises:
        ConfigError: the window does not divide the grid, or the encoder has only a norm for the mean of its tokens.
    """

    def __init__(self, encoder: Encoder, config: BackboneSettings) -> None:
        super().__init__()
        if encoder.shape.pooled_norm:
            raise ConfigError(
                "data.encoder: it was fine-tuned with a norm that follows the mean of its tokens; a map needs one "
                "for each token. Give the encoder as it was pre-trained."
            )
        self.shape = dataclasses.replace(encoder.shape, image_size=config.image_size)
        self.side = config.image_size // self.shape.patch_size
        self.window = config.window or self.side
        if self.side % self.window:
            raise ConfigError(
                f"model.window: got {config.window}; it must divide the {self.side} tokens along an image of "
                f"{config.image_size} pixels."
            )
        drop_path = 0.0 if config.frozen else config.drop_path
        self.vit = _without_cls(encoder, self.shape.timm_arguments() | {"drop_path_rate": drop_path})
        self.vit.requires_grad_(not config.frozen)
        count = min(GLOBAL_BLOCKS, self.shape.depth)
        self.sees_all = {(i + 1) * self.shape.depth // count - 1 for i in range(count)}
        for index, block in enumerate(self.vit.blocks):
            if index not in self.sees_all:
                _drop_by_image(block, (self.side // self.window) ** 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Tokens after the final norm as a map, [B, D, H, W]."""
        vit = self.vit
        x_BTD = vit.patch_embed(images_BCHW) + vit.pos_embed
        x_BHWD = x_BTD.unflatten(1, (self.side, self.side))
        for index, block in enumerate(vit.blocks):
            window = self.side if index in self.sees_all else self.window
            tokens_NTD = to_windows(x_BHWD, window)
            if vit.grad_checkpointing and self.training:
                tokens_NTD = checkpoint(block, tokens_NTD, use_reentrant=False)
            else:
                tokens_NTD = block(tokens_NTD)
            x_BHWD = from_windows(tokens_NTD, window, self.side)
        return vit.norm(x_BHWD).permute(0, 3, 1, 2)


class ImageDropPath(DropPath):
    """Stochastic depth of windows [B N, T, D] that drops a block for an image, not for a window, as in ViTDet."""

    def __init__(self, drop_prob: float, windows: int) -> None:
        super().__init__(drop_prob)
        self.windows = windows  # N; the windows of an image are consecutive

    def forward(self, x_NTD: Tensor) -> Tensor:
        kept_B11 = super().forward(x_NTD.new_ones(len(x_NTD) // self.windows, 1, 1))
        return x_NTD * kept_B11.repeat_interleave(self.windows, dim=0)


def _drop_by_image(block: Block, windows: int) -> None:
    """Let a block that runs on `windows` windows per image draw stochastic depth once per image."""
    for name in ("drop_path1", "drop_path2"):
        drop = getattr(block, name)
        if isinstance(drop, DropPath):  # the first block never drops
            setattr(block, name, ImageDropPath(drop.drop_prob, windows))


def _without_cls(encoder: Encoder, arguments: dict[str, object]) -> VisionTransformer:
    """timm's ViT of another image size with the encoder's weights, without the cls token."""
    vit = VisionTransformer(**arguments, class_token=False, global_pool="")
    state = encoder.model.state_dict()
    grid = vit.patch_embed.grid_size
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=1)[:, 1:]
    wanted = vit.state_dict()
    vit.load_state_dict({name: state[name] for name in wanted})
    return vit


def to_windows(x_BHWD: Tensor, window: int) -> Tensor:
    """Cut grids into windows of `window` x `window` tokens: [B N, window^2, D]."""
    _, side, _, width = x_BHWD.shape
    cut = x_BHWD.unflatten(2, (side // window, window)).unflatten(1, (side // window, window))
    return cut.transpose(2, 3).reshape(-1, window * window, width)


def from_windows(windows_NTD: Tensor, window: int, side: int) -> Tensor:
    """The inverse of `to_windows`: [B, H, W, D]."""
    count = side // window
    cut = windows_NTD.reshape(-1, count, count, window, window, windows_NTD.shape[-1])
    return cut.transpose(2, 3).reshape(-1, side, side, windows_NTD.shape[-1])


class SimpleFeaturePyramid(nn.Module):
    """An encoder's maps at four scales, each with half the previous resolution: strides 4, 8, 16, 32 for patches of 16.

    With another patch size, the finest map has the stride patch / 2^n that is nearest to 4 pixels.

    Attributes:
        strides: of the maps, pixels (not whole for patches of 14).
        out_channels: channels of every map; torchvision's detectors require this name.

    Args:
        extra: `max_pool` adds a fifth, coarser map that Mask R-CNN proposes large objects on.

    Raises:
        ConfigError: the image does not fit the patches and the coarsest map; or see `WindowedViT`.
    """

    def __init__(self, encoder: Encoder, config: BackboneSettings, extra: Literal["max_pool", "none"] = "none") -> None:
        super().__init__()
        patch, width = encoder.shape.patch_size, encoder.shape.width
        finest = max(0, round(math.log2(patch / _FINEST)))
        unit = patch * 2 ** max(0, 3 - finest)
        if config.image_size % unit:
            raise ConfigError(
                f"model.image_size: got {config.image_size}; expected a multiple of {unit} pixels, so that patches of "
                f"{patch} and the coarsest map fit."
            )
        self.body = WindowedViT(encoder, config)
        self.out_channels = config.channels
        self.strides = [patch * 2.0 ** (level - finest) for level in range(4)]
        self.levels = nn.ModuleList(_level(width, finest - level, config.channels) for level in range(4))
        self.extra = nn.MaxPool2d(1, stride=2) if extra == "max_pool" else None

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Maps by level, finest first: "0" to "3", and "pool"."""
        map_BDHW = self.body(images_BCHW)
        maps = {str(index): level(map_BDHW) for index, level in enumerate(self.levels)}
        if self.extra is not None:
            maps["pool"] = self.extra(maps["3"])
        return maps


def _level(width: int, doublings: int, channels: int) -> nn.Sequential:
    """Layers from the encoder's map to one of 2^doublings times its resolution, with `channels` channels."""
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    layers += [nn.MaxPool2d(2) for _ in range(-doublings)]
    layers += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers)
