"""Weights in files of other programs: `.safetensors`, and `.pth` or `.pt`, whose pickles are never executed."""

import argparse
import errno
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from moce_ds.common.errors import ArtefactError
from moce_ds.common.host.machine import refused
from moce_ds.common.storage.files import load_tensors
from moce_ds.models.parameters import cut

# Classes in the `args` of a training script besides tensors and plain values: namespaces, and paths, which become pure
# paths. Python 3.13 has another name for the module.
_VALUES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]

# Errors that torch's reader raises on damaged files; they have no common base class.
_READER_FAULTS = (
    pickle.UnpicklingError, struct.error, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, OSError,
)  # fmt: skip


def read_file(path: Path, reader: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, `.pth` or `.pt` file, unchanged, by name.

    Args:
        path: the file.
        reader: the setting or argument with the path, for errors.

    Raises:
        ArtefactError: `path` is missing or holds something else.
    """
    named = f"{reader}: {path}"
    if not path.is_file():
        raise ArtefactError(f"{named} is neither a file nor a folder." if path.exists() else f"{named} not found.")
    if path.suffix == ".safetensors":
        return read_safetensors(path, reader)
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path, named)
    raise ArtefactError(f"{named}: expected a folder of ours, .safetensors, .pth or .pt.")


def read_safetensors(path: Path, reader: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. `reader` as in `read_file`. Raises ArtefactError if it is damaged."""
    return load_tensors(path, f"{reader} expects a complete safetensors file.")


def as_float32(state: Mapping[str, Tensor], named: str) -> dict[str, Tensor]:
    """The same tensors in float32. Raises ArtefactError, listing those that cannot be weights of a model."""
    unfit = [f"{name} {fault}" for name, tensor in state.items() if (fault := weight_fault(tensor))]
    if unfit:
        raise ArtefactError("\n  ".join([f"{named} contains entries that are not weights:", *cut(unfit)]))
    return {name: tensor.float() for name, tensor in state.items()}


def weight_fault(tensor: Tensor) -> str | None:
    """The reason why a tensor cannot be a weight of a model, or None."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        return f"is {tensor.dtype}, {tensor.layout}, {tensor.device}; expected plain floating point numbers"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has shape {tuple(tensor.shape)}, which is larger than its data in the file"
    if not tensor.float().isfinite().all():
        return "holds NaN or infinite numbers: its run has diverged"
    return None


def read_torch_file(path: Path, named: str) -> Any:
    """The content of a file of `torch.save`, read with `weights_only=True`, so that nothing in it is executed.

    Besides tensors and plain values, `argparse.Namespace` and paths are allowed, because the training code of the
    public MAE writes them.

    Raises:
        ArtefactError: the file (`named` in the message) holds anything else, or is damaged.
    """
    try:
        with torch.serialization.safe_globals(_VALUES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _READER_FAULTS as error:
        # Errors of the system have an errno. EINVAL is from torch's seek in a truncated file.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise refused(ArtefactError, f"{named} cannot be read", error) from None
        # Drop torch's advice around the reason, which is to execute the file's code.
        (reason,) = re.findall(r"WeightsUnpickler error: (.*?)(?:\. Please .*)?$", str(error), re.M) or [
            type(error).__name__
        ]
        detail = f" ({reason.strip()})" if reason.strip() else ""
        raise ArtefactError(
            f"{named} refused: it contains objects other than tensors or is damaged; no code was executed{detail}. "
            "Expected tensors by name, maybe under 'model'; if you trust its source, save only those as .safetensors."
        ) from None


def _read_torch(path: Path, named: str) -> dict[str, Tensor]:
    content = read_torch_file(path, named)
    state = content.get("model", content) if isinstance(content, dict) else content
    by_name = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not by_name or not state:
        raise ArtefactError(f"{named} holds no weights: expected tensors by name, maybe under 'model'.")
    return dict(state)
