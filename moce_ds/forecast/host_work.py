"""What the host does in a step of a run, and how long the device waits for it (docs/planning.md, "The host").

The host launches the device's work ahead. It waits for the device once in a step, for the route probabilities; then it
chooses the experts, plans the first micro-batch and agrees with the other ranks, while the device computes the blocks
below the first expert layer. Other threads deal and read the images of later steps, while the device computes this one.

Axes in formulas: L expert layers, M clusters, E experts, W ranks, B images of a micro-batch of a process, N patches.
"""

from dataclasses import dataclass
from functools import cached_property

from moce_ds.common.config.model_kinds import SDR
from moce_ds.data.clusters import Clusters
from moce_ds.data.read_ahead import READERS
from moce_ds.data.shards import ShardSet
from moce_ds.forecast.devices import Device, Host
from moce_ds.forecast.step_cost import Machines, Work, block_flops
from moce_ds.models.settings import ExpertSettings
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import DataSettings

_ITERATIONS = 200
"""Of balancing one layer's table: a trained gate needs all that `moe/balance.py` allows, a new one far fewer."""

# Operators of a step that are no views, counted by tests/examples/host_work.py: in each micro-batch, with the hook of
# DeepSpeed on each parameter; and in the update. In bf16, autocast adds casts.
_MICRO, _MICRO_GATE, _MICRO_LAYER, _MICRO_EXPERT = 96, 140, 26, 22
_MICRO_BLOCK = {"fp32": 42, "bf16": 64}
_BLOCK_PARAMETERS = 12
_RECOMPUTED_BLOCK = {"fp32": 8, "bf16": 18}
_UPDATE, _UPDATE_BLOCK, _UPDATE_EXPERT = 150, 36, 12


@dataclass(frozen=True)
class Term:
    """Seconds of one kind of work on the host in a step, and the part of them that the device waits for."""

    seconds: float
    exposed: float


@dataclass(frozen=True)
class HostTimes:
    """The host's part in a step.

    Attributes:
        work: route table, plans, masks and launches, in the thread that trains.
        agreement: the small exchange between all ranks.
        dealing: assignment of the images to ranks, in the loading thread.
        reading: reading and decoding, in other threads.
        work_parts, reading_parts: seconds of the parts of `work`, which add up, and of the stages of `reading`, of
            which the slowest counts.
    """

    work: Term
    agreement: Term
    dealing: Term
    reading: Term
    work_parts: dict[str, float]
    reading_parts: dict[str, float]

    @property
    def exposed(self) -> float:
        """Seconds that the device waits for the host."""
        return sum(term.exposed for term in (self.work, self.agreement, self.dealing, self.reading))


@dataclass(frozen=True)
class HostWork:
    """What the host does in a step of a run.

    Attributes:
        work: what the device does.
        data: the images and how they are loaded.
        clusters: M; None: unknown.
        image_bytes: mean size of an image; None: unknown.
        balanced: whether the route table is balanced on the host.
        dealt: whether images are assigned to the ranks of their experts.
    """

    work: Work
    data: DataSettings
    clusters: int | None
    image_bytes: float | None
    balanced: bool
    dealt: bool

    @classmethod
    def of(cls, work: Work, data: DataSettings, experts: ExpertSettings) -> "HostWork":
        """The host's work in a run with these settings.

        Raises:
            ArtefactError: the shard set or the clusters exist and cannot be read.
        """
        kind, shards = work.spec.model_kind, data.shards
        folder = experts.clusters if kind.routes_by_cluster else None
        return cls(
            work=work,
            data=data,
            clusters=len(Clusters.open(folder).sizes_M) if folder and Clusters.recognises(folder) else None,
            image_bytes=float(ShardSet.open(shards).samples["size"].mean()) if ShardSet.recognises(shards) else None,
            balanced=kind.routes_by_cluster and kind is not SDR and experts.balance == "sinkhorn",
            dealt=kind.routes_by_cluster and work.ep_size > 1 and experts.loader_locality,
        )

    def times(self, machines: Machines, device: Device, busy: float) -> HostTimes:
        """The host's part in a step that takes the device `busy` seconds.

        Raises:
            ConfigError: the batch cannot be divided among that many processes.
        """
        host, world = device.host, machines.world_size
        batches = batch_arithmetic(self.work.optim, world, self.work.ep_size)
        table, plan = self.table(host), self.plan(host, world, batches.micro)
        parts = {
            "route table": table,
            "plans": batches.accumulation * plan,
            "masks": batches.accumulation * batches.micro * self.work.spec.shape.num_patches * host.mask,
            "launches": self.launches * host.launch,
        }
        agreement = rounds(world) * host.hop
        dealing, stages = self.dealing(host), self.reading(host, batches.accumulation * batches.micro)
        reading = max(stages.values())
        if not device.asynchronous:
            work, agree, deal, read = (Term(t, t) for t in (sum(parts.values()), agreement, dealing, reading))
            return HostTimes(work, agree, deal, read, parts, stages)
        others = sum(parts.values()) - table - plan
        hidden = self.flops_below * batches.micro / device.flops(self.work.engine.precision)

        def late(gap: float) -> float:
            """Seconds that the device waits, if the host works for `gap` seconds after it has waited for the device."""
            return max(0.0, gap - hidden, gap + others - busy)

        working, agreeing = late(table + plan), late(table + plan + agreement)
        step = busy + agreeing
        without_images = max(0.0, dealing - step)
        return HostTimes(
            Term(sum(parts.values()), working),
            Term(agreement, agreeing - working),
            Term(dealing, without_images),
            Term(reading, max(0.0, reading - step - without_images)),
            parts,
            stages,
        )

    def table(self, host: Host) -> float:
        """Seconds to choose the experts of all clusters: L x 200 x (an iteration + M x E entries)."""
        if not self.balanced:
            return 0.0
        entries = self._clusters(host) * self._experts
        return len(self._layers) * _ITERATIONS * (host.table_iteration + entries * host.table_entry)

    def plan(self, host: Host, world_size: int, micro: int) -> float:
        """Seconds to plan a micro-batch: L layers of the group's images, after a look-up of the clusters of all W x B
        images."""
        if not self.work.spec.model_kind.routes_by_cluster:
            return 0.0
        rows = self.work.ep_size * micro * self.work.spec.experts.k if self.work.spec.experts else 0
        each = host.plan_layer + rows * host.plan_image
        return len(self._layers) * each + world_size * micro * host.plan_lookup

    @cached_property
    def launches(self) -> int:
        """Operators that the host launches in a step, experts one by one. Compiled blocks would be fewer."""
        spec, engine = self.work.spec, self.work.engine
        blocks = spec.shape.depth + spec.decoder.depth
        held = len(self._layers) * self._experts // self.work.ep_size
        micro = _MICRO + blocks * _MICRO_BLOCK[engine.precision] + held * _MICRO_EXPERT
        if self._layers:
            micro += _MICRO_GATE + len(self._layers) * _MICRO_LAYER
        if engine.checkpoint_activations:
            micro += spec.shape.depth * _RECOMPUTED_BLOCK[engine.precision]
        update = _UPDATE + blocks * _UPDATE_BLOCK + held * _UPDATE_EXPERT
        return self.work.optim.accumulation * micro + update

    def dealing(self, host: Host) -> float:
        """Seconds to assign the images of a step to ranks; every process orders the whole batch."""
        if not self.dealt:
            return 0.0
        per_micro = self._clusters(host) * len(self._layers) * host.deal_cluster
        return self.work.optim.batch_size * host.deal_image + self.work.optim.accumulation * per_micro

    def reading(self, host: Host, images: int) -> dict[str, float]:
        """Seconds of each stage of loading `images` images; the stages work at the same time."""
        size = self.image_bytes or host.image_bytes
        stages = {
            "files": host.file,
            "latency of the storage": host.latency / READERS,
            "bandwidth of the storage": size / host.storage,
            "decoding": 1 / host.decode,
        }
        return {stage: images * seconds for stage, seconds in stages.items()}

    @property
    def flops_below(self) -> int:
        """FLOPs of one image that the device computes while the ranks agree: the blocks below the first expert layer,
        or the forward pass of a dense model."""
        spec, flops = self.work.spec, self.work.image_flops
        if not self._layers:
            return flops.patches + flops.encoder + flops.decoder
        plain = block_flops(self.work.visible_tokens, spec.shape.width, spec.shape.mlp_ratio)
        return flops.patches + min(self._layers) * plain

    @property
    def _layers(self) -> tuple[int, ...]:
        return self.work.spec.experts.layers if self.work.spec.experts else ()

    @property
    def _experts(self) -> int:
        return self.work.spec.experts.num_experts if self.work.spec.experts else 0

    def _clusters(self, host: Host) -> int:
        return self.clusters or host.clusters


def block_operators(precision: str) -> int:
    """Operators of a block's forward and backward pass, without DeepSpeed's hooks."""
    return _MICRO_BLOCK[precision] - _BLOCK_PARAMETERS


def rounds(world_size: int) -> int:
    """Messages, one after another, of the agreement (`distributed/host_reduce.py`): log2(W), and two more if W is no
    power of two."""
    doublings = world_size.bit_length() - 1
    return doublings + 2 * (world_size != 1 << doublings)


_NOTABLE = 0.02
"""Share of a step; the plan warns if the device waits longer for one kind of work."""


def host_warnings(times: HostTimes, step: float) -> list[str]:
    """What the device waits for in a step of `step` seconds, and what helps; one text for each kind of work."""
    part, stage = _largest(times.work_parts), _largest(times.reading_parts)
    deeper = "put experts into later blocks"
    helpful = "use larger micro-batches" if part == "launches" else f"use fewer clusters or {deeper}"
    reasons = (
        (times.work, f"the host ({part} {milliseconds(times.work_parts[part])}): {helpful}"),
        (times.agreement, f"the agreement of all ranks: {deeper}"),
        (times.dealing, "the order of the images: try experts.loader_locality=false"),
        (times.reading, f"images: {stage} takes {milliseconds(times.reading_parts[stage])}"),
    )
    return [
        f"the device waits {milliseconds(term.exposed)} for {reason}"
        for term, reason in reasons
        if term.exposed > _NOTABLE * step
    ]


def _largest(parts: dict[str, float]) -> str:
    return max(parts, key=lambda name: parts[name])


def milliseconds(seconds: float) -> str:
    """A time as text."""
    return f"{seconds * 1e3:,.1f} ms"
