"""The expert layer without DeepSpeed: send images to experts by a plan, compute, return them, combine.

This module contains all tensor operations; `ClusterMoE` in `deepspeed_layer.py` adds the process groups.

Axes: B images of a rank, K experts per image, N = B K rows sent, S rows received and computed on this rank, T tokens, D
width, H hidden width, R = S T rows of tokens, E local experts; ... the axes of one image (tokens and width).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moce_ds.moe.routing_plan import LayerPlan

Execute = Callable[[nn.ModuleList, Tensor, LayerPlan], Tensor]
"""Runs the experts of a process on their rows, which are sorted by expert: [S, T, D] -> [S, T, D]."""


class Mlp(Protocol):
    """The modules of an expert, as in timm's Mlp."""

    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.GELU


class ExpertLayer(nn.Module):
    """`num_held` expert MLPs, to which images are routed by a plan, and optionally one shared MLP for every image.

    Args:
        make_expert: builds one dense MLP with `fc1`, `act`, `fc2`, [..., D] -> [..., D].
        num_held: experts of this process.
        shared: add a shared expert: `y = sum_k w_k E_k(x) + (1 - sum_k w_k) E_shared(x)`.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], num_held: int, shared: bool = False) -> None:
        nn.Module.__init__(self)  # not super(): in `ClusterMoE` the next class is DeepSpeed's MoE
        self.experts = nn.ModuleList(make_expert() for _ in range(num_held))
        self.shared = make_expert() if shared else None
        self.execute: Execute = run_one_by_one
        self.group: dist.ProcessGroup | None = None

    def forward(self, x_BTD: Tensor, plan: LayerPlan, weight_BK: Tensor) -> Tensor:
        """Process each image by its experts and sum with the combine weights: [B, T, D] -> [B, T, D]."""
        if torch.is_autocast_enabled(x_BTD.device.type):  # halves the network traffic
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        one = weight_BK.shape[1] == 1  # then the rows sent are a permutation of the images
        x_NTD = reorder(x_BTD, plan.image_N, plan.restore_N) if one else x_BTD.index_select(0, plan.image_N)
        y_NTD = self._through_experts(x_NTD, plan)
        y_NTD = reorder(y_NTD, plan.restore_N, plan.image_N) if one else y_NTD.index_select(0, plan.restore_N)
        weight_BK = weight_BK.to(y_NTD.dtype)
        y_BTD = torch.einsum("bktd,bk->btd", y_NTD.unflatten(0, weight_BK.shape), weight_BK)
        if self.shared is not None:
            y_BTD = y_BTD + (1 - weight_BK.sum(dim=1))[:, None, None] * self.shared(x_BTD)
        return y_BTD

    def _through_experts(self, x_NTD: Tensor, plan: LayerPlan) -> Tensor:
        """Send rows, sorted by the rank of their expert, to the experts and back: [N, T, D] -> [N, T, D]."""
        if self.group is None:  # all experts are local, and the rows are sorted by expert
            return self.execute(self.experts, x_NTD, plan)
        x_STD = reorder(all_to_all(x_NTD, plan.send_R, plan.receive_R, self.group), plan.gather_S, plan.scatter_S)
        y_STD = reorder(self.execute(self.experts, x_STD, plan), plan.scatter_S, plan.gather_S)
        return all_to_all(y_STD, plan.receive_R, plan.send_R, self.group)


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Send `send[r]` consecutive rows to each rank r of the group: [N, ...] -> [S, ...].

    The gradient takes the reverse way. Without a group (all experts are local) the rows are returned unchanged.
    Collective: every rank of the group must call it, with matching counts, even without rows.
    """
    if group is None:
        return rows
    result: Tensor = _UnevenAllToAll.apply(rows, send, receive, group)
    return result


class _UnevenAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), receive, send, group=group)
    return result


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
    """`rows[order]` for a permutation. Its gradient is `grad[inverse]`; autograd's own would add into zeros."""
    result: Tensor = _Reorder.apply(rows, order, inverse)
    return result


class _AddBias(torch.autograd.Function):
    """Adds to each row the bias of its expert, and sums the gradients of the biases in fp32.

    The gradient of `repeat_interleave` is a sum by atomics in the type of the rows: in bf16 its error is several
    percent at a thousand rows of an expert, and grows with them.
    """

    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, bias_EH: Tensor, rows_E: Tensor, rows: list[int]) -> Tensor:
        ctx.rows, ctx.dtype = rows, bias_EH.dtype
        return y_RH + bias_EH.to(y_RH.dtype).repeat_interleave(rows_E, dim=0, output_size=len(y_RH))

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        sums = [part.sum(dim=0, dtype=torch.float32) for part in grad_RH.split(ctx.rows)]
        return grad_RH, torch.stack(sums).to(ctx.dtype), None, None


class _MlpsOneByOne(torch.autograd.Function):
    """The MLP of each expert on its rows, [R, D] -> [R, D], in one node of the graph.

    Both passes finish one expert before they begin the next: what they compute for its rows is read again while it is
    in the cache, and the gradient of the hidden layer exists for one expert at a time. All results are written into
    their places among the rows: parts need not be joined. Every parameter gets a gradient, zeros if its expert has no
    rows.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: list[int], approximate: str, *parameters: Tensor) -> Tensor:
        before_RH = x_RD.new_empty(len(x_RD), len(parameters[1]))  # the hidden layer before its activation
        hidden_RH, y_RD = torch.empty_like(before_RH), torch.empty_like(x_RD)
        ctx.save_for_backward(x_RD, before_RH, hidden_RH, *parameters)
        ctx.rows, ctx.approximate = rows, approximate
        parts = (tensor.split(rows) for tensor in (x_RD, before_RH, hidden_RH, y_RD))
        for x, before, hidden, y, (w1, b1, w2, b2) in zip(*parts, _by_expert(parameters), strict=True):
            torch.addmm(b1, x, w1.t(), out=before)
            torch.ops.aten.gelu.out(before, approximate=approximate, out=hidden)
            torch.addmm(b2, hidden, w2.t(), out=y)
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, before_RH, hidden_RH, *parameters = ctx.saved_tensors
        grad_x_RD, of_parameters = torch.empty_like(x_RD), list[Tensor]()
        space_RH = before_RH.new_empty(max(ctx.rows), before_RH.shape[1])
        parts = (tensor.split(ctx.rows) for tensor in (x_RD, before_RH, hidden_RH, grad_RD, grad_x_RD))
        for x, before, hidden, grad_y, grad_x, (w1, _, w2, _) in zip(*parts, _by_expert(parameters), strict=True):
            grad = torch.mm(grad_y, w2, out=space_RH[: len(x)])
            torch.ops.aten.gelu_backward.grad_input(grad, before, approximate=ctx.approximate, grad_input=grad)
            torch.mm(grad, w1, out=grad_x)
            of_parameters += [grad.t() @ x, grad.sum(dim=0), grad_y.t() @ hidden, grad_y.sum(dim=0)]
        return grad_x_RD, None, None, *of_parameters


def _by_expert(parameters: Sequence[Tensor]) -> Iterable[tuple[Tensor, ...]]:
    """Weight and bias of the first layer, and those of the second one, of each expert."""
    return zip(*(parameters[part::4] for part in range(4)), strict=True)


def run_one_by_one(experts: nn.ModuleList, x_STD: Tensor, plan: LayerPlan) -> Tensor:
    """Run every expert on its own rows, even on none. [S, T, D] -> [S, T, D].

    The gradient hooks of every expert must fire on every rank, or DeepSpeed's gradient buckets get out of step.
    """
    rows = [count * x_STD.shape[1] for count in plan.counts]
    mlps = [cast(Mlp, expert) for expert in experts]
    # Cast here, because autocast does not know what a function of its own computes.
    parameters = [p.to(x_STD.dtype) for mlp in mlps for fc in (mlp.fc1, mlp.fc2) for p in (fc.weight, fc.bias)]
    y_RD: Tensor = _MlpsOneByOne.apply(x_STD.flatten(0, 1), rows, mlps[0].act.approximate, *parameters)
    return y_RD.view_as(x_STD)


def run_grouped(experts: nn.ModuleList, x_STD: Tensor, plan: LayerPlan) -> Tensor:
    """All experts in two grouped matrix products (`F.grouped_mm`), [S, T, D] -> [S, T, D].

    The weights of the experts remain separate parameters and are stacked here: one copy per step, cheap compared with
    the products.
    """
    T = x_STD.shape[1]
    rows = [count * T for count in plan.counts]  # on the host, and on the device:
    rows_E = plan.counts_E * T
    ends_E = rows_E.cumsum(0).to(torch.int32)

    mlps = [cast(Mlp, expert) for expert in experts]

    def linear(x_RD: Tensor, layers: list[nn.Linear]) -> Tensor:
        weight_EDH = torch.stack([layer.weight for layer in layers]).to(x_STD.dtype).transpose(1, 2)
        y_RH = F.grouped_mm(x_RD, weight_EDH, offs=ends_E)
        biased_RH: Tensor = _AddBias.apply(y_RH, torch.stack([layer.bias for layer in layers]), rows_E, rows)
        return biased_RH

    hidden_RH = mlps[0].act(linear(x_STD.flatten(0, 1), [mlp.fc1 for mlp in mlps]))
    return linear(hidden_RH, [mlp.fc2 for mlp in mlps]).view_as(x_STD)


_ALIGNMENT = 8
"""Widths of grouped bf16 products must be multiples of this: their kernels read rows at strides of 16 bytes."""


def choose_execution(device: torch.device, bf16: bool, experts: nn.ModuleList) -> Execute:
    """The faster way to run the experts (docs/performance.md has the measurements).

    On a CPU, one by one. On a GPU of compute capability 9, which has fast grouped bf16 products, and more than one
    expert, grouped: many small products would underuse it. Capability 10 is excluded: there, empty groups give wrong
    gradients (pytorch issue 172439).

    Args:
        experts: the experts of this process.
    """
    widths = cast(Mlp, experts[0]).fc1.weight.shape
    aligned = all(width % _ALIGNMENT == 0 for width in widths)
    if device.type == "cuda" and bf16 and len(experts) > 1 and aligned:
        major, _ = torch.cuda.get_device_capability(device)
        if major == 9:
            return run_grouped
    return run_one_by_one
