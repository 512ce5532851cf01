"""What a run would be, without running it: parameters, tokens, batches, steps, memory, where experts live."""

from dataclasses import dataclass

import torch
from rich.table import Table

from moce_ds.data.shards import ShardSet
from moce_ds.models.mae import MaskedAutoencoder, make_mlp
from moce_ds.training.schedule import make_schedule
from moce_ds.training.settings import PretrainSettings, batch_arithmetic


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: of one dense path (`active`), of everything stored (`total`), and held by one process."""

    active: int
    total: int
    held: int
    encoder: int


def count_parameters(config: PretrainSettings) -> Parameters:
    """Count without allocating; the gates' share is left out (E x width of an embedding a layer)."""
    spec = config.model_spec
    with torch.device("meta"):
        dense = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
        mlp = sum(p.numel() for p in make_mlp(spec.shape.width, spec.shape.mlp_ratio).parameters())
    active = sum(p.numel() for p in dense.parameters())
    encoder = sum(p.numel() for n, p in dense.named_parameters() if not n.startswith(("decoder_", "mask_token")))
    if spec.experts is None:
        return Parameters(active, active, active, encoder)
    layers, experts = len(spec.experts.layers), spec.experts.num_experts
    local = experts // config.experts.ep_size
    total, held = (active + layers * (n - 1) * mlp for n in (experts, local))
    return Parameters(active, total, held, encoder)


def memory_estimate(config: PretrainSettings, world_size: int, held: int, micro: int) -> tuple[float, float]:
    """Bytes a process needs for (weights, gradients, Adam) and for activations, as a rough upper estimate.

    Weights and gradients are fp32 and whole; ZeRO cuts the fp32 copy and Adam's two moments over the processes that
    hold the same parameters (stage 2 the gradients too). A block keeps about 16 + 2 mlp_ratio activations of a
    token's width for the backward pass, in the precision of the computation.
    """
    state = held * 4 * (1 + (1 / world_size if config.engine.zero_stage == 2 else 1) + 3 / world_size)
    shape, decoder = config.vit_shape, config.model.decoder
    bytes_each = 2 if config.engine.precision == "bf16" else 4
    visible = int(shape.num_patches * (1 - config.model.mask_ratio)) + 1
    kept = visible * shape.width * shape.depth * (16 + 2 * shape.mlp_ratio)
    kept += (shape.num_patches + 1) * decoder.width * decoder.depth * (16 + 2 * 4.0)
    return state, micro * kept * bytes_each


def plan_table(config: PretrainSettings, world_size: int) -> Table:
    """The resolved plan, for people. Raises ConfigError on batch arithmetic that does not work out."""
    batches = batch_arithmetic(config, world_size)
    count, shape = count_parameters(config), config.vit_shape
    visible = int(shape.num_patches * (1 - config.model.mask_ratio))
    state, activations = memory_estimate(config, world_size, count.held, batches.micro)
    table = Table(title=f"{config.model.arch} -> {config.run.out}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "encoder", f"{shape.depth} blocks, width {shape.width}, {shape.heads} heads, patch {shape.patch_size}"
    )
    table.add_row("parameters", f"total {_millions(count.total)}, active {_millions(count.active)}, of which encoder "
                  f"{_millions(count.encoder)}; a process holds {_millions(count.held)}")  # fmt: skip
    table.add_row("tokens", f"{shape.num_patches} patches, {visible} visible + cls in the encoder")
    table.add_row("batch", f"{batches.global_batch} = {world_size} processes x {batches.accumulation} parts x "
                  f"{batches.micro} images")  # fmt: skip
    table.add_row("steps", _steps(config))
    table.add_row("memory", f"about {_gigabytes(state)} state + {_gigabytes(activations)} activations a process")
    if config.model_spec.experts is not None:
        table.add_row("experts", _placement(config, world_size))
    table.add_row("precision", f"{config.engine.precision}, ZeRO {config.engine.zero_stage}")
    return table


def _steps(config: PretrainSettings) -> str:
    if not (config.data.shards / "shards.json").exists():
        return f"unknown: {config.data.shards} is not there yet"
    count = ShardSet.open(config.data.shards).count
    schedule = make_schedule(config, count)
    return (
        f"{schedule.steps} = {config.optim.epochs:g} epochs of {count} images; {schedule.warmup_steps} of warm-up; "
        f"peak learning rate {schedule.peak_lr:.2e}"
    )


def _placement(config: PretrainSettings, world_size: int) -> str:
    experts, ep_size = config.experts, config.experts.ep_size
    local = experts.num // ep_size
    held = [f"rank {r}: {r * local}" + (f"-{(r + 1) * local - 1}" if local > 1 else "") for r in range(min(ep_size, 8))]
    more = ", ..." if ep_size > 8 else ""
    copies = world_size // ep_size
    return (
        f"{experts.num} in each of blocks {', '.join(map(str, config.expert_layers))}; "
        f"{', '.join(held)}{more}; {copies} {'copy' if copies == 1 else 'copies'} of each"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} K"


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
