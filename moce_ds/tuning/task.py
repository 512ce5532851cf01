"""What tuning must know of a labelled task; classification, detection and segmentation are such tasks.

Axes: B items (images) of a micro-batch of one process.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.distributed.runtime import Runtime

Measures = dict[str, float]


class LabelledTask(Protocol):
    """A model and the data to tune it on. Every process holds one, made from the same settings and seed.

    Attributes:
        model: on the host, its weights the same on every process. Parameters with `requires_grad=False` are not saved
            in checkpoints: they must come out of the settings alone.
        count: training items, numbered from 0.
        fingerprint: of the data and the first weights; a resumed run must have the same.
        criterion: the measure of `validate` whose largest value chooses the weights; None without a validation split.
    """

    model: nn.Module
    count: int
    fingerprint: str
    criterion: str | None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups, each with `params`, `weight_decay` and `lr_scale`; see `groups.parameter_groups`."""
        ...

    def batch(self, ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> Any:
        """The training items `ids_B`, read in the epochs `epochs_B`, ready for `loss`, on the host.

        Called in worker processes: a function of the ids, the epochs and the seed alone (`seeding.item_generators`), so
        that a run can be resumed. A named tuple of tensors, or lists and dictionaries of tensors, travels well.

        Raises:
            DataError: an item cannot be read.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch; `model` is `self.model` under DeepSpeed (autocast), in training mode.

        The batch comes from the host: moving it to the model's device is the task's. The global torch generator is
        seeded by (seed, step, rank) before.
        """
        ...

    def validate(self, model: nn.Module, runtime: Runtime) -> Measures:
        """Measures on the validation split, the same on every process; `model` in evaluation mode, without gradients.

        A collective. Called only where there is a `criterion`.
        """
        ...

    def finish(self, model: nn.Module, runtime: Runtime) -> Measures:
        """The final measures, of the test split; also writes what the task leaves behind, such as an encoder folder.

        A collective, called once, with the final weights, as `validate`. What it writes must be whole or absent.
        """
        ...
