"""Vision transformers by size, and the folder in which a trained encoder travels.

An encoder folder holds `model.safetensors` (timm's parameter names), `config.json` (the shape, the arguments for
timm, and what the input must be) and `provenance.json` (where it comes from). `moce features`, `knn`, `probe` and
the clusters read it; `moce export` writes it.

Axes: B images, N patches, T tokens (patches and cls), D width.
"""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moce_ds.compat import repair_torchvision
from moce_ds.data.transform import ImageInput
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.files import read_json, sha256_of, write_json

repair_torchvision()
import timm  # noqa: E402  (needs the repair)
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

FORMAT = "moce_ds encoder 1"


@dataclass(frozen=True)
class ViTShape:
    """The size of a vision transformer with one cls token."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def timm_arguments(self) -> dict[str, Any]:
        """Keyword arguments for timm's VisionTransformer without a classifier."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "num_classes": 0,
        }


@lru_cache  # timm builds the model to answer: a tenth of a second, and every step asks
def shape_of(timm_name: str) -> ViTShape:
    """The shape behind a timm name such as `vit_base_patch16_224`.

    Raises:
        ConfigError: timm does not know the name, or it is no plain ViT with a cls token.
    """
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(timm_name, timm.list_models("vit_*"), n=4)
        hint = f" Near: {', '.join(near)}." if near else " Such as vit_base_patch16_224."
        raise ConfigError(f"model.vit: got {timm_name!r}; expected the name of a ViT in timm.{hint}")
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    plain = isinstance(model, VisionTransformer) and model.cls_token is not None and model.num_prefix_tokens == 1
    if not plain or any(isinstance(m, nn.Identity) for m in (model.norm,)):
        raise ConfigError(f"model.vit: {timm_name} is no plain ViT with one cls token, such as vit_base_patch16_224.")
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
    """timm's plain ViT of this size, with one cls token and no classifier, random weights."""
    return VisionTransformer(**shape.timm_arguments())


@dataclass(frozen=True)
class Encoder:
    """A trained dense ViT with what one must know to use it.

    Attributes:
        model: timm's VisionTransformer in evaluation mode.
        input: size and normalisation of its images.
        provenance: where it comes from, as plain data.
    """

    model: VisionTransformer
    shape: ViTShape
    input: ImageInput
    provenance: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights; equal weights have equal fingerprints."""
        return fingerprint(self.model.state_dict())

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Mean of the patch tokens after the final norm, [B, D] float32 (docs/method.md, "Clustering")."""
        tokens_BTD = self.model.forward_features(images_BCHW)
        return tokens_BTD[:, 1:].float().mean(dim=1)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_encoder(
    folder: Path, state: Mapping[str, Tensor], shape: ViTShape, input: ImageInput, provenance: Any
) -> None:
    """Write an encoder folder's three files into an existing `folder` (the caller makes that atomic)."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    write_json(folder / "provenance.json", provenance)
    config = {
        "format": FORMAT,
        "shape": asdict(shape),
        "timm": shape.timm_arguments(),
        "input": input.to_tree(),
        "sha256": sha256_of(folder / "model.safetensors"),
    }
    write_json(folder / "config.json", config)


def load_encoder(folder: Path, device: torch.device | None = None) -> Encoder:
    """Read an encoder folder.

    Raises:
        ArtefactError: a file is missing or damaged, or the weights do not fit the shape; the names are listed.
    """
    config = read_json(folder / "config.json", "an encoder folder", "moce export")
    if config.get("format") != FORMAT:
        raise ArtefactError(f"{folder}: format {config.get('format')!r}; this version reads {FORMAT!r}.")
    shape = ViTShape(**config["shape"])
    model = timm_vit(shape)
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise ArtefactError(f"{folder / 'model.safetensors'} cannot be read ({error}): export it again.") from None
    check_state(model, state, str(folder / "model.safetensors"))
    model.load_state_dict(state)
    provenance = read_json(folder / "provenance.json", "an encoder folder", "moce export")
    return Encoder(model.eval().to(device or "cpu"), shape, ImageInput.from_tree(config["input"]), provenance)


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that do not fit a model exactly, listing every difference. Raises ArtefactError."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = [f"missing {name} {expected[name]}" for name in expected if name not in given]
    faults += [f"unexpected {name} {given[name]}" for name in given if name not in expected]
    faults += [
        f"{name} is {given[name]}, expected {expected[name]}"
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:12])
        more = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise ArtefactError(f"{source} does not fit the model:\n{listed}{more}")
