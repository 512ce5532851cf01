"""Predicted time of a step and of a run on given machines: the model of docs/planning.md.

Times are in seconds, sizes in bytes. Nothing is measured here and no process group is needed.
"""

from dataclasses import dataclass
from pathlib import Path

from moce_ds.data.shards import ShardSet
from moce_ds.errors import ConfigError
from moce_ds.planning.devices import Device
from moce_ds.planning.work import Machines, Memory, Traffic, Work
from moce_ds.training.schedule import batch_arithmetic, make_schedule
from moce_ds.training.settings import OptimSettings

# Bytes read and written per parameter, fp32. Held: into DeepSpeed's buffer, divided there, and out of it. Owned:
# AdamW's eight passes (80), the norm (4), gradients joined to one tensor (8), clipped (8), weights copied back (8).
_HELD, _OWNED = 24, 108

# The same per parameter of each expert beyond one per layer, for a micro-batch: its weights are read forward and
# backward, its gradient is written.
_SPARE = 12

_BACKWARD = 2 / 3  # share of the compute that is backward


@dataclass(frozen=True)
class Prediction:
    """One step on `machines`, in seconds, and the run that it is part of.

    Attributes:
        micro: images in a micro-batch of one process.
        compute: matrix products of the model, including recomputation.
        exchange_inside, exchange_across: all-to-all of images with their experts, within and across nodes.
        reduction: communication of gradients and weights, minus the part hidden behind the backward pass.
        optimizer: memory traffic of the optimizer step.
        steps: of the whole run.
    """

    machines: Machines
    batch: int
    micro: int
    compute: float
    exchange_inside: float
    exchange_across: float
    reduction: float
    optimizer: float
    memory: Memory
    steps: int

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.exchange_inside + self.exchange_across + self.reduction + self.optimizer

    @property
    def images_per_second(self) -> float:
        """Images per second over all processes, which the loaders must deliver."""
        return self.batch / self.step

    @property
    def efficiency(self) -> float:
        """The share of the step that is compute: speed relative to GPUs that only compute."""
        return self.compute / self.step

    @property
    def days(self) -> float:
        """Days of the whole run."""
        return self.step * self.steps / 86_400

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.step * self.steps * self.machines.world_size / 3600


def predict(work: Work, machines: Machines, device: Device, steps: int, moved: float | None = None) -> Prediction:
    """Predict a step, assuming equal loads of the experts.

    Args:
        moved: share of the rows that leave their rank (see `Work.exchange`).

    Raises:
        ConfigError: the batch or the experts cannot be divided among that many processes, or the gate routes tokens.
    """
    world = machines.world_size
    batches = batch_arithmetic(work.optim, world, work.ep_size)
    count = work.parameters
    sent = work.exchange(machines, moved)
    gradients, weights = (_seconds(part, device, device.reduce_share) for part in work.reduction(machines))
    bandwidth = device.bandwidth * device.bandwidth_share
    flops = work.image_flops.step * batches.global_batch / world
    compute = flops / device.flops(work.engine.precision)
    compute += batches.accumulation * _SPARE * count.spare / bandwidth
    hidden = min(device.overlap * sum(gradients), _BACKWARD * compute)
    inside, across = _seconds(sent, device, device.exchange_share)
    return Prediction(
        machines=machines,
        batch=batches.global_batch,
        micro=batches.micro,
        compute=compute,
        exchange_inside=inside,
        exchange_across=across,
        reduction=sum(gradients) + sum(weights) - hidden,
        optimizer=(_HELD * count.held + _OWNED * work.owned_parameters(world)) / bandwidth,
        memory=work.memory(world),
        steps=steps,
    )


def _seconds(sent: Traffic, device: Device, share: float) -> tuple[float, float]:
    """Seconds within and across nodes, in sequence; the start latency is that of the slower link in use."""
    inside, across = sent.inside / (device.inside * share), sent.across / (device.across * share)
    if sent.across:
        return inside, across + sent.collectives * device.across_latency
    return inside + sent.collectives * device.inside_latency, 0.0


def steps_of_run(shards: Path, optim: OptimSettings, images: int | None) -> int:
    """Steps of the whole run over `images`, by default those of its shard set.

    Raises:
        ConfigError: there is no shard set to count.
        ArtefactError: it cannot be read.
    """
    if images is None:
        if not ShardSet.recognises(shards):
            raise ConfigError(
                f"data.shards: {shards} does not exist yet, so the number of images is unknown: set it, "
                "such as --images 1281167."
            )
        images = ShardSet.open(shards).count
    return make_schedule(optim, images).steps
