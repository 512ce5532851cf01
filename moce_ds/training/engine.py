"""The model under DeepSpeed: its configuration, the optimizer's groups, the learning rate, and skipped steps.

DeepSpeed provides process groups, ZeRO 1/2, mixed precision, accumulation, clipping, and the reduction of expert and
shared gradients. It (0.19.8) reduces the gradient's norm over all processes before it updates anything; a norm that is
not finite skips the update on every process, so weights and moments stay as they were.
"""

from typing import Any, TypeAlias

import deepspeed
from torch import nn

from moce_ds.checkpoint.format import step_folder, steps_of
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.compat import quiet_deepspeed
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import MoceError
from moce_ds.models.parameters import TOKENS, is_gate
from moce_ds.training.schedule import BatchArithmetic
from moce_ds.training.settings import EngineSettings, OptimSettings, PretrainOptimSettings, PretrainRunSettings

Engine: TypeAlias = deepspeed.DeepSpeedEngine


def deepspeed_config(optim: OptimSettings, engine: EngineSettings, batches: BatchArithmetic) -> dict[str, Any]:
    """DeepSpeed's settings from ours."""
    adam = {"lr": 0.0, "betas": list(optim.betas), "eps": 1e-8, "weight_decay": optim.weight_decay, "torch_adam": True}
    return {
        "train_batch_size": batches.global_batch,
        "train_micro_batch_size_per_gpu": batches.micro,
        "gradient_accumulation_steps": batches.accumulation,
        "gradient_clipping": optim.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": engine.zero_stage},
        # Autocast rather than DeepSpeed's bf16 mode: weights, gates and position tables stay fp32, so the routes and
        # the exported expert are exactly those of training.
        "torch_autocast": {"enabled": engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
    }


def parameter_groups(model: nn.Module, optim: PretrainOptimSettings, gate_lr_scale: float) -> list[dict[str, Any]]:
    """AdamW's groups of pre-training: weight decay on matrices only, on cls_token and mask_token if
    `optim.decay_tokens` says so, none on norms and biases; gates have `gate_lr_scale` of the learning rate.

    DeepSpeed splits the experts off each group itself; it needs the groups' names to differ.
    """
    decay, plain, gates = [], [], []
    for name, parameter in model.named_parameters():
        if is_gate(name):
            gates.append(parameter)
        elif parameter.ndim < 2 or (name in TOKENS and not optim.decay_tokens):
            plain.append(parameter)
        else:
            decay.append(parameter)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": decay, "weight_decay": optim.weight_decay, "lr_scale": 1.0},
        {"name": "plain", "params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if gates:
        groups.append({"name": "gates", "params": gates, "weight_decay": 0.0, "lr_scale": gate_lr_scale})
    return groups


def start_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    optim: OptimSettings,
    engine: EngineSettings,
    batches: BatchArithmetic,
) -> Engine:
    """Wrap a model, which is moved to the process's device; its experts find their process groups.

    `groups` are AdamW's, each with its `lr_scale`.
    """
    quiet_deepspeed()
    started, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=deepspeed_config(optim, engine, batches),
        dist_init_required=False,
    )
    return started


def set_lr(engine: Engine, lr: float) -> None:
    """Give every group its learning rate for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class DivergedError(MoceError):
    """Gradients or weights are not finite and did not recover: the run has no usable model."""


class SkippedSteps:
    """Steps without an update: `total` in the whole run, `in_a_row` up to now."""

    def __init__(self, run: RunSettings, runtime: Runtime) -> None:
        self._run, self._runtime = run, runtime
        self.total, self.in_a_row = 0, 0

    def count(self, step: int, applied: bool) -> None:
        """Count a step. Raises DivergedError, on all processes, if too many in a row had no update."""
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
        """Check a run after its last step, before its checkpoint: a short run ends before too many steps are in a row.

        Raises:
            DivergedError: every step was skipped, or the last ones (one alone may pass), or a weight of `model` is not
                finite.
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
            f"The last good checkpoint is {good}. Rerun the same command to resume from it, if useful with "
            f"engine.precision=fp32, or start another run with a lower optim.base_lr{from_it}."
        )
