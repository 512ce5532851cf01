"""Prediction tables, their assumptions, and changes that help if memory does not suffice."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table

from moce_ds.config.settings import to_tree
from moce_ds.planning.devices import Device
from moce_ds.planning.dry_run import gibibytes
from moce_ds.planning.prediction import Prediction
from moce_ds.planning.work import Work
from moce_ds.training.settings import PretrainSettings

_ROWS: tuple[tuple[str, Callable[[Prediction], str]], ...] = (
    ("GPUs", lambda p: str(p.machines.world_size)),
    ("images a GPU at a time", lambda p: str(p.micro)),
    ("compute", lambda p: _milliseconds(p.compute)),
    ("exchange inside nodes", lambda p: _milliseconds(p.exchange_inside)),
    ("exchange across nodes", lambda p: _milliseconds(p.exchange_across)),
    ("reduction, not hidden", lambda p: _milliseconds(p.reduction)),
    ("optimizer", lambda p: _milliseconds(p.optimizer)),
    ("step", lambda p: _milliseconds(p.step)),
    ("efficiency", lambda p: f"{p.efficiency:.0%}"),
    ("images/s", lambda p: f"{p.images_per_second:,.0f}"),
    ("memory a GPU", lambda p: gibibytes(p.memory.total)),
    ("run, days", lambda p: _rounded(p.days)),
    ("run, GPU-hours", lambda p: _rounded(p.gpu_hours)),
)


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
        table.add_row(row, *(text(prediction) for prediction in predictions), end_section=row in ("optimizer", "step"))
    fits = ["yes" if p.memory.total <= device.memory else "NO" for p in predictions]
    table.add_row(f"fits in {gibibytes(device.memory)}", *fits)
    return table


def assumptions(work: Work, device: Device, moved: float | None) -> str:
    """The assumptions of the predictions, in a few lines."""
    peak = device.bf16 if work.engine.precision == "bf16" else device.fp32
    lines = [
        f"Assumed: {device.compute_share:.0%} of {peak / 1e12:.3g} TFLOP/s {work.engine.precision}, "
        f"{device.bandwidth_share:.0%} of {device.bandwidth / 1e9:,.0f} GB/s of memory;",
        f"links {device.inside / 1e9:.3g} GB/s inside and {device.across / 1e9:.3g} GB/s across nodes, exchanges at "
        f"{device.exchange_share:.0%}, reductions at {device.reduce_share:.0%};",
        f"{device.overlap:.0%} of the gradients' reduction hidden; even loads, and loaders that keep up.",
    ]
    if work.ep_size > 1:
        if moved is None:
            lines.append("Images move as without locality (--moved SHARE: the share from a run's metrics.jsonl).")
        else:
            lines.append(f"{moved:.1%} of the images move.")
    return "\n".join(lines)


def advice(config: PretrainSettings, device: Device, predictions: Sequence[Prediction]) -> Iterator[str]:
    """For each number of nodes where memory does not suffice, one line with changes and the memory that they need."""
    for prediction in predictions:
        needed = prediction.memory.total
        if needed <= device.memory:
            continue
        world_size = prediction.machines.world_size

        def need(changed: PretrainSettings, world_size: int = world_size) -> float:
            return Work.of(changed).memory(world_size).total

        tried = [
            f"{change}: {gibibytes(need(changed))}{'' if need(changed) <= device.memory else ' (still too much)'}"
            for change, changed in savings(config, need, device.memory, world_size)
            if need(changed) < needed
        ]
        yield (
            f"WARNING: --nodes {prediction.machines.nodes}: {gibibytes(needed)} do not fit in "
            f"{gibibytes(device.memory)}. {'; '.join(tried) or 'No setting alone helps: use more nodes'}."
        )


def savings(
    config: PretrainSettings, need: Callable[[PretrainSettings], float], memory: float, world_size: int
) -> Iterator[tuple[str, PretrainSettings]]:
    """Single changes of settings that keep the result, each with the changed settings.

    For `optim.accumulation` it is the lowest value that suffices for `memory` bytes, or the highest possible one.

    Args:
        need: bytes that a process needs with given settings.
    """
    optim, engine, experts = config.optim, config.engine, config.experts
    parts = optim.batch_size // world_size  # images of a process, which accumulation divides
    for accumulation in (n for n in range(optim.accumulation + 1, parts + 1) if parts % n == 0):
        more = dataclasses.replace(config, optim=dataclasses.replace(optim, accumulation=accumulation))
        if need(more) <= memory or accumulation == parts:
            yield f"optim.accumulation={accumulation}", more
            break
    recomputing = dataclasses.replace(engine, checkpoint_activations=True)
    cutting = dataclasses.replace(engine, zero_stage=2)
    yield "engine.checkpoint_activations=true", dataclasses.replace(config, engine=recomputing)
    yield "engine.zero_stage=2", dataclasses.replace(config, engine=cutting)
    if config.family.has_experts and experts.num > experts.ep_size and world_size % experts.num == 0:
        spread = dataclasses.replace(experts, ep_size=experts.num)
        yield f"experts.ep_size={experts.num}", dataclasses.replace(config, experts=spread)


def error_table(prediction: Prediction, measured: float) -> Table:
    """The predicted and the measured step (`measured`, in seconds), and the error in percent of the latter."""
    table = Table("step predicted", "step measured", "error", title="Prediction and measurement", title_justify="left")
    table.add_row(_milliseconds(prediction.step), _milliseconds(measured), f"{prediction.step / measured - 1:+.1%}")
    return table


def to_record(device: Device, predictions: Sequence[Prediction], measured: float | None) -> dict[str, Any]:
    """All predictions as plain data: seconds, bytes and the settings of the device."""
    derived = ("step", "images_per_second", "efficiency", "days", "gpu_hours")
    rows = [dataclasses.asdict(p) | {key: getattr(p, key) for key in derived} for p in predictions]
    return {"device": to_tree(device), "predictions": rows, "measured_step": measured}


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _rounded(value: float) -> str:
    return f"{value:,.2g}" if value < 10 else f"{value:,.0f}"
