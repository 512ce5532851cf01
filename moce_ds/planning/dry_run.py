"""What a run would be, without running it: parameters, tokens, batches, steps, memory, placement of experts."""

from pathlib import Path

from rich.table import Table

from moce_ds.data.shards import ShardSet
from moce_ds.models.shapes import ExpertShape
from moce_ds.planning.work import Work
from moce_ds.training.schedule import batch_arithmetic, make_schedule
from moce_ds.training.settings import OptimSettings, PretrainSettings


def plan_table(config: PretrainSettings, world_size: int) -> Table:
    """The resolved plan as a table. Raises ConfigError if the batch cannot be divided."""
    batches = batch_arithmetic(config.optim, world_size, config.ep_size)
    work, spec = Work.of(config), config.model_spec
    count, shape, needed = work.parameters, spec.shape, work.memory(world_size)
    table = Table(title=f"{config.model.arch} -> {config.run.out}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "encoder", f"{shape.depth} blocks, width {shape.width}, {shape.heads} heads, patch {shape.patch_size}"
    )
    table.add_row("parameters", f"total {_millions(count.total)}, active {_millions(count.active)}, encoder "
                  f"{_millions(count.encoder)}; a process holds {_millions(count.held)}")  # fmt: skip
    table.add_row("tokens", f"{shape.num_patches} patches, {work.visible_tokens - 1} visible + cls in the encoder")
    table.add_row("batch", f"{batches.global_batch} = {world_size} processes x {batches.accumulation} parts x "
                  f"{batches.micro} images")  # fmt: skip
    table.add_row("steps", _steps(config.data.shards, config.optim))
    table.add_row("memory", f"about {gibibytes(needed.state)} state + {gibibytes(needed.activations)} activations + "
                  f"{gibibytes(needed.buffers)} for reductions a process")  # fmt: skip
    if spec.experts is not None:
        table.add_row("experts", _placement(spec.experts, config.ep_size, world_size))
    table.add_row("precision", f"{config.engine.precision}, ZeRO {config.engine.zero_stage}")
    return table


def _steps(shards: Path, optim: OptimSettings) -> str:
    if not ShardSet.recognises(shards):
        return f"unknown: {shards} does not exist yet"
    count = ShardSet.open(shards).count
    schedule = make_schedule(optim, count)
    return (
        f"{schedule.steps} = {optim.epochs:g} epochs of {count} images; {schedule.warmup_steps} of warm-up; "
        f"peak learning rate {schedule.peak_lr:.2e}"
    )


def _placement(experts: ExpertShape, ep_size: int, world_size: int) -> str:
    local = experts.num_experts // ep_size
    held = [f"rank {r}: {r * local}" + (f"-{(r + 1) * local - 1}" if local > 1 else "") for r in range(min(ep_size, 8))]
    more = ", ..." if ep_size > 8 else ""
    copies = world_size // ep_size
    return (
        f"{experts.num_experts} in each of blocks {', '.join(map(str, experts.layers))}; "
        f"{', '.join(held)}{more}; {copies} {'copy' if copies == 1 else 'copies'} of each"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} K"


def gibibytes(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / 2**30:.2f} GiB"
