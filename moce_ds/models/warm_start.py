"""Weights to start a run from: our checkpoints and encoder folders, safetensors files, and the public MAE's `.pth`."""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce_ds.checkpoint_files import WEIGHTS, find
from moce_ds.errors import ArtefactError
from moce_ds.files import load_tensors
from moce_ds.models.vit import cut

# Fixed tables, computed anew; the classifier of a fine-tuned model, which pre-training has no place for.
_NOT_NEEDED = ("pos_embed", "decoder_pos_embed", "head.weight", "head.bias")
_CURE = "run.init_from expects a whole safetensors file."
_DECODER = ("decoder_", "mask_token")

# What torch's reader was seen to raise on damaged files; they have no common base.
_READER_FAULTS = (
    pickle.UnpicklingError, struct.error, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, OSError,
)  # fmt: skip


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by the names of the public MAE (those of this program), without fixed tables and classifier.

    Args:
        path: a run folder, a checkpoint, an encoder folder, a `.safetensors` file, or a `.pth`/`.pt` file, which is
            read with `weights_only=True`, so that nothing in it is executed.

    Raises:
        ArtefactError: there is nothing to read at `path`, or it holds something else.
    """
    if not path.exists():
        raise ArtefactError(f"run.init_from: {path} not found.")
    if path.is_dir():
        encoder = path / "model.safetensors"
        if (path / "config.json").exists() and not encoder.exists():
            raise ArtefactError(f"run.init_from: {encoder} is missing: the export is half written: export it again.")
        state = load_tensors(encoder, _CURE) if encoder.exists() else find(path).load(WEIGHTS)
    elif not path.is_file():
        raise ArtefactError(f"run.init_from: {path} is neither a file nor a folder.")
    elif path.suffix == ".safetensors":
        state = load_tensors(path, _CURE)
    elif path.suffix in (".pth", ".pt"):
        state = _read_torch(path)
    else:
        raise ArtefactError(f"run.init_from: {path}: expected a folder of ours, .safetensors, .pth or .pt.")
    kept = {name: tensor for name, tensor in state.items() if name not in _NOT_NEEDED}
    unfit = [f"{name} {fault}" for name, tensor in kept.items() if (fault := _unfit(tensor))]
    if unfit:
        raise ArtefactError("\n  ".join([f"run.init_from: {path} holds what is no weights:", *cut(unfit)]))
    return {name: tensor.float() for name, tensor in kept.items()}


def _unfit(tensor: Tensor) -> str | None:
    """Why a tensor cannot be a model's weights, None where it can."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        return f"is {tensor.dtype}, {tensor.layout}, {tensor.device}; expected plain floating point numbers"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"claims shape {tuple(tensor.shape)}, which is more than the file holds"
    if not tensor.float().isfinite().all():
        return "holds NaN or infinite numbers: the run that it is from has diverged"
    return None


def has_experts(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights are those of a model with experts."""
    return any(is_expert(name) for name in weights)


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one of a layer's experts."""
    return ".mlp.experts." in name


def lacks_decoder(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights are those of an encoder alone, as the public MAE's files named "pretrain" are."""
    return not any(name.startswith(_DECODER) for name in weights)


def is_decoder(name: str) -> bool:
    """Whether a parameter belongs to the decoder, which an encoder-only file does not have."""
    return name.startswith(_DECODER)


def read_torch_file(path: Path, named: str) -> Any:
    """What a file of `torch.save` holds, read with `weights_only=True`, so that nothing in it is executed.

    Raises:
        ArtefactError: the file, `named` so, holds more than tensors and plain values, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _READER_FAULTS as error:
        # torch's own first line advises to run the file's code.
        (reason,) = re.findall(r"WeightsUnpickler error: (.*)", str(error)) or [type(error).__name__]
        raise ArtefactError(
            f"{named} refused: more than tensors in it, or damaged; nothing was run ({reason.strip()}). "
            "Expected tensors by name, maybe under 'model'; if you trust its source, save those alone as .safetensors."
        ) from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    content = read_torch_file(path, f"run.init_from: {path}")
    state = content.get("model", content) if isinstance(content, dict) else content
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named or not state:
        raise ArtefactError(f"run.init_from: {path} holds no weights: expected tensors by name, maybe under 'model'.")
    return state
