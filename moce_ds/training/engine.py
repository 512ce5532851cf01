"""The model under DeepSpeed: its configuration, the optimizer's groups, the learning rate, and skipped steps.

DeepSpeed provides process groups, ZeRO 1/2, mixed precision, accumulation, clipping, and the reduction of expert and
shared gradients. It (0.19.8) reduces the gradient's norm over all processes before it updates anything; a norm that is
not finite skips the update on every process, so weights and moments stay as they were. On a GPU the same happens
without a wait of the host (`WaitlessOptimizer`).
"""

from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from moce_ds.checkpoint.format import step_folder, steps_of
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.compat import quiet_deepspeed
from moce_ds.common.errors import MoceError
from moce_ds.common.host.allocator import keep_freed_memory
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.parameters import TOKENS, is_gate
from moce_ds.training.cpu_optimizer import use_on_cpu
from moce_ds.training.schedule import BatchArithmetic
from moce_ds.training.settings import EngineSettings, OptimSettings, PretrainOptimSettings, PretrainRunSettings

Engine: TypeAlias = deepspeed.DeepSpeedEngine

_BUCKET = 500_000_000
"""DeepSpeed's own size of a bucket of gradients, in elements; it allocates one in every backward pass."""


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
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }


def waitless_config(config: dict[str, Any], elements: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for an engine whose optimizer becomes a WaitlessOptimizer.

    Args:
        config: that of `deepspeed_config`.
        elements: of all parameters of this process that learn.
    """
    adam = config["optimizer"]["params"] | {"fused": True}
    zero = {"compute_grad_norm": False, "reduce_bucket_size": bucket_size(elements, world_size)}
    return config | {
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": config["zero_optimization"] | zero,
    }


def bucket_size(elements: int, world_size: int) -> int:
    """Elements of the buffer in which DeepSpeed collects gradients for one all-reduce.

    The whole gradient if it is small. Otherwise Megatron-LM's rule: 40 million elements, more from 41 processes on,
    since the latency of an all-reduce grows with them. DeepSpeed's own default is the upper limit: 500 million elements
    (2 GB, and as much again for the gradients that are reduced in bf16), whatever the size of the model.
    """
    return min(elements, max(40_000_000, 1_000_000 * world_size), _BUCKET)


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


class WaitlessOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer of ZeRO 1 or 2 with its check of the gradient on the device: no step waits for the host.

    DeepSpeed (0.19.8) reads the gradient's norm on the host before it updates anything: the host waits for the whole
    backward pass, and then the device for the host. Here the norm, the factor that clips, and the verdict stay on the
    device. AdamW's fused kernel takes them as tensors and leaves weights, moments and its count of updates as they were
    if the verdict is "not finite": the interface that torch.amp.GradScaler uses.

    DeepSpeed builds its optimizer itself, from `waitless_config`; `take_over` makes it one of these.

    Attributes:
        max_norm: the gradient is scaled down to this norm if its own is larger; 0: never.
        applied: whether the last step changed the weights; bool, shape [], on the device, the same on every process.
    """

    max_norm: float
    applied: Tensor

    @classmethod
    def take_over(cls, optimizer: DeepSpeedZeroOptimizer, max_norm: float) -> None:
        """Make the optimizer of an engine a waitless one.

        Raises:
            TypeError: it is not the optimizer that `waitless_config` asks for.
        """
        adam = optimizer.optimizer
        if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.compute_grad_norm or optimizer.clip_grad:
            raise TypeError(f"{type(optimizer).__name__} does not leave norm and clipping to WaitlessOptimizer")
        if not getattr(adam, "_step_supports_amp_scaling", False):
            raise TypeError(f"{type(adam).__name__} cannot skip an update on the device; expected fused AdamW")
        optimizer.__class__ = cls
        optimizer.max_norm = max_norm

    def step(self, closure: None = None) -> None:
        """Update the weights, unless the gradient is not finite on any process; a collective.

        The norm that the engine reports afterwards is a tensor on the device, infinite if the step was skipped.
        """
        norm = self._norm()
        self.applied = norm.isfinite()
        adam = self.optimizer
        adam.found_inf = (~self.applied).float()
        if self.max_norm:
            adam.grad_scale = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)  # DeepSpeed's rule
        super().step(closure)
        self._global_grad_norm = norm.masked_fill(~self.applied, float("inf"))

    def _norm(self) -> Tensor:
        """Norm of the averaged gradient of all parameters, experts of all processes included; fp32, shape []."""
        # Every element of the gradient is in the partition of exactly one process; padding is zero.
        mine = [gradient for group in self.averaged_gradients.values() for gradient in group]
        total = torch.nn.utils.get_total_norm(mine).square()
        dist.all_reduce(total)
        return total.sqrt()


def start_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    optim: OptimSettings,
    engine: EngineSettings,
    batches: BatchArithmetic,
    waitless: bool | None = None,
) -> Engine:
    """Wrap a model, which is moved to the process's device; its experts find their process groups.

    Args:
        groups: AdamW's, each with its `lr_scale`.
        waitless: whether the gradient is checked on the device (`WaitlessOptimizer`); None: on a GPU. On a CPU nothing
            would be gained, and DeepSpeed's own check keeps the results of earlier versions bit for bit.
    """
    quiet_deepspeed()
    allow_tf32(engine.tf32)
    device = get_accelerator().device_name()
    if waitless is None:
        waitless = device == "cuda"
    config = deepspeed_config(optim, engine, batches)
    elements = sum(parameter.numel() for group in groups for parameter in group["params"])
    if waitless:
        config = waitless_config(config, elements, batches.world_size)
    elif device == "cpu":
        keep_freed_memory()
        config["zero_optimization"]["reduce_bucket_size"] = min(elements, _BUCKET)
    started, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config, dist_init_required=False)
    if waitless:
        WaitlessOptimizer.take_over(started.optimizer, optim.clip)
    elif device == "cpu":
        use_on_cpu(started.optimizer)
    return started


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs compute products and convolutions of fp32 tensors in TF32 (10 bits of mantissa), in this process.

    PyTorch's own default is TF32 for convolutions and not for matrix products.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def applied(engine: Engine) -> Tensor | bool:
    """Whether the last step changed the weights, the same on every process; False if its gradient was not finite.

    A waitless engine gives a bool tensor of shape [] on its device, to be copied to the host with the losses.
    """
    optimizer = engine.optimizer
    return optimizer.applied if isinstance(optimizer, WaitlessOptimizer) else engine.was_step_applied()


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
