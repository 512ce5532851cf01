"""What the trainer trains on: pre-training, classification, detection and segmentation are tasks.

Axes: B items (images) of a micro-batch of one process.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.training.engine import Engine, SkippedSteps
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.step_agreement import Agree


class TrainingTask(ABC):
    """Batches and losses, and hooks that `Trainer.fit` calls in the order in which they stand here.

    Every process holds one, made from the same settings and seed. Steps are numbered from 0 where one is about to be
    taken (`prepare`, `losses`), and counted where it has been taken (all other hooks).

    Attributes:
        count: training items, numbered from 0.
    """

    count: int

    def restore(self, checkpoint: Checkpoint) -> None:  # noqa: B027 (a hook)
        """Take what `manifest` gave to a checkpoint, whose tensors are loaded. Raises ArtefactError."""

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[Any]:
        """This process's micro-batches, from the first one of a step. Called once, with the weights in place.

        Raises (while iterating):
            DataError: an item cannot be read.
        """

    def prepare(self, step: int, part: int) -> None:  # noqa: B027
        """Prepare the micro-batch `part` of a step before it is read. Not a collective."""

    @abstractmethod
    def losses(self, engine: Engine, batch: Any, step: int, part: int, agree: Agree) -> dict[str, Tensor]:
        """The named losses of a micro-batch, each 0-d: "loss" is differentiated, the others are logged.

        `engine` is the model under DeepSpeed, in training mode. If its forward pass contains collectives, `agree` must
        be called before the first of them, with a digest of what the ranks must have in common; the later it is called,
        the more work the device has meanwhile.
        """

    def sums(self) -> dict[str, float]:
        """This process's part of further figures of the step, which are summed over processes."""
        return {}

    def after_update(self, step: int) -> None:  # noqa: B027
        """Follow the update of a step, which a GPU may still be computing. Not a collective."""

    def needs_weights(self, step: int) -> bool:
        """Whether something of the task needs the weights of this step, so that the next one waits for it."""
        return False

    def after_step(self, step: int, skips: SkippedSteps) -> None:  # noqa: B027
        """Follow a step that is complete on all processes, and that `skips` has counted. A collective.

        Called where `needs_weights` says so, where the step is recorded or saved, and at the end.
        """

    def validate_if_due(self, step: int) -> dict[str, float]:
        """Measures on the validation split; empty where no validation is due. A collective."""
        return {}

    def record(self, step: int, sums: Mapping[str, float]) -> dict[str, Any]:
        """The task's own part of a record in metrics.jsonl, from what `sums` gave, summed. A collective."""
        return {}

    def after_record(self, step: int, logger: MetricLogger, *, last: bool) -> None:  # noqa: B027
        """Follow what was recorded of a step; pictures are drawn here. A collective."""

    @abstractmethod
    def manifest(self, step: int) -> dict[str, Any]:
        """What the checkpoint of a step says beside what `Trainer` does; `routing` is a part of it."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors of a checkpoint beside weights and moments; only an update may change them."""
        return {}
