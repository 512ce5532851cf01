"""Steps whose gradient is not finite: DeepSpeed leaves them out on all processes alike; this counts them, and gives up.

DeepSpeed (0.19.8) reduces the gradient's norm over all processes before it updates anything; a norm that is not finite
skips the update everywhere, so weights and moments stay as they were.
"""

from torch import nn

from moce_ds.checkpoint.format import step_folder, steps_of
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import MoceError
from moce_ds.training.settings import PretrainRunSettings


class DivergedError(MoceError):
    """Training has come to numbers that are not finite, and not back: no model is left of it."""


class SkippedSteps:
    """Steps without an update: `total` in the whole run, `in_a_row` up to now."""

    def __init__(self, run: RunSettings, total: int, runtime: Runtime) -> None:
        self._run, self._runtime = run, runtime
        self.total, self.in_a_row = total, 0

    def count(self, step: int, applied: bool) -> None:
        """Take note of a step. Raises DivergedError, on all processes, when there were too many in a row."""
        if applied:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= self._run.max_skipped:
            raise DivergedError(
                f"Step {step}: the gradient was not finite in {self.in_a_row} steps in a row (run.max_skipped). "
                f"{self._advice()}"
            )
        self._runtime.warn(
            f"step {step}: the gradient is not finite; the step was skipped "
            f"({self.in_a_row} in a row, {self.total} in all)."
        )

    def check_end(self, step: int, model: nn.Module) -> None:
        """Look at a run after its last step, before its checkpoint: a short one ends before too many are in a row.

        Raises:
            DivergedError: every step was skipped, or the last ones (one alone may pass), or a weight of `model` is not
                finite. On all processes, which hold the same.
        """
        if self.total == step:
            fault = "no step had a finite gradient, so nothing was learnt"
        elif self.in_a_row > 1:
            fault = f"the last {self.in_a_row} had no finite gradient"
        elif spoilt := [name for name, t in model.state_dict().items() if not t.isfinite().all()]:
            fault = f"weights are not finite: {spoilt[0]}, and {len(spoilt) - 1} more tensors"
        else:
            return
        raise DivergedError(f"Step {step}, the last one: {fault}. {self._advice()}")

    def _advice(self) -> str:
        """No checkpoint is written while steps are being skipped, so the newest one is from before."""
        steps = steps_of(self._run.out)
        if not steps:
            return "No checkpoint had been written yet. Lower optim.base_lr, in another run.out."
        good = step_folder(self._run.out, steps[-1])
        from_it = f", from there: run.init_from={good}" if isinstance(self._run, PretrainRunSettings) else ""
        return (
            f"The last good checkpoint is {good}. The same command goes on from there: with engine.precision=fp32, if "
            f"that may help. Or begin another run with a lower optim.base_lr{from_it}."
        )
