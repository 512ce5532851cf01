"""The optimizer step on CPUs: DeepSpeed's and torch's results bit for bit, with less traffic to memory.

A CPU has no spare bandwidth: every pass over all gradients costs about as much as an operation of AdamW. DeepSpeed
(0.19.8) copies the gradients of a lone process four times to reduce them over itself.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.optim.adamw import AdamW, adamw

_PART = 2**20
"""Elements that `PartwiseAdamW` updates at a time: weights, gradient, moments and a temporary take 20 MB, which a
last-level cache of today holds, and a part is long enough to be shared among threads."""


def use_on_cpu(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Make the optimizer of an engine on a CPU a frugal one; its results stay the same bit for bit.

    Raises:
        TypeError: it is not DeepSpeed's optimizer of ZeRO 1 or 2 around torch's AdamW.
    """
    if type(optimizer) is not DeepSpeedZeroOptimizer or type(optimizer.optimizer) is not AdamW:
        raise TypeError(f"{type(optimizer).__name__} is not DeepSpeed's ZeRO 1 or 2 around torch's AdamW")
    optimizer.optimizer.__class__ = PartwiseAdamW
    if dist.get_world_size() == 1 and set(optimizer.ipg_buckets) == {torch.float32}:  # bf16 buckets round gradients
        optimizer.__class__ = LoneOptimizer
        optimizer.reduce_bucket_size = 1  # of the bucket that it allocates in every backward pass; 0 would fail


class LoneOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO 1 or 2 of a process without others: its gradients are the averages, and stay where autograd put them.

    DeepSpeed copies them to a bucket, divides them by 1, copies them to a second buffer for an all-reduce and back, and
    then to a third one.
    """

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Tensor, i: int) -> None:
        """Leave the gradient of a parameter of group i as it is."""

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce nothing: there is no bucket."""


class PartwiseAdamW(AdamW):
    """torch's unfused AdamW, a part of each tensor at a time, so that its dozen operations find the part in the cache.

    Bit for bit the same: the operations treat each element alone.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            weights, gradients, means, squares, _, counts = lists
            for count, *tensors in zip(counts, weights, gradients, means, squares, strict=True):
                for part in zip(*(tensor.split(_PART) for tensor in tensors), strict=True):
                    _update(group, part, count.clone())
                count += 1


def _update(group: dict[str, Any], part: tuple[Tensor, ...], count: Tensor) -> None:
    weight, gradient, mean, square = ([tensor] for tensor in part)
    beta1, beta2 = group["betas"]
    adamw(
        weight,
        gradient,
        mean,
        square,
        [],
        [count],
        foreach=False,
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
