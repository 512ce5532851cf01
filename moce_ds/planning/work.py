"""The work of a step, counted from the settings: parameters, FLOPs, network traffic and memory in bytes.

A FLOP is one multiplication or addition; only matrix products count. Ranks are numbered node by node.

Axes in formulas: N patches, T tokens, D width, H hidden width, P values of a patch, k experts per image.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from moce_ds.checkpoint.parameters import is_decoder
from moce_ds.errors import ConfigError
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.training.settings import PretrainSettings, batch_arithmetic

_DECODER_RATIO = 4.0  # hidden width over width in the decoder's blocks


@dataclass(frozen=True)
class Machines:
    """Nodes with `gpus` GPUs each, one process per GPU."""

    nodes: int
    gpus: int

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Parameters:
    """Parameter counts, without the gates (E times the width of an embedding per layer).

    Attributes:
        active: used for one image.
        total: stored in a checkpoint.
        shared, experts: held by one process: those equal on all processes, and those of its own experts.
        spare: the part of `experts` beyond one dense MLP per layer, which every step reads and writes.
        encoder: of one dense encoder.
    """

    active: int
    total: int
    shared: int
    experts: int
    spare: int
    encoder: int

    @property
    def held(self) -> int:
        """Parameters held by one process."""
        return self.shared + self.experts


def count_parameters(config: PretrainSettings) -> Parameters:
    """Count parameters without allocating them."""
    spec = config.model_spec
    experts, shape = spec.experts, spec.dense.shape
    dense, encoder = _dense_parameters(spec.dense)
    if experts is None:
        return Parameters(dense, dense, dense, 0, 0, encoder)
    units = shape.hidden - experts.common_units  # of one expert
    a_layer = len(experts.layers) * (2 * shape.width * units + units + shape.width)
    shared = dense if experts.shared else dense - a_layer
    if experts.common_units:
        shared += len(experts.layers) * shape.width  # common units and groups have separate second biases
    held = experts.num_experts // config.experts.ep_size * a_layer
    return Parameters(
        active=shared + experts.k * a_layer,
        total=shared + experts.num_experts * a_layer,
        shared=shared,
        experts=held,
        spare=held - a_layer,
        encoder=encoder,
    )


@cache
def _dense_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Parameter counts of a dense masked autoencoder and of its encoder."""
    with torch.device("meta"):
        model = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(counts.values()), sum(count for name, count in counts.items() if not is_decoder(name))


def visible_tokens(config: PretrainSettings) -> int:
    """Tokens of an image in the encoder: visible patches and cls."""
    return int(config.vit_shape.num_patches * (1 - config.model.mask_ratio)) + 1


def block_flops(tokens: int, width: int, mlp_ratio: float, mlps: int = 1) -> int:
    """FLOPs of the forward pass of one block on one image: qkv and projection 8 T D^2, attention 4 T^2 D, each MLP 4 T
    D H."""
    return 8 * tokens * width**2 + 4 * tokens**2 * width + mlps * 4 * tokens * width * int(width * mlp_ratio)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image.

    Attributes:
        patches, encoder, decoder: forward pass through the patch embedding, the blocks of the encoder, and the decoder.
        again: what `checkpoint_activations` recomputes.
        teacher: forward pass of SDR's teacher.
    """

    patches: int
    encoder: int
    decoder: int
    again: int
    teacher: int

    @property
    def step(self) -> int:
        """Forward and backward. The backward pass costs twice the forward pass; the embedding once, since images need
        no gradient."""
        return 2 * self.patches + 3 * (self.encoder + self.decoder) + self.again + self.teacher


def image_flops(config: PretrainSettings) -> Flops:
    """Count the products of one image."""
    shape, decoder, T = config.vit_shape, config.model.decoder, visible_tokens(config)
    N, D, P = shape.num_patches, shape.width, 3 * shape.patch_size**2
    with_experts = len(config.expert_layers)
    plain = (shape.depth - with_experts) * block_flops(T, D, shape.mlp_ratio)
    expert = with_experts * block_flops(T, D, _path_ratio(config), _mlps(config))
    # PyTorch stops recomputing once the backward pass has its inputs; the last product of a block is not one of them.
    spared = (shape.depth - with_experts) * 2 * T * D * int(D * shape.mlp_ratio)
    blocks = decoder.depth * block_flops(N + 1, decoder.width, _DECODER_RATIO)
    around = 2 * T * D * decoder.width + 2 * (N + 1) * decoder.width * P
    return Flops(
        patches=2 * N * D * P,
        encoder=plain + expert,
        decoder=blocks + around,
        again=plain - spared + expert if config.engine.checkpoint_activations else 0,
        teacher=shape.depth * block_flops(T, D, shape.mlp_ratio) + 2 * N * D * P if config.wants_teacher else 0,
    )


def _path_ratio(config: PretrainSettings) -> float:
    """MLP ratio (hidden width over width) of one route."""
    return config.model_spec.dense.shape.mlp_ratio


def _mlps(config: PretrainSettings) -> int:
    """MLPs that an image passes through in an expert layer."""
    return config.experts.k + config.experts.shared_expert


def _passes(config: PretrainSettings) -> int:
    """All-to-all exchanges of an expert layer: to the experts and back, forward and backward; recomputation adds one
    forward pass."""
    return 6 if config.engine.checkpoint_activations else 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step within its node and across nodes, and the number of collectives."""

    inside: float
    across: float
    collectives: int


def all_rows_bytes(config: PretrainSettings) -> int:
    """Bytes that a step would exchange over all processes if every row moved in every expert layer.

    Images x experts per image x layers x visible tokens (with cls) x width x bytes per number, to the experts and back,
    forward and backward.
    """
    rows = config.optim.batch_size * config.experts.k * len(config.expert_layers)
    return _passes(config) * rows * visible_tokens(config) * config.vit_shape.width * _bytes_each(config)


def exchange(config: PretrainSettings, machines: Machines, moved: float | None) -> Traffic:
    """Traffic of the all-to-all between images and experts: there and back, forward and backward, in every expert
    layer.

    Args:
        moved: share of the rows that leave their rank, as a run logs it; None: 1 - 1/ep_size, as without locality.

    Raises:
        ConfigError: the gate routes tokens; its traffic depends on their content.
    """
    experts = config.experts
    if config.family.has_experts and not config.family.routes_by_cluster:
        raise ConfigError(
            f"model.arch: the traffic of {config.model.arch} depends on the images, so it cannot be planned."
        )
    layers = len(config.expert_layers)
    if not layers or experts.ep_size == 1:
        return Traffic(0, 0, 0)
    share = 1 - 1 / experts.ep_size if moved is None else moved
    sent = share * all_rows_bytes(config) / machines.world_size
    away = _peers_across(machines, experts.ep_size) / (experts.ep_size - 1)
    return Traffic(sent * (1 - away), sent * away, _passes(config) * layers * config.optim.accumulation)


def _peers_across(machines: Machines, ep_size: int) -> int:
    """Members of a rank's expert-parallel group on other nodes, for the rank with most of them."""
    groups = [range(first, first + ep_size) for first in range(0, machines.world_size, ep_size)]
    return max(
        sum(peer // machines.gpus != rank // machines.gpus for peer in group) for group in groups for rank in group
    )


def reduction(config: PretrainSettings, machines: Machines) -> tuple[Traffic, Traffic]:
    """Traffic of reducing the gradients, and of gathering the weights that each owner has updated (ZeRO).

    Shared parameters are reduced over all ranks, experts over the ranks with copies of them. A reduction over g ranks
    per node and n nodes sends 2 (g - 1)/g of its bytes within nodes, and 2 (n - 1)/n of a g-th of them across;
    gathering sends half of that. Under autocast the gradients of linear layers are sent as bf16, weights always as
    fp32.
    """
    count = count_parameters(config)
    times = (
        config.optim.accumulation if config.engine.zero_stage == 2 else 1
    )  # ZeRO 2 keeps no whole gradients to accumulate
    ep_size = config.experts.ep_size if count.experts else 1
    copies_inside = max(1, machines.gpus // ep_size)
    copies_across = machines.world_size / ep_size / copies_inside
    inside = count.shared * (1 - 1 / machines.gpus) + count.experts * (1 - 1 / copies_inside)
    across = count.shared * (1 - 1 / machines.nodes) / machines.gpus
    across += count.experts * (1 - 1 / copies_across) / copies_inside
    kinds = (1 + bool(count.experts)) * (
        machines.world_size > 1
    )  # shared parameters and experts use separate collectives
    gradients = 2 * times * _bytes_each(config)
    return (
        Traffic(gradients * inside, gradients * across, kinds * times),
        # Weights with and without decay are gathered separately, and their norms are summed.
        Traffic(4 * inside, 4 * across, 4 * kinds),
    )


def owned_parameters(config: PretrainSettings, world_size: int) -> float:
    """Parameters whose optimizer state one process owns (ZeRO)."""
    count = count_parameters(config)
    ep_size = config.experts.ep_size if count.experts else 1
    return count.shared / world_size + count.experts * ep_size / world_size


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs, as a rough upper estimate.

    Attributes:
        state: weights, gradients and optimizer state.
        buffers: DeepSpeed's reduction buffers (on a CPU only the part in use counts).
        activations: what the backward pass needs of the forward pass.
    """

    state: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.state + self.buffers + self.activations


_BUFFER = 500_000_000
"""Capacity of DeepSpeed's reduction buffer in parameters (`reduce_bucket_size`); there is one buffer per type that is
sent."""


def memory(config: PretrainSettings, world_size: int) -> Memory:
    """Estimate the memory of a process. Raises ConfigError if the batch cannot be divided.

    Weights and gradients are whole and in fp32. ZeRO partitions an fp32 copy and Adam's two moments over the processes
    with the same parameters (stage 2 also the gradients). A block keeps about 16 + 2 H/D activations per token and
    width. With `checkpoint_activations` an encoder block keeps one (fp32), and one whole block exists while it is
    recomputed.
    """
    count, owned = count_parameters(config), owned_parameters(config, world_size)
    gradients = count.held if config.engine.zero_stage == 1 else owned
    shape, decoder = config.vit_shape, config.model.decoder
    size, T, N = _bytes_each(config), visible_tokens(config), shape.num_patches
    with_experts = len(config.expert_layers)
    hidden = (shape.mlp_ratio, _path_ratio(config) * _mlps(config))  # over the width
    plain, expert = (T * shape.width * (16 + 2 * ratio) * size for ratio in hidden)
    if config.engine.checkpoint_activations:
        kept = shape.depth * T * shape.width * 4 + max(plain, expert if with_experts else 0)
    else:
        kept = (shape.depth - with_experts) * plain + with_experts * expert
    kept += decoder.depth * (N + 1) * decoder.width * (16 + 2 * _DECODER_RATIO) * size
    kept += 4 * 4 * 3 * shape.image_size**2  # images, targets, predictions and their difference, fp32
    teacher = _dense_parameters(replace(config.model_spec, experts=None))[1] if config.wants_teacher else 0
    return Memory(
        state=4 * (count.held + gradients + 3 * owned + teacher),
        buffers=4 * _BUFFER * (2 if config.engine.precision == "bf16" else 1),
        activations=batch_arithmetic(config, world_size).micro * kept,
    )


def _bytes_each(config: PretrainSettings) -> int:
    return 2 if config.engine.precision == "bf16" else 4
