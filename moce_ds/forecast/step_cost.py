"""The work of a step, counted from the settings: parameters, FLOPs, network traffic and memory in bytes.

A FLOP is one multiplication or addition; only matrix products count. Ranks are numbered node by node.

Axes in formulas: N patches, T tokens, D width, H hidden width, P values of a patch, k experts per image.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from moce_ds.common.errors import ConfigError
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.parameters import is_decoder
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import EngineSettings, PretrainOptimSettings, PretrainSettings

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


@cache
def _dense_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Parameter counts of a dense masked autoencoder and of its encoder."""
    with torch.device("meta"):
        model = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(counts.values()), sum(count for name, count in counts.items() if not is_decoder(name))


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


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step within its node and across nodes, and the number of collectives."""

    inside: float
    across: float
    collectives: int


def _peers_across(machines: Machines, ep_size: int) -> int:
    """Members of a rank's expert-parallel group on other nodes, for the rank with most of them."""
    groups = [range(first, first + ep_size) for first in range(0, machines.world_size, ep_size)]
    return max(
        sum(peer // machines.gpus != rank // machines.gpus for peer in group) for group in groups for rank in group
    )


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


@dataclass(frozen=True)
class Work:
    """What a step of a run computes, sends and stores.

    Attributes:
        spec: the model.
        ep_size: expert-parallel group size.
        teacher: whether the model is also distilled from the dense MAE that the run starts from.
    """

    spec: ModelSpec
    ep_size: int
    optim: PretrainOptimSettings
    engine: EngineSettings
    teacher: bool

    @classmethod
    def of(cls, config: PretrainSettings) -> "Work":
        """The work of a run with these settings."""
        return cls(config.model_spec, config.ep_size, config.optim, config.engine, config.wants_teacher)

    @property
    def parameters(self) -> Parameters:
        """Parameter counts; nothing is allocated."""
        spec = self.spec
        experts, shape = spec.experts, spec.dense.shape
        dense, encoder = _dense_parameters(spec.dense)
        if experts is None:
            return Parameters(dense, dense, dense, 0, 0, encoder)
        units = shape.hidden - experts.common_units  # of one expert
        a_layer = len(experts.layers) * (2 * shape.width * units + units + shape.width)
        shared = dense if experts.shared else dense - a_layer
        if experts.common_units:
            shared += len(experts.layers) * shape.width  # common units and groups have separate second biases
        held = experts.num_experts // self.ep_size * a_layer
        return Parameters(
            active=shared + experts.k * a_layer,
            total=shared + experts.num_experts * a_layer,
            shared=shared,
            experts=held,
            spare=held - a_layer,
            encoder=encoder,
        )

    @property
    def visible_tokens(self) -> int:
        """Tokens of an image in the encoder: visible patches and cls."""
        return int(self.spec.shape.num_patches * (1 - self.spec.mask_ratio)) + 1

    @property
    def image_flops(self) -> Flops:
        """FLOPs of one image."""
        shape, decoder, T = self.spec.shape, self.spec.decoder, self.visible_tokens
        N, D, P = shape.num_patches, shape.width, 3 * shape.patch_size**2
        with_experts = len(self._layers)
        plain = (shape.depth - with_experts) * block_flops(T, D, shape.mlp_ratio)
        expert = with_experts * block_flops(T, D, self._path_ratio, self._mlps)
        # PyTorch stops recomputing once the backward pass has its inputs, to which the last product of a block does not
        # belong.
        spared = (shape.depth - with_experts) * 2 * T * D * int(D * shape.mlp_ratio)
        blocks = decoder.depth * block_flops(N + 1, decoder.width, _DECODER_RATIO)
        around = 2 * T * D * decoder.width + 2 * (N + 1) * decoder.width * P
        return Flops(
            patches=2 * N * D * P,
            encoder=plain + expert,
            decoder=blocks + around,
            again=plain - spared + expert if self.engine.checkpoint_activations else 0,
            teacher=shape.depth * block_flops(T, D, shape.mlp_ratio) + 2 * N * D * P if self.teacher else 0,
        )

    @property
    def all_rows_bytes(self) -> int:
        """Bytes that a step would exchange over all processes if every row moved in every expert layer.

        Images x experts per image x layers x visible tokens (with cls) x width x bytes per number, to the experts and
        back, forward and backward.
        """
        k = self.spec.experts.k if self.spec.experts else 1
        rows = self.optim.batch_size * k * len(self._layers)
        return self._passes * rows * self.visible_tokens * self.spec.shape.width * self._bytes_each

    def exchange(self, machines: Machines, moved: float | None) -> Traffic:
        """Traffic of the all-to-all between images and experts: there and back, forward and backward, in every expert
        layer.

        Args:
            moved: share of the rows that leave their rank, as a run logs it; None: 1 - 1/ep_size, as without locality.

        Raises:
            ConfigError: the gate routes tokens; its traffic depends on their content.
        """
        kind = self.spec.model_kind
        if kind.has_experts and not kind.routes_by_cluster:
            raise ConfigError(f"model.arch: the traffic of {kind.arch} depends on the images, so it cannot be planned.")
        layers = len(self._layers)
        if not layers or self.ep_size == 1:
            return Traffic(0, 0, 0)
        share = 1 - 1 / self.ep_size if moved is None else moved
        sent = share * self.all_rows_bytes / machines.world_size
        away = _peers_across(machines, self.ep_size) / (self.ep_size - 1)
        return Traffic(sent * (1 - away), sent * away, self._passes * layers * self.optim.accumulation)

    def reduction(self, machines: Machines) -> tuple[Traffic, Traffic]:
        """Traffic of reducing the gradients, and of gathering the weights that each owner has updated (ZeRO).

        Shared parameters are reduced over all ranks, experts over the ranks with copies of them. A reduction over g
        ranks per node and n nodes sends 2 (g - 1)/g of its bytes within nodes, and 2 (n - 1)/n of a g-th of them
        across; gathering sends half of that. Under autocast the gradients of linear layers are sent as bf16, weights
        always as fp32.
        """
        count = self.parameters
        # ZeRO 2 keeps no whole gradients to accumulate.
        times = self.optim.accumulation if self.engine.zero_stage == 2 else 1
        ep_size = self.ep_size if count.experts else 1
        copies_inside = max(1, machines.gpus // ep_size)
        copies_across = machines.world_size / ep_size / copies_inside
        inside = count.shared * (1 - 1 / machines.gpus) + count.experts * (1 - 1 / copies_inside)
        across = count.shared * (1 - 1 / machines.nodes) / machines.gpus
        across += count.experts * (1 - 1 / copies_across) / copies_inside
        # Shared parameters and experts use separate collectives.
        kinds = (1 + bool(count.experts)) * (machines.world_size > 1)
        gradients = 2 * times * self._bytes_each
        return (
            Traffic(gradients * inside, gradients * across, kinds * times),
            # Weights with and without decay are gathered separately, and their norms are summed.
            Traffic(4 * inside, 4 * across, 4 * kinds),
        )

    def owned_parameters(self, world_size: int) -> float:
        """Parameters whose optimizer state one process owns (ZeRO)."""
        count = self.parameters
        ep_size = self.ep_size if count.experts else 1
        return count.shared / world_size + count.experts * ep_size / world_size

    def memory(self, world_size: int) -> Memory:
        """Estimate the memory of a process. Raises ConfigError if the batch cannot be divided.

        Weights and gradients are whole and in fp32. ZeRO partitions an fp32 copy and Adam's two moments over the
        processes with the same parameters (stage 2 also the gradients). A block keeps about 16 + 2 H/D activations per
        token and width. With `checkpoint_activations` an encoder block keeps one (fp32), and one whole block exists
        while it is recomputed.
        """
        count, owned = self.parameters, self.owned_parameters(world_size)
        gradients = count.held if self.engine.zero_stage == 1 else owned
        shape, decoder = self.spec.shape, self.spec.decoder
        size, T, N = self._bytes_each, self.visible_tokens, shape.num_patches
        with_experts = len(self._layers)
        hidden = (shape.mlp_ratio, self._path_ratio * self._mlps)  # over the width
        plain, expert = (T * shape.width * (16 + 2 * ratio) * size for ratio in hidden)
        if self.engine.checkpoint_activations:
            kept = shape.depth * T * shape.width * 4 + max(plain, expert if with_experts else 0)
        else:
            kept = (shape.depth - with_experts) * plain + with_experts * expert
        kept += decoder.depth * (N + 1) * decoder.width * (16 + 2 * _DECODER_RATIO) * size
        kept += 4 * 4 * 3 * shape.image_size**2  # images, targets, predictions and their difference, fp32
        teacher = _dense_parameters(replace(self.spec, experts=None))[1] if self.teacher else 0
        return Memory(
            state=4 * (count.held + gradients + 3 * owned + teacher),
            buffers=4 * _BUFFER * (2 if self.engine.precision == "bf16" else 1),
            activations=batch_arithmetic(self.optim, world_size, self.ep_size).micro * kept,
        )

    @property
    def _layers(self) -> tuple[int, ...]:
        """Blocks with experts."""
        return self.spec.experts.layers if self.spec.experts else ()

    @property
    def _path_ratio(self) -> float:
        """MLP ratio (hidden width over width) of one route."""
        return self.spec.dense.shape.mlp_ratio

    @property
    def _mlps(self) -> int:
        """MLPs that an image passes through in an expert layer."""
        return self.spec.experts.k + self.spec.experts.shared if self.spec.experts else 1

    @property
    def _passes(self) -> int:
        """All-to-all exchanges of an expert layer: to the experts and back, forward and backward; recomputation adds
        one forward pass."""
        return 6 if self.engine.checkpoint_activations else 4

    @property
    def _bytes_each(self) -> int:
        return 2 if self.engine.precision == "bf16" else 4
