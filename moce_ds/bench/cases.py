"""The layers that `moce bench layer` compares, each as one call of forward and backward, and the routes of the images.

Routes spread the images evenly over the experts, or as unevenly as the gate of the demo.

Axes: B images of a rank, W ranks, T tokens, S = B T tokens of a rank, D width, E experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.moe.sharded_moe import TopKGate, top1gating
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import make_mlp
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.deepspeed_token_layer import TokenMoeLayer
from moce_ds.moe.expert_layer import choose_execution
from moce_ds.moe.placement import default_placement, local_order
from moce_ds.moe.routing_plan import make_plan

TOKENS = 50
"""T: ViT-B/16 at 224 px keeps 49 of 196 patches, plus cls."""

_DRAWS = 16

# Lorenz curve of a real run: share of the images in the least used quarter, half, ... of the experts (block 5 of the
# demo after 356 steps: loads 0, 0.19, 0.29, 0.53).
_SHARE_OF_EXPERTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHARE_OF_IMAGES = (0.0, 0.0, 0.189, 0.475, 1.0)


@dataclass(frozen=True)
class Case:
    """One way to compute the layer.

    Attributes:
        run: runs forward and backward once.
        dropped: share of dropped tokens.
        sent: bytes that leave this rank in one call (for our layer: the mean over the draws).
    """

    run: Callable[[], object]
    dropped: float = 0.0
    sent: int = 0


@dataclass(frozen=True)
class Problem:
    """Sizes, the experts of all images by rank in several draws (the first is timed), and the tensors of this rank."""

    D: int
    E: int
    ep_size: int
    draws_WB: list[NDArray[np.int64]]
    x_BTD: Tensor
    grad_BTD: Tensor
    runtime: Runtime

    @property
    def experts_WB(self) -> NDArray[np.int64]:
        """The draw that is timed."""
        return self.draws_WB[0]

    @property
    def B(self) -> int:
        """Images per rank."""
        return self.experts_WB.shape[1]


def make_problem(B: int, D: int, E: int, routing: str, runtime: Runtime) -> Problem:
    """Random routes, tokens and gradients; bf16 on a GPU and float32 on a CPU. All ranks are one group."""
    W = runtime.world_size
    draws_WB = [_draw_experts(routing, E, B * W, seed).reshape(W, B) for seed in range(_DRAWS)]
    torch.manual_seed(runtime.rank)
    dtype = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32
    x_BTD, grad_BTD = (torch.randn(B, TOKENS, D, device=runtime.device, dtype=dtype) for _ in range(2))
    return Problem(D, E, W, draws_WB, x_BTD.requires_grad_(), grad_BTD, runtime)


def dense(problem: Problem) -> Case:
    """The dense MLP of the same active size, the baseline of all ratios."""
    mlp = _on_device(make_mlp(problem.D, 4), problem)
    return Case(_pass(mlp, problem, lambda: mlp(problem.x_BTD)))


def ours(problem: Problem, locality: bool = False) -> Case:
    """`ClusterMoE`, including planning; with `locality`, images are first distributed to ranks by route."""
    runtime, ep_size = problem.runtime, problem.ep_size
    layer = ClusterMoE(lambda: make_mlp(problem.D, 4), problem.E, ep_size)
    layer.set_deepspeed_parallelism()
    _on_device(layer, problem)
    bf16 = problem.x_BTD.dtype == torch.bfloat16
    layer.execute = choose_execution(runtime.device, bf16, layer.experts)
    table_MLK = np.arange(problem.E)[:, None, None]  # one cluster per expert
    slot_LE = default_placement(1, problem.E)

    def distributed(experts_WB: NDArray[np.int64]) -> NDArray[np.int64]:
        if not locality:
            return experts_WB
        order_G = local_order(experts_WB.ravel(), table_MLK[:, :, 0], slot_LE, runtime.world_size, ep_size)
        return experts_WB.ravel()[order_G].reshape(experts_WB.shape)

    draws_WB = [distributed(experts_WB) for experts_WB in problem.draws_WB]
    weight_BK = torch.ones(problem.B, 1, device=runtime.device, requires_grad=True)

    def forward() -> Tensor:
        plan = make_plan(draws_WB[0], table_MLK, slot_LE, runtime.rank, ep_size).to(runtime.device)
        return layer(problem.x_BTD, plan.layers[0], weight_BK)

    plans = [make_plan(experts_WB, table_MLK, slot_LE, runtime.rank, ep_size) for experts_WB in draws_WB]
    moved = sum(plan.layers[0].moved for plan in plans) / len(plans)
    # There and back, forward and backward.
    sent = 4 * moved * TOKENS * problem.D * problem.x_BTD.element_size()
    return Case(_pass(layer, problem, forward), sent=int(sent))


class _RoutedGate(TopKGate):
    """DeepSpeed's gate with given experts: those of the images."""

    logits_SE: Tensor

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Any:
        """Stock top-1 dispatch of the given logits."""
        return top1gating(
            self.logits_SE, self.capacity_factor, self.min_capacity, used_token, None, self.drop_tokens, False,
            self.ep_group, sparse_routes, use_tutel,
        )  # fmt: skip


def stock(problem: Problem, capacity: float) -> Case:
    """DeepSpeed's stock layer routed by cluster; with `capacity` 0 nothing is dropped and all experts are padded."""
    layer = TokenMoeLayer(lambda: make_mlp(problem.D, 4), problem.D, problem.E, problem.ep_size, capacity=capacity)
    old = layer.deepspeed_moe.gate
    gate = _RoutedGate(problem.D, problem.E, 1, capacity or 1.0, capacity or 1.0, 4, None, old.drop_tokens, False)
    experts_S = torch.from_numpy(problem.experts_WB[problem.runtime.rank]).repeat_interleave(TOKENS)
    gate.logits_SE = 4.0 * nn.functional.one_hot(experts_S, problem.E).float().to(problem.runtime.device)
    gate.requires_grad_(False)
    layer.deepspeed_moe.gate = gate
    return _stock_case(layer, problem, capacity, torch.bincount(experts_S, minlength=problem.E))


class _StockGate(TopKGate):
    """DeepSpeed's own gate by token, with its loss in the form of `TokenGate`'s two."""

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Any:
        """Stock top-1 dispatch; the second loss is 0."""
        loss, *dispatch = super().forward(input, used_token, sparse_routes, use_tutel)
        return torch.stack([loss, torch.zeros_like(loss)]), *dispatch


def stock_layer(
    make_expert: Callable[[], nn.Module], width: int, num_experts: int, ep_size: int, capacity: float
) -> TokenMoeLayer:
    """DeepSpeed's stock layer with its own gate by token, for a whole model; `capacity` as in `stock`."""
    layer = TokenMoeLayer(make_expert, width, num_experts, ep_size, capacity=capacity)
    old = layer.deepspeed_moe.gate
    layer.deepspeed_moe.gate = _StockGate(
        width, num_experts, 1, capacity or 1.0, capacity or 1.0, 4, None, old.drop_tokens, False
    )
    return layer


def token(problem: Problem) -> Case:
    """TokenMoE with an untrained token gate, without dropping."""
    layer = TokenMoeLayer(lambda: make_mlp(problem.D, 4), problem.D, problem.E, problem.ep_size)
    return _stock_case(layer, problem, 0.0, None)


def _stock_case(layer: TokenMoeLayer, problem: Problem, capacity: float, counts_E: Tensor | None) -> Case:
    layer.set_deepspeed_parallelism()
    _on_device(layer, problem)
    S = problem.B * TOKENS
    dropped = 0.0
    rows = S  # an upper bound for the token gate, whose largest load is unknown
    if counts_E is not None:
        rows = max(4, math.ceil(S / problem.E * capacity)) if capacity else int(counts_E.max())
        dropped = float((counts_E - rows).clamp_min(0).sum()) / S
    away = problem.E * (1 - 1 / problem.ep_size)
    sent = int(4 * away * rows * problem.D * problem.x_BTD.element_size())
    return Case(_pass(layer, problem, lambda: layer(problem.x_BTD)[0]), dropped, sent)


def _pass(module: nn.Module, problem: Problem, forward: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        problem.x_BTD.grad = None
        forward().backward(problem.grad_BTD)

    return run


def _on_device(module: nn.Module, problem: Problem) -> nn.Module:
    return module.to(problem.runtime.device, problem.x_BTD.dtype)


def _expert_loads(routing: str, num_experts: int) -> NDArray[np.float64]:
    """Share of the images of each expert, [E], for `uniform` or `skewed` routing."""
    if routing == "uniform":
        return np.full(num_experts, 1 / num_experts)
    edges = np.interp(np.linspace(0, 1, num_experts + 1), _SHARE_OF_EXPERTS, _SHARE_OF_IMAGES)
    loads = np.diff(edges)
    # The load of an expert does not depend on its rank.
    return loads[np.random.default_rng(0).permutation(num_experts)]


def _draw_experts(routing: str, num_experts: int, images: int, seed: int) -> NDArray[np.int64]:
    """The expert of each image, [images]; with one cluster per expert, this is also its cluster."""
    return np.random.default_rng(seed).choice(num_experts, size=images, p=_expert_loads(routing, num_experts))
