"""Held-out images, reconstructed by their own expert of the last expert layer and by the others in its place.

All other expert layers keep the route of the image's cluster. So differences between columns show what the experts of
this layer have specialised in.

Axes: B images of a batch, N held-out images or patches, M clusters, L expert layers, E shown experts, P pixels of a
patch x 3, H, W pixels, C channels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.files import PICTURE_MARK, check_output
from moce_ds.data.clusters import Clusters
from moce_ds.data.loader import Batch
from moce_ds.evaluation.expert_sheet import ExpertRow, ExpertSheet, SheetAbout
from moce_ds.evaluation.reconstruction import HeldOut, RoutedImages, load_whole, reconstruct_routed, run_routes
from moce_ds.models.mae import Reconstruction, filled_images, masked_images, patch_errors
from moce_ds.models.moce import Moce

_EXPERTS = 8  # shown, those with the most images
_MEASURED, _SHOWN = 16, 3  # images of each expert
_SIDE = 96  # pixels of a cell at most


@dataclass(frozen=True)
class _Substitutions:
    """A model whose images take their own routes, but for the expert of the last layer."""

    model: Moce
    expert_MLK: NDArray[np.int64]
    clusters_N: NDArray[np.int64]

    def reconstruct(self, batch: Batch, noise_BN: Tensor, expert: int) -> Reconstruction:
        """The images, all with the same expert in the last expert layer."""
        table_MLK = self.expert_MLK.copy()
        table_MLK[:, -1, 0] = expert
        return reconstruct_routed(self.model, table_MLK, self.clusters_N[batch.ids_B], batch.images_BCHW, noise_BN)


def check_picture(path: Path | None, checkpoint: Checkpoint) -> None:
    """Check that a sheet of a run can be made and written, before any image is read; None: none is asked for.

    Raises:
        ArtefactError: `path` holds something else, or cannot be written.
        ConfigError: an image has several experts in a layer, and none of them alone can be exchanged.
    """
    if path is None:
        return
    check_output(path, "a picture", PICTURE_MARK)
    if (k := checkpoint.entry("model", "experts", "k")) > 1:
        raise ConfigError(f"--picture: the picture exchanges the expert of an image; this run has experts.k={k}.")


def expert_sheet(
    checkpoint: Checkpoint,
    clusters: Clusters,
    task: RoutedImages,
    held_out: HeldOut,
    names: tuple[str, str],
    measured: int = _MEASURED,
) -> ExpertSheet:
    """Reconstruct a few images of every expert of the last expert layer by all of these experts.

    Args:
        names: of the task and of the model.
        measured: images of each expert at most.

    Raises:
        DataError: an image is damaged.
    """
    model = load_whole(checkpoint, clusters).to(held_out.device)
    assert isinstance(model, Moce)
    expert_MLK = run_routes(model, checkpoint)
    own_N = expert_MLK[task.clusters_N, -1, 0]
    count_E = np.bincount(own_N, minlength=model.experts.num_experts)
    experts = sorted(np.argsort(-count_E, kind="stable")[: min(_EXPERTS, np.count_nonzero(count_E))].tolist())
    drawn = [_drawn(np.flatnonzero(own_N == expert), measured) for expert in experts]
    substitutions = _Substitutions(model, expert_MLK, task.clusters_N)
    ids = np.concatenate(drawn)
    cells, errors_NE = _reconstructed(substitutions, held_out, ids, experts)
    rows, strips, first = [], [], 0
    for expert, members in zip(experts, drawn, strict=True):
        shown = members[:_SHOWN].tolist()
        error = errors_NE[first : first + len(members)].mean(axis=0).tolist()
        rows.append(ExpertRow(expert, int(count_E[expert]), len(members), shown, error))
        strips += [np.concatenate(cells[place], axis=1) for place in range(first, first + len(shown))]
        first += len(members)
    about = SheetAbout(*names, model.experts.layers[-1], len(strips[0]), task.images.count, rows)
    return ExpertSheet(about, np.concatenate(strips))


def _drawn(members: NDArray[np.int64], measured: int) -> NDArray[np.int64]:
    """Some of an expert's images, at random; deterministic."""
    return np.random.default_rng(0).permutation(members)[:measured]


@torch.inference_mode()
def _reconstructed(
    substitutions: _Substitutions, held_out: HeldOut, ids: NDArray[np.int64], experts: list[int]
) -> tuple[list[list[NDArray[np.uint8]]], NDArray[np.float64]]:
    """For each image its cells (input, masked input, one reconstruction per expert), and its errors, [N, E]."""
    cells: list[list[NDArray[np.uint8]]] = []
    errors: list[NDArray[np.float64]] = []
    patch_size, input = substitutions.model.shape.patch_size, held_out.input
    for batch, noise_BN in held_out.batches(substitutions.model.shape.num_patches, ids):
        images_BCHW = batch.images_BCHW
        each = [substitutions.reconstruct(batch, noise_BN, expert) for expert in experts]
        columns = [images_BCHW, masked_images(images_BCHW, each[0].mask_BN, patch_size)]
        columns += [filled_images(images_BCHW, one, patch_size) for one in each]
        columns_BCHW = [column.cpu().numpy() for column in columns]
        cells += [[_cell(input.pixels(image_CHW)) for image_CHW in row] for row in zip(*columns_BCHW, strict=True)]
        errors.append(np.stack([_errors(images_BCHW, one, patch_size) for one in each], axis=1))
    return cells, np.concatenate(errors)


def _errors(images_BCHW: Tensor, reconstruction: Reconstruction, patch_size: int) -> NDArray[np.float64]:
    """Mean squared error of each image on its hidden patches, [B]."""
    error_BN, mask_BN = patch_errors(images_BCHW, reconstruction.patches_BNP, patch_size), reconstruction.mask_BN
    return ((error_BN * mask_BN).sum(dim=1) / mask_BN.sum(dim=1)).double().cpu().numpy()


def _cell(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A cell with a white margin, at most `_SIDE` pixels wide."""
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((_SIDE - 2, _SIDE - 2), Image.Resampling.LANCZOS)
    return np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)), constant_values=255)
