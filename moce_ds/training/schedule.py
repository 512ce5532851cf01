"""Learning rate and loss weights as functions of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass

from moce_ds.training.settings import OptimSettings, PretrainSettings


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


def make_schedule(config: PretrainSettings, num_images: int) -> Schedule:
    """The schedule of pre-training on a shard set of `num_images`."""
    return schedule_of(config.optim, num_images, config.experts.imbalance_start)


def schedule_of(optim: OptimSettings, num_images: int, imbalance_start: float = 0.0) -> Schedule:
    """The schedule of a run over `num_images`; `imbalance_start`: share of the run, for pre-training with experts."""
    steps = max(1, math.ceil(optim.epochs * num_images / optim.batch_size))
    return Schedule(
        peak_lr=optim.base_lr * optim.batch_size / 256,
        min_lr=optim.min_lr,
        steps=steps,
        warmup_steps=min(steps, round(optim.warmup_epochs * num_images / optim.batch_size)),
        imbalance_steps=round(imbalance_start * steps),
    )
