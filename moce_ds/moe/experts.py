"""The expert layer without DeepSpeed: send images to experts by a plan, compute, bring them back, combine.

`ClusterMoE` in `layer.py` is this with process groups. Here is everything that touches tensors.

Axes: B images of a rank, K experts an image is sent to, N = B K rows sent, S rows computed here, T tokens, D width,
H hidden width, E experts held here.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moce_ds.moe.all_to_all import exchange
from moce_ds.moe.plan import LayerPlan, on_device

Execute = Callable[[nn.ModuleList, Tensor, list[int]], Tensor]


class Mlp(Protocol):
    """What an expert is made of, as timm's Mlp."""

    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.Module


class ExpertLayer(nn.Module):
    """`num_held` MLPs through which images go by a plan, and maybe one shared MLP that every image goes through.

    Args:
        make_expert: builds one dense MLP with `fc1`, `act`, `fc2`, [..., D] -> [..., D].
        num_held: experts of this process.
        shared: add a shared expert: `y = sum_k w_k E_k(x) + (1 - sum_k w_k) E_shared(x)`.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], num_held: int, shared: bool = False) -> None:
        nn.Module.__init__(self)  # not the next class in line: `ClusterMoE` puts DeepSpeed's MoE there
        self.experts = nn.ModuleList(make_expert() for _ in range(num_held))
        self.shared = make_expert() if shared else None
        self.execute: Execute = run_one_by_one
        self.group: dist.ProcessGroup | None = None

    def forward(self, x_BTD: Tensor, plan: LayerPlan, weight_BK: Tensor) -> Tensor:
        """Each image through its experts, summed with the combine weights: [B, T, D] -> [B, T, D]."""
        if torch.is_autocast_enabled(x_BTD.device.type):  # half the bytes on the wire
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        one = weight_BK.shape[1] == 1  # then the rows sent are the images in another order
        x_NTD = reorder(x_BTD, plan.image_N, plan.restore_N) if one else x_BTD.index_select(0, plan.image_N)
        y_NTD = self._through_experts(x_NTD, plan)
        y_NTD = reorder(y_NTD, plan.restore_N, plan.image_N) if one else y_NTD.index_select(0, plan.restore_N)
        weight_BK = weight_BK.to(y_NTD.dtype)
        y_BTD = torch.einsum("bktd,bk->btd", y_NTD.unflatten(0, weight_BK.shape), weight_BK)
        if self.shared is not None:
            y_BTD = y_BTD + (1 - weight_BK.sum(dim=1))[:, None, None] * self.shared(x_BTD)
        return y_BTD

    def _through_experts(self, x_NTD: Tensor, plan: LayerPlan) -> Tensor:
        """Rows sorted by where their expert lives, there and back: [N, T, D] -> [N, T, D]."""
        if self.group is None:  # all experts are here, and the rows sorted by them
            return self.execute(self.experts, x_NTD, plan.counts)
        x_STD = reorder(exchange(x_NTD, plan.send_R, plan.receive_R, self.group), plan.gather_S, plan.scatter_S)
        y_STD = reorder(self.execute(self.experts, x_STD, plan.counts), plan.scatter_S, plan.gather_S)
        return exchange(y_STD, plan.receive_R, plan.send_R, self.group)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`rows[order]` for a permutation, whose gradient is `grad[inverse]`: autograd's own would add into zeros."""
    result: Tensor = _Reorder.apply(rows, order, inverse)
    return result


def run_one_by_one(experts: nn.ModuleList, x_STD: Tensor, counts: list[int]) -> Tensor:
    """Every expert on its own rows, also on none: its gradient hooks must fire on every rank, or DeepSpeed's gradient
    buckets fall out of step. [S, T, D] -> [S, T, D]."""
    parts = x_STD.split(counts)
    return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])


def run_grouped(experts: nn.ModuleList, x_STD: Tensor, counts: list[int]) -> Tensor:
    """All experts in two grouped matrix products (`F.grouped_mm`), [S, T, D] -> [S, T, D].

    The experts' weights stay parameters of their own and are stacked here: a copy of the weights a step, small beside
    the products. `grouped_mm` ignores autocast, so the cast is made here.
    """
    S, T, D = x_STD.shape
    dtype = x_STD.dtype
    rows_E = on_device(torch.tensor(counts), x_STD.device) * T  # the counts are known on the host
    ends_E = rows_E.cumsum(0).to(torch.int32)

    def linear(x_RD: Tensor, layers: list[nn.Linear]) -> Tensor:
        weight_EDH = torch.stack([layer.weight for layer in layers]).to(dtype).transpose(1, 2)
        bias_EH = torch.stack([layer.bias for layer in layers]).to(dtype)
        y_RH = F.grouped_mm(x_RD, weight_EDH, offs=ends_E)
        return y_RH + bias_EH.repeat_interleave(rows_E, dim=0, output_size=len(x_RD))

    mlps = [cast(Mlp, expert) for expert in experts]
    hidden_RH = mlps[0].act(linear(x_STD.reshape(S * T, D), [mlp.fc1 for mlp in mlps]))
    return linear(hidden_RH, [mlp.fc2 for mlp in mlps]).reshape(S, T, D)


def choose_execution(device: torch.device, bf16: bool, num_held: int) -> Execute:
    """The faster way to run the experts, by a rule (docs/performance.md says what was measured).

    On a CPU one by one. On a GPU with fast bf16 grouped products (compute capability 9) and more than one expert,
    grouped: many small products would leave it idle.
    """
    if device.type == "cuda" and bf16 and num_held > 1 and torch.cuda.get_device_capability(device) >= (9, 0):
        return run_grouped
    return run_one_by_one
