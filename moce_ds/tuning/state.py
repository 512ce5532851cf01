"""The state of a tuning run besides weights and moments: a running average of the weights, the best weights by
validation, and the running statistics of BatchNorm layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moce_ds.common.compat import repair_torchvision
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.parameters import check_fit
from moce_ds.tuning.labelled_task import Measures

repair_torchvision()
from timm.utils import ModelEmaV3  # noqa: E402  (needs the repair)

_EMA, _BEST = ".ema", ".best"
_STATISTICS = ("running_mean", "running_var")


class TuneState:
    """The running average `ema` (with decay > 0), the best weights so far, and BatchNorm's statistics.

    Args:
        model: on its device, before DeepSpeed wraps it.
        decay: of the average; 0: none.

    Attributes:
        best: record of the best weights: their step and measures; empty before the first validation.
    """

    def __init__(self, model: nn.Module, decay: float, runtime: Runtime) -> None:
        self._model, self._runtime = model, runtime
        self._ema = ModelEmaV3(model, decay, use_warmup=True) if decay else None
        self._best: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {}
        self._statistics = {n: b for n, b in model.named_buffers() if n.rpartition(".")[2] in _STATISTICS}
        self._before = {name: buffer.clone() for name, buffer in self._statistics.items()}

    @property
    def model(self) -> nn.Module:
        """The model to evaluate: the average, if there is one."""
        return self._ema.module if self._ema else self._model

    def update(self, updates: int, applied: bool) -> None:
        """Update average and statistics after a step; `updates` counts all updates of the model so far.

        A collective: all ranks take BatchNorm's statistics of rank 0, as in torch's own data parallelism. After a
        skipped step (`applied=False`) the statistics are those before it.
        """
        self._settle_statistics(applied)
        if self._ema and applied:
            self._ema.update(self._model, step=updates)

    def _settle_statistics(self, applied: bool) -> None:
        buffers = self._statistics.values()
        if applied and buffers and self._runtime.world_size > 1:
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(flat, 0)
            for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))
        for name, buffer in self._statistics.items():
            target, source = (self._before[name], buffer) if applied else (buffer, self._before[name])
            target.copy_(source)

    def keep_best(self, step: int, measures: Measures, criterion: str) -> None:
        """Record a validation: copy the weights if they are better than those of all earlier validations."""
        score = measures[criterion]
        if not self.best or score > self.best["measures"][criterion] or math.isnan(self.best["measures"][criterion]):
            self.best = {"step": step, "measures": measures}
            self._best = {name: t.detach().cpu().clone() for name, t in _floating(self.model).items()}

    def use_best(self) -> None:
        """Load the best weights, if there was a validation, into the model to evaluate."""
        if self._best:
            self.model.load_state_dict(self._best, strict=False)

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint. BatchNorm's statistics are copies, because the next forward pass changes them."""
        found = {name: buffer.clone() for name, buffer in self._statistics.items()}
        if self._ema:
            found |= {f"{name}{_EMA}": tensor for name, tensor in _floating(self._ema.module).items()}
        return found | {f"{name}{_BEST}": tensor for name, tensor in self._best.items()}

    def load(self, tensors: Mapping[str, Tensor], best: dict[str, Any], source: str) -> None:
        """Replace everything by what `tensors` returned. Raises ArtefactError if it does not fit the model."""
        self.best = best
        self._best = {name.removesuffix(_BEST): t for name, t in tensors.items() if name.endswith(_BEST)}
        expected = {name: tensor for name, tensor in self.tensors().items() if not name.endswith(_BEST)}
        given = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BEST)}
        check_fit(expected, given, source)
        averaged = {name.removesuffix(_EMA): t for name, t in given.items() if name.endswith(_EMA)}
        if self._ema:
            self._ema.module.load_state_dict(averaged, strict=False)
        self._model.load_state_dict({n: t for n, t in given.items() if n in self._statistics}, strict=False)
        for name, buffer in self._statistics.items():
            self._before[name].copy_(buffer)


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point weights and buffers; counters are left out."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
