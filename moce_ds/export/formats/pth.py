"""`model.pth` for detectron2, OpenMMLab's packages and the public MAE: renamed weights under a key.

Their loaders read files of `torch.save` and no safetensors. The file holds plain tensors only, so `torch.load(...,
weights_only=True)` reads it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moce_ds.export.formats.target import DenseModel, renamed
from moce_ds.export.reference_model import Trial, output_of
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder, run_plainly
from moce_ds.models.vit import check_state

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
