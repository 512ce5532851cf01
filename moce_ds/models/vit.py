"""Vision transformers by size, and the folder of a trained encoder.

An encoder folder (`encoder_folder.py`) holds `model.safetensors` (timm's parameter names), `config.json` (the shape,
the arguments for timm, and the input format) and `provenance.json` (its origin). `moce features`, `knn`,
`probe` and the clusters read it; `moce export` writes it.

Axes: B images, N patches, T tokens (patches and cls), D width.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moce_ds.common.compat import repair_torchvision
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.drafts import restore
from moce_ds.common.storage.encoder_folder import (
    CONFIG,
    PROVENANCE,
    WEIGHTS,
    read_config,
    read_provenance,
    write_config,
)
from moce_ds.common.storage.files import load_tensors, reads_from, save_tensors, sha256_of, write_json
from moce_ds.data import kept_encoder
from moce_ds.data.transform import ImageInput
from moce_ds.models.parameters import check_fit
from moce_ds.models.shapes import ViTShape

repair_torchvision()
import timm  # noqa: E402  (needs the repair)
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


@lru_cache  # timm builds the model for this, which takes a tenth of a second
def shape_of(timm_name: str) -> ViTShape:
    """The shape of a timm name such as `vit_base_patch16_224`.

    Raises:
        ConfigError: timm does not know the name, or it is not a plain ViT with a cls token.
    """
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(timm_name, timm.list_models("vit_*"), n=4)
        hint = f" Near: {', '.join(near)}." if near else " Such as vit_base_patch16_224."
        raise ConfigError(f"model.vit: got {timm_name!r}; expected the name of a ViT in timm.{hint}")
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    plain = isinstance(model, VisionTransformer) and model.cls_token is not None and model.num_prefix_tokens == 1
    if not plain or any(isinstance(m, nn.Identity) for m in (model.norm,)):
        raise ConfigError(
            f"model.vit: {timm_name} is not a plain ViT with one cls token, such as vit_base_patch16_224."
        )
    block = model.blocks[0]
    return ViTShape(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
    )


def timm_vit(shape: ViTShape) -> VisionTransformer:
    """timm's plain ViT of this size, with one cls token, no classifier, and random weights."""
    return VisionTransformer(**shape.timm_arguments())


@dataclass(frozen=True)
class Encoder:
    """A trained dense ViT with everything needed to use it.

    Attributes:
        model: timm's VisionTransformer in evaluation mode.
        input: size and normalisation of its images.
        provenance: its origin, as plain data.
    """

    model: VisionTransformer
    shape: ViTShape
    input: ImageInput
    provenance: dict[str, Any]

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], shape: ViTShape, input: ImageInput, provenance: Any, source: str
    ) -> "Encoder":
        """An encoder with these tensors themselves as weights, on the host.

        Raises:
            ArtefactError: they do not fit the shape; lists every difference, and names `source`.
        """
        with torch.device("meta"):  # allocates no memory
            model = timm_vit(shape)
        check_state(model, state, source)
        model.load_state_dict(dict(state), assign=True)
        return cls(model.eval(), shape, input, provenance)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights; equal weights have equal fingerprints."""
        return fingerprint(self.model.state_dict())

    @property
    def identity(self) -> str:
        """SHA-256 over everything that determines the output of the encoder: weights, shape and input."""
        parts = [self.fingerprint, asdict(self.shape), self.input.to_tree()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Mean of the patch tokens after the final norm, [B, D] float32 (docs/method.md, "Clustering").

        With `pooled_norm` it is the norm of their mean.
        """
        tokens_BTD = self.model.forward_features(images_BCHW)
        features_BD: Tensor = self.model.fc_norm(tokens_BTD[:, 1:].float().mean(dim=1))
        return features_BD


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of a state dict."""
    return kept_encoder.fingerprint({name: tensor.detach().float().cpu().numpy() for name, tensor in state.items()})


def save_encoder(
    folder: Path, state: Mapping[str, Tensor], shape: ViTShape, input: ImageInput, provenance: Any
) -> None:
    """Write the three files of an encoder folder into an existing `folder` (the caller makes that atomic).

    Existing files in `folder` are part of the encoder and get checksums too.
    """
    save_tensors(folder / WEIGHTS, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    write_json(folder / PROVENANCE, provenance)
    write_config(folder, {"shape": asdict(shape), "timm": shape.timm_arguments(), "input": input.to_tree()})


@dataclass(frozen=True)
class EncoderRecord:
    """The entries of an encoder folder's `config.json` that are read."""

    shape: ViTShape
    input: ImageInput
    sha256: str

    def __post_init__(self) -> None:
        shape = self.shape
        if shape.width % shape.heads or shape.image_size % shape.patch_size or shape.image_size != self.input.size:
            raise ValueError(f"{shape} and images of {self.input.size} pixels do not match")

    @classmethod
    def read(cls, folder: Path) -> "EncoderRecord":
        """Raises ArtefactError if the file is missing, damaged or of another version."""
        restore(folder)
        return read_config(folder, cls)


def load_encoder(folder: Path, device: torch.device | None = None) -> Encoder:
    """Read an encoder folder.

    Raises:
        ArtefactError: a file is missing, damaged or exchanged, or the weights do not fit the shape; lists their names.
    """
    config, provenance, weights = EncoderRecord.read(folder), read_provenance(folder), folder / WEIGHTS
    if not weights.exists():
        raise ArtefactError(f"{weights} is missing: {folder} is an incomplete export: export it again.")
    with reads_from(weights, "export it again."):
        checksum = sha256_of(weights)
    state = load_tensors(weights, "export it again.")
    encoder = Encoder.from_state(state, config.shape, config.input, provenance, str(weights))
    if checksum != config.sha256:
        raise ArtefactError(
            f"{weights} is damaged or exchanged: its checksum is not the one in {folder / CONFIG}: export it again."
        )
    encoder.model.float().to(device or "cpu")
    return encoder


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ArtefactError, listing every difference, if weights do not fit a model exactly."""
    check_fit(model.state_dict(), state, source)
