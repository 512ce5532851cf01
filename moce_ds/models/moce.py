"""MoCE: a masked autoencoder in which some MLPs are layers of experts, chosen by the cluster of the image.

Axes: B images, N patches, T tokens, D width, L expert layers, M clusters, E experts, C width of an embedding, K experts
per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moce_ds.distributed.randomness import INIT, hashed
from moce_ds.models.mae import Block, MaskedAutoencoder, ModelOutput, RunBlock, make_mlp
from moce_ds.models.parameters import expert_key, is_replaced
from moce_ds.models.shapes import NO_WEIGHTS, DecoderShape, ExpertShape, LossWeights, ViTShape
from moce_ds.moe.gate import ClusterGate, Gate, PathGate, RandomGate, combine_weights, gate_losses
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import LayerPlan, plan_layer

MakeLayer = Callable[[Callable[[], nn.Module], int, bool], nn.Module]


class HasLayers(Protocol):
    """A plan of all expert layers, or one that is made when a layer first asks for it."""

    @property
    def layers(self) -> Sequence[LayerPlan]:
        """One plan for each expert layer, its tensors on the device of the model."""
        ...


@dataclass(frozen=True)
class Routing:
    """The routes of a batch, as input of the forward pass.

    Attributes:
        clusters_B: cluster of each image, int64.
        plan: the plan of the expert layers; the forward pass first reads it in the first of them, when the blocks below
            it are already running on the device.
        noise_LME: gate noise of this step, or None.
        imbalance_share: share of the weight of the imbalance loss in this step, 0-1.
    """

    clusters_B: Tensor
    plan: HasLayers
    noise_LME: Tensor | None
    imbalance_share: float = 1.0


class Moce(MaskedAutoencoder):
    """A MaskedAutoencoder whose blocks in `experts.layers` have an expert layer as `mlp`.

    `make_layer(make_mlp, num_experts, shared)` is `ClusterMoE` in training, and `ExpertLayer` or `ReferenceMoE` if one
    process holds all experts; the parameter names are the same. `weights` are those of the gate losses.
    """

    share_M: Tensor

    def __init__(
        self,
        shape: ViTShape,
        decoder: DecoderShape,
        mask_ratio: float,
        experts: ExpertShape,
        embeddings_MC: Tensor,
        share_M: Tensor,
        make_layer: MakeLayer,
        weights: LossWeights = NO_WEIGHTS,
    ) -> None:
        super().__init__(shape, decoder, mask_ratio)
        self.experts = experts
        self.weights = weights
        self.gate = make_gate(experts, embeddings_MC)
        self.register_buffer("share_M", share_M.float())
        self.layer_of_block = {block: layer for layer, block in enumerate(experts.layers)}
        for block in experts.layers:
            self.blocks[block].mlp = make_layer(self.make_expert, experts.num_experts, experts.shared)

    def make_expert(self) -> nn.Module:
        """One expert, with random weights."""
        return make_mlp(self.shape.width, self.shape.mlp_ratio)

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor, routing: Routing) -> ModelOutput:  # type: ignore[override]
        """Reconstruct masked images, each on the route of its cluster; gate losses are `imbalance` and `balance`."""
        probs_LME = self.gate(routing.noise_LME)
        reconstruction = self.reconstruct(images_BCHW, noise_BN, self.routed(routing, probs_LME))
        gate = gate_losses(probs_LME, routing.clusters_B, self.share_M)
        loss = reconstruction.loss
        if self.weights.imbalance is not None:
            loss = loss + self.weights.imbalance * routing.imbalance_share * gate.imbalance
        if self.weights.balance is not None:
            loss = loss + self.weights.balance * gate.balance
        losses = {"loss": loss, "reconstruction": reconstruction.loss}
        return ModelOutput(losses | {"imbalance": gate.imbalance, "balance": gate.balance}, reconstruction)

    def routed(self, routing: Routing, probs_LME: Tensor) -> RunBlock:
        """A function that runs the blocks, for `encode` and `reconstruct`, with each image on its own route."""

        def run_block(index: int, block: Block, x_BTD: Tensor) -> Tensor:
            layer = self.layer_of_block.get(index)
            if layer is None:
                return block(x_BTD)
            plan = routing.plan.layers[layer]
            weight_BK = combine_weights(probs_LME, layer, routing.clusters_B, plan.experts_BK, self.experts.combine)
            return self.expert_block(block, x_BTD, plan, weight_BK)

        return run_block

    def on_route(self, experts: Sequence[int], weights: Sequence[float]) -> RunBlock:
        """A function that runs the blocks, for `encode` and `reconstruct`, with all images on one route with given
        weights.

        Requires all experts of the route in one process. Exports are compared with it.
        """
        slots = default_placement(1, self.experts.num_experts)[0]

        def run_block(index: int, block: Block, x_BTD: Tensor) -> Tensor:
            layer = self.layer_of_block.get(index)
            if layer is None:
                return block(x_BTD)
            B = len(x_BTD)
            plan = plan_layer(np.full((1, B, 1), experts[layer]), slots, 0, 1)
            return self.expert_block(block, x_BTD, plan, torch.full((B, 1), weights[layer]))

        return run_block

    def expert_block(self, block: Block, x_BTD: Tensor, plan: LayerPlan, weight_BK: Tensor) -> Tensor:
        """timm's block with experts as MLP; drop path and layer scale are identities in MAE."""
        x_BTD = x_BTD + block.attn(block.norm1(x_BTD))
        return x_BTD + block.mlp(block.norm2(x_BTD), plan, weight_BK)


def _cluster_gate(experts: ExpertShape, embeddings_MC: Tensor) -> Gate:
    return ClusterGate(
        embeddings_MC,
        len(experts.layers),
        experts.num_experts,
        experts.temperature,
        tied=experts.tied,
        learnable=experts.learnable,
        init_scale=experts.init_scale,
    )


def _random_gate(experts: ExpertShape, embeddings_MC: Tensor) -> Gate:
    L, E = len(experts.layers), experts.num_experts
    return RandomGate(len(embeddings_MC), L, E, experts.seed, tied=experts.tied)


def _path_gate(experts: ExpertShape, embeddings_MC: Tensor) -> Gate:
    return PathGate(len(embeddings_MC), len(experts.layers), experts.num_experts, experts.stages)


_GATES = {"cluster": _cluster_gate, "random": _random_gate, "path": _path_gate}


def make_gate(experts: ExpertShape, embeddings_MC: Tensor) -> Gate:
    """The gate of a model that routes by cluster."""
    return _GATES[experts.gate](experts, embeddings_MC)


def upcycle(dense: dict[str, Tensor], experts: ExpertShape, perturbation: float, seed: int) -> dict[str, Tensor]:
    """Weights of a MoCE from those of a dense MAE: every expert is the dense MLP with a small perturbation.

    A weight matrix W of an expert becomes `W + perturbation * rms(W) * n`, with n standard normal; biases are
    unchanged. The noise of an expert depends only on (seed, layer, expert), not on its rank. The gate is not included.

    Args:
        dense: state of a dense MAE.
        experts: the layers to convert.
        perturbation: relative size; 0 makes exact copies.
        seed: random seed of the perturbation.
    """
    state = {}
    for name, tensor in dense.items():
        if not is_replaced(name, experts.layers):
            state[name] = tensor
            continue
        parts = name.split(".", 3)
        block, rest = int(parts[1]), parts[3]
        for expert in range(experts.num_experts):
            copy = tensor.clone()
            if tensor.ndim > 1 and perturbation > 0:
                number = hashed(INIT, seed, block, expert, int(rest.startswith("fc2")))[()]
                generator = torch.Generator().manual_seed(int(number >> np.uint64(1)))
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                copy += perturbation * tensor.square().mean().sqrt() * noise.to(tensor.dtype)
            state[expert_key(block, expert, rest)] = copy
        if experts.shared:
            state[f"blocks.{block}.mlp.shared.{rest}"] = tensor
    return state
