"""Encoders from weights on disk: the dense ViT inside a checkpoint, the encoder of a TokenMoE, and the public MAE's.

In a checkpoint with experts, chosen experts replace the expert layers, and the gates are left out. Experts are read one
at a time, so the memory required is that of the dense model and one expert.

Axes: N patches, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint
from moce_ds.common.config.model_kinds import TOKEN_MOE
from moce_ds.common.errors import ArtefactError
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import make_mlp, sincos_positions
from moce_ds.models.parameters import expert_key, is_cluster_gate, is_decoder
from moce_ds.models.token_moe import TokenExperts
from moce_ds.models.vit import Encoder, check_state, timm_vit

_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


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


def dense_encoder(checkpoint: Checkpoint) -> Encoder:
    """The encoder of a dense run's checkpoint. Raises ArtefactError if the run has experts."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    if spec.experts is not None:
        raise ArtefactError(f"{checkpoint.folder} holds experts: choose one with `moce export` and use what it writes.")
    provenance: dict[str, object] = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "route": None}
    state = encoder_state(checkpoint, spec, DENSE)
    return Encoder.from_state(state, spec.shape, spec.input, provenance, str(checkpoint.folder))


def token_encoder(checkpoint: Checkpoint, device: torch.device) -> Encoder:
    """The encoder of a run with model.arch=token_moe. Raises ArtefactError if its weights do not fit."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    experts, width = spec.experts, spec.shape.width
    assert experts is not None and spec.model_kind is TOKEN_MOE, "checked by the caller"
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
