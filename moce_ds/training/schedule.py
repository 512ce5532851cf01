"""The arithmetic of a run: its batches, and learning rate and loss weights as functions of the step.

Nothing here is saved or restored.
"""

import math
from dataclasses import dataclass

from moce_ds.common.errors import ConfigError
from moce_ds.data.sampler import number_of_steps
from moce_ds.training.settings import OptimSettings


@dataclass(frozen=True)
class BatchArithmetic:
    """How a global batch is divided over processes and micro-batches."""

    global_batch: int
    world_size: int
    accumulation: int

    @property
    def micro_global(self) -> int:
        """Images of one micro-batch over all processes."""
        return self.global_batch // self.accumulation

    @property
    def micro(self) -> int:
        """Images of one micro-batch of one process."""
        return self.micro_global // self.world_size


def batch_arithmetic(optim: OptimSettings, world_size: int, ep_size: int = 1) -> BatchArithmetic:
    """Divide the batch over `world_size` processes in expert-parallel groups of `ep_size`.

    Raises:
        ConfigError: the batch is not divisible, or the processes are not.
    """
    if optim.batch_size % (world_size * optim.accumulation):
        raise ConfigError(
            f"optim.batch_size: {optim.batch_size} is not divisible by {world_size} processes x "
            f"optim.accumulation {optim.accumulation} = {world_size * optim.accumulation}."
        )
    if world_size % ep_size:
        raise ConfigError(
            f"experts.ep_size: got {ep_size}; it must divide the number of processes, {world_size}. Start {ep_size} "
            f"or a multiple of it, as with `moce launch local --nproc {ep_size} ...`, or set experts.ep_size=1."
        )
    return BatchArithmetic(optim.batch_size, world_size, optim.accumulation)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine down to `min_lr`, per step (the public MAE's, exactly per iteration).

    Attributes:
        peak_lr: base_lr x global batch / 256.
        steps, warmup_steps: length of the run and of the warm-up.
        imbalance_steps: steps over which the imbalance loss is phased in.
    """

    peak_lr: float
    min_lr: float
    steps: int
    warmup_steps: int
    imbalance_steps: int

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def imbalance_share(self, step: int) -> float:
        """How much of the imbalance loss's weight is in force: rises linearly from 0 to 1 (docs/method.md)."""
        return min(1.0, step / self.imbalance_steps) if self.imbalance_steps else 1.0


def make_schedule(optim: OptimSettings, num_images: int, imbalance_start: float = 0.0) -> Schedule:
    """The schedule of a run over `num_images`; `imbalance_start`: share of the run, for pre-training with experts."""
    steps = number_of_steps(optim.epochs, num_images, optim.batch_size)
    return Schedule(
        peak_lr=optim.base_lr * optim.batch_size / 256,
        min_lr=optim.min_lr,
        steps=steps,
        warmup_steps=min(steps, round(optim.warmup_epochs * num_images / optim.batch_size)),
        imbalance_steps=round(imbalance_start * steps),
    )


def describe(schedule: Schedule, batches: BatchArithmetic, base_lr: float) -> str:
    """A sentence for the start of a run: its steps, how they are shared, and the learning rate."""
    return (
        f"{schedule.steps} steps of {batches.global_batch} images = {batches.world_size} processes x "
        f"{batches.accumulation} parts x {batches.micro}; peak learning rate {schedule.peak_lr:.2e} "
        f"= {base_lr:.1e} x {batches.global_batch} / 256"
    )
