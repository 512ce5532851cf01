"""Encoders from weights on disk: the dense ViT inside a checkpoint, the encoder of a TokenMoE, and the public MAE's.

In a checkpoint with experts, chosen experts replace the expert layers, and the gates are left out. Experts are read one
at a time, so the memory required is that of the dense model and one expert.

Axes: N patches, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint
from moce_ds.checkpoint.parameters import CLASSIFIER, encoder_block, expert_key, is_cluster_gate, is_decoder
from moce_ds.config.families import TOKEN_MOE
from moce_ds.data.transform import ImageInput
from moce_ds.errors import ArtefactError
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import make_mlp, sincos_positions
from moce_ds.models.token_moe import TokenExperts
from moce_ds.models.vit import Encoder, ViTShape, check_state, timm_vit
from moce_ds.models.warm_start import as_float32, read_file
from moce_ds.storage.files import sha256_of

_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
_READER = "ENCODER"
_SIZES = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}
"""Heads of the public MAE's encoders by (width, blocks): ViT-B, ViT-L, ViT-H."""

_SHOWN = 5  # names of weights listed in an error


@dataclass(frozen=True)
class Share:
    """An expert's part in the dense MLP of a layer.

    Attributes:
        weight: its weight in the average of the layer's chosen experts (1 if it is the only one).
        gate: the gate value to fold in.
    """

    weight: float = 1.0
    gate: float = 1.0


Mixture = tuple[Mapping[int, Share], ...]
"""The chosen experts of every expert layer; one expert per layer is a route."""

DENSE: Mixture = ()


def encoder_state(checkpoint: Checkpoint, spec: ModelSpec, mixture: Mixture) -> dict[str, Tensor]:
    """Weights of the dense ViT, by timm's names; reads only their files. Raises ArtefactError."""
    layers = spec.experts.layers if spec.experts else ()
    shared = ["cls_token", *(f"blocks.{block}.norm1.weight" for block in range(spec.shape.depth))]
    state = {"pos_embed": sincos_positions(spec.shape, spec.shape.width)}
    for name, tensor in checkpoint.load(WEIGHTS, shared).items():
        if not is_decoder(name) and not is_cluster_gate(name):
            state[name] = tensor
    for block, shares in zip(layers, mixture, strict=True):
        merged = spec.variant.dense_mlp(state, block, merged_expert(checkpoint, block, shares))
        state |= {f"blocks.{block}.mlp.{rest}": tensor for rest, tensor in merged.items()}
    return state


def decoder_state(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Tensor]:
    """Weights of the decoder, by the names of the public MAE. Raises ArtefactError."""
    names = ["mask_token", *(f"decoder_blocks.{block}.norm1.weight" for block in range(spec.decoder.depth))]
    state = {name: tensor for name, tensor in checkpoint.load(WEIGHTS, names).items() if is_decoder(name)}
    return state | {"decoder_pos_embed": sincos_positions(spec.shape, spec.decoder.width)}


def merged_expert(checkpoint: Checkpoint, block: int, shares: Mapping[int, Share]) -> dict[str, Tensor]:
    """The MLP of a block: the average of its chosen experts, each with its gate value folded in.

    The gate value p scales the second matrix: `fc2.weight *= p`, `fc2.bias *= p` (docs/method.md, "Deployment").
    """
    merged: dict[str, Tensor] = {}
    for expert, share in shares.items():
        tensors = checkpoint.load(WEIGHTS, [expert_key(block, expert, _MLP[0])])
        for rest in _MLP:
            part = tensors[expert_key(block, expert, rest)] * (share.weight * (share.gate if "fc2" in rest else 1.0))
            merged[rest] = merged[rest].add_(part) if rest in merged else part
    return merged


def as_encoder(state: Mapping[str, Tensor], spec: ModelSpec, provenance: dict[str, object], source: str) -> Encoder:
    """An encoder in memory with these tensors as weights, checked against the shape. Raises ArtefactError."""
    with torch.device("meta"):  # without a second copy
        model = timm_vit(spec.shape)
    check_state(model, state, source)
    model.load_state_dict(dict(state), assign=True)
    return Encoder(model.eval(), spec.shape, spec.input, provenance)


def dense_encoder(checkpoint: Checkpoint) -> Encoder:
    """The encoder of a dense run's checkpoint. Raises ArtefactError if the run has experts."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    if spec.experts is not None:
        raise ArtefactError(f"{checkpoint.folder} holds experts: choose one with `moce export` and use what it writes.")
    provenance: dict[str, object] = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "route": None}
    return as_encoder(encoder_state(checkpoint, spec, DENSE), spec, provenance, str(checkpoint.folder))


def token_encoder(checkpoint: Checkpoint, device: torch.device) -> Encoder:
    """The encoder of a run with model.arch=token_moe. Raises ArtefactError if its weights do not fit."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    experts, width = spec.experts, spec.shape.width
    assert experts is not None and spec.family is TOKEN_MOE, "checked by the caller"
    model = timm_vit(spec.shape)
    for block in experts.layers:
        model.blocks[block].mlp = TokenExperts(
            lambda: make_mlp(width, spec.shape.mlp_ratio), width, experts.num_experts, experts.k
        )
    weights = {name: tensor for name, tensor in checkpoint.load(WEIGHTS).items() if not is_decoder(name)}
    state = {**weights, "pos_embed": sincos_positions(spec.shape, width)}
    check_state(model, state, str(checkpoint.folder))
    model.load_state_dict(state)
    provenance: dict[str, object] = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "gate": "token"}
    return Encoder(model.eval().to(device), spec.shape, spec.input, provenance)


def public_encoder(path: Path, heads: int | None = None) -> Encoder:
    """The encoder in a file of the public MAE (facebookresearch/mae), on the host, without decoder and classifier.

    The file may be "pretrain", "full", fine-tuned, or a training checkpoint; the names of the weights are ours. What it
    does not contain is taken from the public code: the heads from the sizes that it trains, the normalisation of the
    images, and the centre crop.

    Args:
        path: `.pth`, `.pt` or `.safetensors`; nothing in it is executed.
        heads: attention heads, if the size of the encoder is not one of the public MAE's.

    Raises:
        ArtefactError: the file cannot be read, does not hold a plain ViT with the names of the public MAE, or its
            number of heads is unknown; the message lists what was found and expected.
    """
    named = f"{_READER}: {path}"
    tensors = read_file(path, _READER)
    state = as_float32({n: t for n, t in tensors.items() if not is_decoder(n) and n not in CLASSIFIER}, named)
    shape = _shape(state, heads, named)
    with torch.device("meta"):  # without a second copy
        model = timm_vit(shape)
    check_state(model, state, named)
    model.load_state_dict(state, assign=True)
    input = _input(shape.image_size)
    provenance = {"file": str(path), "sha256": sha256_of(path), "taken_for": _taken_for(shape, input)}
    return Encoder(model.eval(), shape, input, provenance)


def _input(size: int) -> ImageInput:
    """The input of the public MAE's evaluation: ImageNet's normalisation, and no cropping above 224 px."""
    return ImageInput(size, center_crop=0.875 if size <= 224 else 1.0)


def _taken_for(shape: ViTShape, input: ImageInput) -> str:
    """Describe the assumptions about what the file does not contain."""
    return (
        f"a ViT of the public MAE: width {shape.width}, {shape.depth} blocks, {shape.heads} heads; images of "
        f"{input.size} px with ImageNet's mean and standard deviation, centre crop {input.center_crop}"
    )


def _shape(state: Mapping[str, Tensor], heads: int | None, named: str) -> ViTShape:
    """The size of the encoder, from its weights. Raises ArtefactError."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    lacking = [name for name in names if name not in state]
    if lacking:
        shown = ", ".join(sorted(state)[:_SHOWN]) + (", ..." if len(state) > _SHOWN else "")
        raise ArtefactError(
            f"{named} holds no {' and no '.join(lacking)}; expected a ViT by the names of the public MAE, with its "
            f"position table. Found: {shown or 'a decoder alone'}."
        )
    projection, positions, fc1 = (state[name] for name in names)
    patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(0, patches))
    square = projection.ndim == 4 and projection.shape[1] == 3 and projection.shape[2] == projection.shape[3]
    if not square or fc1.ndim != 2 or not patches or side**2 != patches or 0 in (*projection.shape, *fc1.shape):
        raise ArtefactError(
            f"{named} has patches {list(projection.shape)} and positions {list(positions.shape)}; expected "
            "[D, 3, patch, patch] and [1, 1 + N, D], with N the square of the patches along an image."
        )
    width, patch = projection.shape[0], projection.shape[2]
    depth = 1 + max(block for block in map(encoder_block, state) if block is not None)
    shape = ViTShape(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads or _known_heads(width, depth, named),
        pooled_norm="fc_norm.weight" in state,
    ).with_hidden(fc1.shape[0])
    if width % shape.heads:
        raise ArtefactError(f"{named} has width {width}, which is not a multiple of {shape.heads} heads.")
    return shape


def _known_heads(width: int, depth: int, named: str) -> int:
    if (width, depth) not in _SIZES:
        known = ", ".join(f"{w} x {blocks} ({count})" for (w, blocks), count in _SIZES.items())
        raise ArtefactError(
            f"{named} has width {width} and {depth} blocks, and its number of attention heads is unknown. Known sizes "
            f"(heads): {known}. Pass --heads to `moce features`, `knn` or `probe`; other verbs take the encoder folder "
            "that `moce features` writes, OUT/encoder."
        )
    return _SIZES[width, depth]
