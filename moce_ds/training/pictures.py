"""Pictures of a run: reconstructions and the routing table.

Axes: B images, H, W pixels, C channels, M clusters, E experts.
"""

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.data.transform import ImageInput
from moce_ds.models.mae import Reconstruction, patchify, unpatchify


def reconstruction_picture(
    images_BCHW: Tensor, reconstruction: Reconstruction, patch_size: int, input: ImageInput
) -> NDArray[np.uint8]:
    """One row an image: the input, what the model saw (hidden patches gray), and the input with hidden patches filled.

    The model predicts patches of zero mean and unit variance; they are shown at the true patch's mean and variance,
    as is usual for MAE. Returns [3 columns of images] as one [H, W, 3] uint8 picture.
    """
    true_BNP = patchify(images_BCHW, patch_size)
    mean, std = true_BNP.mean(-1, keepdim=True), (true_BNP.var(-1, keepdim=True) + 1e-6).sqrt()
    mask_BN1 = reconstruction.mask_BN[:, :, None]
    filled_BNP = torch.where(mask_BN1 > 0, reconstruction.patches_BNP.float() * std + mean, true_BNP)
    seen_BNP = torch.where(mask_BN1 > 0, torch.zeros_like(true_BNP), true_BNP)
    columns = [images_BCHW, unpatchify(seen_BNP, patch_size), unpatchify(filled_BNP, patch_size)]
    rows_BCHW = torch.cat([_framed(column) for column in columns], dim=3)
    picture_CHW = torch.cat(list(rows_BCHW), dim=1).cpu()
    scale, shift = torch.tensor(input.std)[:, None, None], torch.tensor(input.mean)[:, None, None]
    return ((picture_CHW * scale + shift).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _framed(images_BCHW: Tensor) -> Tensor:
    """A margin of two pixels around each image."""
    return torch.nn.functional.pad(images_BCHW, (2, 2, 2, 2), value=2.0)


def routing_picture(probs_LME: Tensor, cell: int = 8) -> NDArray[np.uint8]:
    """The route tables side by side, clusters x experts, sorted by chosen expert; [H, W, 3] uint8."""
    panels = []
    for probs_ME in probs_LME.cpu().double().numpy():
        order = np.lexsort((-probs_ME.max(axis=1), probs_ME.argmax(axis=1)))
        shown = np.kron(probs_ME[order], np.ones((cell, 4 * cell)))
        panels.append(np.pad(shown, ((0, 0), (0, cell)), constant_values=np.nan))
    rgba = matplotlib.colormaps["viridis"](np.concatenate(panels, axis=1))
    return (rgba[:, :, :3] * 255).round().astype(np.uint8)
