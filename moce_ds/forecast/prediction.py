"""Predicted time of a step and of a run on given machines (the model of docs/planning.md), and tables of predictions.

Times are in seconds, sizes in bytes. Nothing is measured here and no process group is needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.table import Table

from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ConfigError
from moce_ds.data.shards import ShardSet
from moce_ds.forecast.devices import Device
from moce_ds.forecast.host_work import HostTimes, HostWork, host_warnings, milliseconds
from moce_ds.forecast.preflight import gibibytes, remedies
from moce_ds.forecast.step_cost import Machines, Memory, Traffic, Work
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
        host: work on the host, and the part of it that the device waits for.
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
    host: HostTimes
    memory: Memory
    steps: int

    @property
    def busy(self) -> float:
        """Seconds of a step in which the device works."""
        return self.compute + self.exchange_inside + self.exchange_across + self.reduction + self.optimizer

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.busy + self.host.exposed

    @property
    def trained(self) -> float:
        """Seconds of a step that has its images and does not agree, as `moce plan --measure` takes it."""
        return self.busy + self.host.work.exposed

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


def predict(
    host_work: HostWork, machines: Machines, device: Device, steps: int, moved: float | None = None
) -> Prediction:
    """Predict a step, assuming equal loads of the experts.

    Args:
        host_work: of the run, with the work of the device.
        moved: share of the rows that leave their rank (see `Work.exchange`).

    Raises:
        ConfigError: the batch or the experts cannot be divided among that many processes, or the gate routes tokens.
    """
    work, world = host_work.work, machines.world_size
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
    reduction = sum(gradients) + sum(weights) - hidden
    optimizer = (_HELD * count.held + _OWNED * work.owned_parameters(world)) / bandwidth
    return Prediction(
        machines=machines,
        batch=batches.global_batch,
        micro=batches.micro,
        compute=compute,
        exchange_inside=inside,
        exchange_across=across,
        reduction=reduction,
        optimizer=optimizer,
        host=host_work.times(machines, device, compute + inside + across + reduction + optimizer),
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


_ROWS: tuple[tuple[str, Callable[[Prediction], str]], ...] = (
    ("GPUs", lambda p: str(p.machines.world_size)),
    ("images a GPU at a time", lambda p: str(p.micro)),
    ("compute", lambda p: milliseconds(p.compute)),
    ("exchange inside nodes", lambda p: milliseconds(p.exchange_inside)),
    ("exchange across nodes", lambda p: milliseconds(p.exchange_across)),
    ("reduction, not hidden", lambda p: milliseconds(p.reduction)),
    ("optimizer", lambda p: milliseconds(p.optimizer)),
    ("host, not hidden", lambda p: milliseconds(p.host.work.exposed)),
    ("agreement, not hidden", lambda p: milliseconds(p.host.agreement.exposed)),
    ("dealing, not hidden", lambda p: milliseconds(p.host.dealing.exposed)),
    ("reading, not hidden", lambda p: milliseconds(p.host.reading.exposed)),
    ("step", lambda p: milliseconds(p.step)),
    ("on the host: work", lambda p: milliseconds(p.host.work.seconds)),
    ("on the host: agreement", lambda p: milliseconds(p.host.agreement.seconds)),
    ("on the host: dealing", lambda p: milliseconds(p.host.dealing.seconds)),
    ("on the host: reading", lambda p: milliseconds(p.host.reading.seconds)),
    ("efficiency", lambda p: f"{p.efficiency:.0%}"),
    ("images/s", lambda p: f"{p.images_per_second:,.0f}"),
    ("memory a GPU", lambda p: gibibytes(p.memory.total)),
    ("run, days", lambda p: rounded(p.days)),
    ("run, GPU-hours", lambda p: rounded(p.gpu_hours)),
)
_LAST_OF_SECTION = ("reading, not hidden", "step", "on the host: reading")


def prediction_table(arch: str, name: str, device: Device, predictions: Sequence[Prediction]) -> Table:
    """One column per number of nodes, under 100 characters wide for up to six."""
    table = Table(
        title=f"{arch} on {name}: {predictions[0].steps} steps of {predictions[0].batch} images",
        title_justify="left",
    )
    table.add_column("nodes", style="bold")
    for prediction in predictions:
        table.add_column(str(prediction.machines.nodes), justify="right")
    for row, text in _ROWS:
        table.add_row(row, *(text(prediction) for prediction in predictions), end_section=row in _LAST_OF_SECTION)
    fits = ["yes" if p.memory.total <= device.memory else "NO" for p in predictions]
    table.add_row(f"fits in {gibibytes(device.memory)}", *fits)
    return table


def assumptions(host_work: HostWork, device: Device, moved: float | None) -> str:
    """The assumptions of the predictions, in a few lines."""
    work, host = host_work.work, device.host
    size = host_work.image_bytes or host.image_bytes
    peak = device.bf16 if work.engine.precision == "bf16" else device.fp32
    lines = [
        f"Assumed: {device.compute_share:.0%} of {peak / 1e12:.3g} TFLOP/s {work.engine.precision}, "
        f"{device.bandwidth_share:.0%} of {device.bandwidth / 1e9:,.0f} GB/s of memory;",
        f"links {device.inside / 1e9:.3g} GB/s inside and {device.across / 1e9:.3g} GB/s across nodes, exchanges at "
        f"{device.exchange_share:.0%}, reductions at {device.reduce_share:.0%};",
        f"{device.overlap:.0%} of the gradients' reduction hidden; even loads.",
        f"Host: {host_work.launches:,} operators at {host.launch * 1e6:.3g} us, {host.hop * 1e6:.3g} us a message; for "
        f"each GPU {host.decode:,.0f} images/s decoded,",
        f"files of {size / 1e3:,.3g} kB at {host.storage / 1e9:.3g} GB/s after {host.latency * 1e3:.3g} ms.",
    ]
    if work.ep_size > 1:
        if moved is None:
            lines.append("Images move as without locality (--moved SHARE: the share from a run's metrics.jsonl).")
        else:
            lines.append(f"{moved:.1%} of the images move.")
    return "\n".join(lines)


def advice(work: Work, device: Device, predictions: Sequence[Prediction]) -> list[str]:
    """For each number of nodes one line where memory does not suffice, with changes and the memory that they need, and
    one for each kind of work on the host that the device waits for."""
    memory = [_advice(work, device.memory, p) for p in predictions if p.memory.total > device.memory]
    waits = [(p.machines.nodes, text) for p in predictions for text in host_warnings(p.host, p.step)]
    return memory + [fill(f"WARNING: --nodes {nodes}: {text}.", 100, subsequent_indent="  ") for nodes, text in waits]


def _advice(work: Work, memory: float, prediction: Prediction) -> str:
    world_size = prediction.machines.world_size
    helpful = remedies(work, lambda changed: changed.memory(world_size).total, memory, world_size)
    return (
        f"WARNING: --nodes {prediction.machines.nodes}: {gibibytes(prediction.memory.total)} do not fit in "
        f"{gibibytes(memory)}. {helpful or 'No setting alone helps: use more nodes'}."
    )


def error_table(prediction: Prediction, measured: float) -> Table:
    """The predicted and the measured step (`measured`, in seconds), and the error in percent of the latter.

    The measured step loads nothing and agrees on nothing, so the prediction is `Prediction.trained`."""
    table = Table("step predicted", "step measured", "error", title="Prediction and measurement", title_justify="left")
    table.add_row(milliseconds(prediction.trained), milliseconds(measured), f"{prediction.trained / measured - 1:+.1%}")
    return table


def to_record(device: Device, predictions: Sequence[Prediction], measured: float | None) -> dict[str, Any]:
    """All predictions as plain data: seconds, bytes and the settings of the device."""
    derived = ("step", "trained", "images_per_second", "efficiency", "days", "gpu_hours")
    rows = [asdict(p) | {key: getattr(p, key) for key in derived} for p in predictions]
    return {"device": to_tree(device), "predictions": rows, "measured_step": measured}


def rounded(value: float) -> str:
    """A number as text, with two digits if it is below 10."""
    return f"{value:,.2g}" if value < 10 else f"{value:,.0f}"
