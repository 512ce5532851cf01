"""The dense model to export, and the formats that are its weights alone: timm's encoder folder, and `model.pth`.

`model.pth` is for detectron2, OpenMMLab's packages and the public MAE: renamed weights under a key. Their loaders read
files of `torch.save` and no safetensors. The file holds plain tensors only, so `torch.load(..., weights_only=True)`
reads it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce_ds.exporting.reference_model import Trial, output_of
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder, run_plainly
from moce_ds.models.vit import check_state, load_encoder, save_encoder

# The MLP of mmcv's `FFN` is Sequential(Sequential(Linear, ...), Linear, ...).
_OPENMMLAB = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.", "layers."),
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
)

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class DenseModel:
    """The model to export: weights by the names of timm and the public MAE (including the decoder if the part is
    `full`)."""

    state: Mapping[str, Tensor]
    spec: ModelSpec
    provenance: dict[str, Any]


def write_timm(folder: Path, model: DenseModel) -> None:
    """`model.safetensors`, without mask token and decoder: timm takes a file with a `mask_token` for DINOv2."""
    save_encoder(folder, model.state, model.spec.shape, model.spec.input, model.provenance)


@torch.inference_mode()
def run_timm(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens of timm's VisionTransformer."""
    return load_encoder(folder).model.forward_features(trial.images_BCHW)


def writer(rename: Rename, key: str) -> Callable[[Path, DenseModel], None]:
    """A function that writes `model.pth` with the renamed weights under `key`."""

    def write(folder: Path, model: DenseModel) -> None:
        torch.save({key: rename(model.state)}, folder / "model.pth")

    return write


def run_public_mae(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Patches of the masked autoencoder, with the names of the public MAE."""
    state = torch.load(folder / "model.pth", weights_only=True)["model"]
    with torch.device("meta"):  # without a second copy
        mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    check_state(mae, state, str(folder / "model.pth"))
    mae.load_state_dict(state, assign=True)
    return output_of(mae.eval(), run_plainly, trial, "patches")


def vitdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ViTDet's backbone (detectron2, mmdet) has neither a cls token nor a final norm.

    detectron2's matching_heuristics matches the ends of names, so a remaining `norm.weight` would be matched with the
    norms of its feature pyramid.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(("norm.", "cls_token"))}


def mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmseg loads its MAE backbone directly, so without the prefix `backbone.`; it has no final norm
    (`final_norm=False`)."""
    return renamed({name: tensor for name, tensor in state.items() if not name.startswith("norm.")}, _OPENMMLAB)


def mmpretrain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole models of mmpretrain: its `Pretrained` initialisation strips `backbone.`."""
    names = {
        ("ln1." + name.removeprefix("norm.") if name.startswith("norm.") else name): t for name, t in state.items()
    }
    return {f"backbone.{name}": tensor for name, tensor in renamed(names, _OPENMMLAB).items()}


def public_mae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public MAE uses our names."""
    return dict(state)


def renamed(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under other names: the pairs (old, new) are replaced in order."""
    result = {}
    for name, tensor in state.items():
        for old, new in names:
            name = name.replace(old, new)
        result[name] = tensor
    return result
