"""timm's layout: the encoder folder that all verbs of moce read."""

from pathlib import Path

import torch
from torch import Tensor

from moce_ds.export.formats.target import DenseModel
from moce_ds.export.reference_model import Trial
from moce_ds.models.build import ModelSpec
from moce_ds.models.vit import load_encoder, save_encoder


def write(folder: Path, model: DenseModel) -> None:
    """`model.safetensors`, without mask token and decoder: timm takes a file with a `mask_token` for DINOv2."""
    save_encoder(folder, model.state, model.spec.shape, model.spec.input, model.provenance)


@torch.inference_mode()
def run(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens of timm's VisionTransformer."""
    return load_encoder(folder).model.forward_features(trial.images_BCHW)
