"""Initial weights of a run: our checkpoints and encoder folders, safetensors files, and `.pth` of the public MAE."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint, find
from moce_ds.checkpoint.shared_read import SharedReader
from moce_ds.checkpoint.weight_files import as_float32, read_file, read_safetensors, weight_fault
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage import encoder_folder
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import sincos_positions
from moce_ds.models.parameters import CLASSIFIER, POSITIONS
from moce_ds.models.vit import ViTShape

# Fixed tables, which are recomputed, and the classifier of a fine-tuned model, which pre-training does not use.
_NOT_NEEDED = (*POSITIONS, *CLASSIFIER)
_INIT = "run.init_from"


def read_weights(path: Path, replace_positions: bool = False, runtime: Runtime | None = None) -> dict[str, Tensor]:
    """Weights by the names of the public MAE (which are ours), without fixed tables and classifier.

    Args:
        path: a run folder, a checkpoint, an encoder folder, a `.safetensors` file, or a `.pth`/`.pt` file. The latter
            is read with `weights_only=True`, so that nothing in it is executed.
        replace_positions: accept weights with learned positions, and drop the positions.
        runtime: its processes call this together and share the reading of a checkpoint; None: this one reads alone.

    Raises:
        ArtefactError: `path` is missing or holds something else; or its positions are learned and would be lost.
    """
    found = _open_together(path, runtime) if runtime else _open(path)
    if isinstance(found, Checkpoint):
        state = SharedReader(found, runtime).load(WEIGHTS) if runtime else found.load(WEIGHTS)
    else:
        state = found
    kept = {name: tensor for name, tensor in state.items() if name not in _NOT_NEEDED}
    weights = as_float32(kept, f"run.init_from: {path}")
    if not replace_positions:
        _refuse_learned_positions(state, path)
    return weights


def _open_together(path: Path, runtime: Runtime) -> Checkpoint | dict[str, Tensor]:
    """As `_open`, the same checkpoint on all processes: rank 0 chooses, because the run may still be training."""
    found: Checkpoint | dict[str, Tensor] = {}
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            found = _open(path)
    folder = runtime.texts(str(found.folder) if isinstance(found, Checkpoint) else "")[0]
    with runtime.raise_on_all_ranks():
        if not runtime.is_main:
            found = Checkpoint.open(Path(folder)) if folder else _open(path)
    if len(set(runtime.texts(found.identity if isinstance(found, Checkpoint) else ""))) > 1:
        raise ArtefactError(f"run.init_from: the machines do not see the same files in {folder}: wait, and try again.")
    return found


def _open(path: Path) -> Checkpoint | dict[str, Tensor]:
    """The checkpoint at `path`, or the newest one of a run; of other files and folders the tensors.

    Raises ArtefactError.
    """
    if not path.is_dir():
        return read_file(path, _INIT)
    encoder = path / encoder_folder.WEIGHTS
    if encoder.exists():
        return read_safetensors(encoder, _INIT)
    if (path / encoder_folder.CONFIG).exists():
        raise ArtefactError(f"run.init_from: {encoder} is missing: the export is incomplete: export it again.")
    return find(path)


def _refuse_learned_positions(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ArtefactError if a position table is not the fixed one that a run computes."""
    for name in POSITIONS:
        if name in state and (difference := _from_sincos(state[name])) is not None:
            raise ArtefactError(
                f"run.init_from: {path} has learned positions: {name} differs from the sine-cosine table by up to "
                f"{difference:.2g}. The positions of a run are that table, so the learned ones would be lost, and the "
                "model would compute something else. Start from an MAE, whose positions are fixed, or set "
                "run.replace_positions=true to start without them."
            )


def _from_sincos(table: Tensor) -> float | None:
    """Largest difference between a position table, [1, N + 1, D], and the sine-cosine table of its size.

    None if they are equal up to the precision of the file.
    """
    if table.ndim != 3 or weight_fault(table) or table.shape[-1] % 4:
        return math.inf
    side = math.isqrt(max(0, table.shape[1] - 1))
    if (1, side * side + 1) != tuple(table.shape[:2]):
        return math.inf
    grid = ViTShape(image_size=side, patch_size=1, width=table.shape[-1], depth=1, heads=1)
    difference = float((table.float() - sincos_positions(grid, grid.width)).abs().max())
    return None if difference <= max(1e-4, 2 * torch.finfo(table.dtype).eps) else difference
