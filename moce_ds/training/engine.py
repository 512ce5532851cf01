"""The model under DeepSpeed: its configuration, the optimizer's groups, and setting the learning rate.

DeepSpeed gives process groups, ZeRO 1/2, mixed precision, accumulation, clipping, and the reduction of expert and
shared gradients.
"""

from typing import Any, TypeAlias

import deepspeed
from torch import nn

from moce_ds.checkpoint.parameters import TOKENS, is_gate
from moce_ds.compat import quiet_deepspeed
from moce_ds.training.settings import BatchArithmetic, EngineSettings, OptimSettings, PretrainOptimSettings

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
