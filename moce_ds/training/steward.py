"""What follows every step of a run, in pre-training and tuning alike: wishes to stop, ownership, skipped steps, and the
checkpoint that is on its way are agreed between all processes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.distributed.runtime import Runtime, StopRequest
from moce_ds.training.metric_logger import Meter, MetricLogger
from moce_ds.training.skipping import SkippedSteps


@dataclass
class Steward:
    """Counts the steps of an attempt; made by `steward_of`.

    Attributes:
        step: steps taken in all, of `steps`, each of `images` over all processes.
        asked: whether a process has asked to stop after this step.
    """

    engine: DeepSpeedEngine
    run: RunSettings
    attempt: RunLease
    runtime: Runtime
    step: int
    steps: int
    images: int
    stop: StopRequest
    saver: CheckpointManager
    teller: MetricLogger
    skips: SkippedSteps
    asked: bool = False
    meter: Meter = field(default_factory=Meter)

    @property
    def goes_on(self) -> bool:
        """Whether another step is to be taken."""
        return self.step < self.steps and not self.asked

    @property
    def save_due(self) -> bool:
        """Whether a checkpoint of this step is to be written; none of steps without an update, but the last."""
        return not self.goes_on or (self.step % self.run.checkpoint_every == 0 and not self.skips.in_a_row)

    def save(self, manifest: dict[str, Any], state: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Start the checkpoint of this step; its manifest also names the last line of metrics.jsonl. A collective."""
        self.teller.keep(self.step)
        self.saver.start({**manifest, "metrics": self.teller.mark}, state)

    def after_step(self, totals: list[float], waited: float) -> list[float]:
        """Count a step; a collective. Returns the sums over processes of this one's `totals`.

        Args:
            waited: seconds that this process waited for data.

        Raises:
            SupersededError, DivergedError, ArtefactError: on every process alike.
        """
        runtime = self.runtime
        flags = [self.stop.wanted, runtime.is_main and self.attempt.superseded, self.saver.written]
        *sums, asked, over, written = runtime.sum([*totals, *map(float, flags)])
        self.step += 1
        if over:
            raise self.attempt.error(self.step)
        applied = self.engine.was_step_applied()
        if written == runtime.world_size or not applied:
            self.saver.finish()
        self.skips.count(self.step, applied)
        self.meter.step(self.images, waited)
        self.teller.step()
        self.asked = asked > 0
        return sums


@contextmanager
def steward_of(
    engine: DeepSpeedEngine,
    run: RunSettings,
    attempt: RunLease,
    runtime: Runtime,
    *,
    first_step: int,
    skipped: int,
    steps: int,
    images: int,
) -> Iterator[Steward]:
    """The steward of an attempt that begins after `first_step` steps, `skipped` of them without an update.

    Leaving the block finishes the checkpoint that is on its way.
    """
    stop = StopRequest(run.max_hours * 3600 if run.max_hours else None)
    with (
        stop,
        CheckpointManager(engine, run, attempt, runtime) as saver,
        MetricLogger(attempt, first_step, steps, images, runtime) as teller,
    ):
        skips = SkippedSteps(run, skipped, runtime)
        yield Steward(engine, run, attempt, runtime, first_step, steps, images, stop, saver, teller, skips)
        saver.finish()
