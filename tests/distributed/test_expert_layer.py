"""The expert layer over 1, 2 and 4 processes computes what `ReferenceMoE` computes in one, to 1e-12 in float64.

Axes: W ranks, B images of a rank, G = W x B images of all, T tokens, D width, M clusters, L layers, E experts.
"""

from collections.abc import Sequence
from itertools import product

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor, nn

from moce_ds.compat import quiet_deepspeed
from moce_ds.moe.layer import ClusterMoE
from moce_ds.moe.plan import Plan, make_plan
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.runtime import started

B, T, D, M, L, E = 6, 3, 8, 12, 2, 8
EP_SIZES = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}
CASES = ("random clusters", "all images to one expert", "a rank that gets nothing")
QUANTITIES = ("output", "input gradient", "combine weight gradient", "expert gradient")

Differences = dict[str, float]
"""Largest difference from the reference, over the reference's largest value, by quantity."""


def make_expert() -> nn.Module:
    """An MLP; the model's own would import timm in every process."""
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


def route_table(case: str) -> np.ndarray:
    """expert_ML of a case."""
    if case == "all images to one expert":
        return np.full((M, L), E - 1)
    # Experts 0 and 1 live on the first rank of a group whatever ep_size is: then the others get nothing.
    choices = E if case == "random clusters" else 2
    return np.random.default_rng(3).integers(choices, size=(M, L))


def run_layers(layers: Sequence[nn.Module], plan: Plan, x_BTD: Tensor, weight_BL: Tensor, dy_BTD: Tensor) -> Tensor:
    """Two expert layers one after the other, and the backward pass from the gradient `dy_BTD`; returns the output."""
    y_BTD = x_BTD
    for layer, module in enumerate(layers):
        y_BTD = module(y_BTD, plan.layers[layer], weight_BL[:, layer])
    y_BTD.backward(dy_BTD)
    return y_BTD.detach()


def gradients(experts: nn.ModuleList) -> list[Tensor]:
    """One vector an expert; an expert without images must have gradients too, or DeepSpeed's buckets go wrong."""
    return [torch.cat([p.grad.flatten() for p in expert.parameters() if p.grad is not None]) for expert in experts]


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def compare_with_reference() -> dict[tuple[int, str], Differences]:
    """What one rank finds, for every ep_size and case."""
    torch.set_num_threads(1)
    with started() as runtime:
        quiet_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        W = runtime.world_size
        return {(ep, case): _compare(case, ep, runtime.rank, W) for ep, case in product(EP_SIZES[W], CASES)}


def _compare(case: str, ep_size: int, rank: int, W: int) -> Differences:
    torch.manual_seed(0)
    reference = [ReferenceMoE(make_expert, E).double() for _ in range(L)]
    x_GTD, dy_GTD = torch.randn(2, W * B, T, D, dtype=torch.float64)
    weight_GL = torch.rand(W * B, L, dtype=torch.float64)
    clusters_WB = torch.randint(M, (W, B)).numpy()
    mine = slice(rank * B, (rank + 1) * B)

    layers = [ClusterMoE(make_expert, E, ep_size).double() for _ in range(L)]
    first = rank % ep_size * (E // ep_size)
    for own, whole in zip(layers, reference, strict=True):
        own.set_deepspeed_parallelism()
        for local, expert in enumerate(own.experts):
            expert.load_state_dict(whole.experts[first + local].state_dict())

    leaves = x_G, w_G = x_GTD.clone().requires_grad_(), weight_GL.clone().requires_grad_()
    expected_GTD = run_layers(
        reference, make_plan(clusters_WB.reshape(1, -1), route_table(case), 0, 1, E), *leaves, dy_GTD
    )
    own_leaves = x_B, w_B = x_GTD[mine].clone().requires_grad_(), weight_GL[mine].clone().requires_grad_()
    y_BTD = run_layers(layers, make_plan(clusters_WB, route_table(case), rank, ep_size, E), *own_leaves, dy_GTD[mine])

    expected_grads, grads = [], []
    for own, whole in zip(layers, reference, strict=True):
        # An expert without images has no gradient in the reference and a zero one here.
        whole_grads = [_gradient_or_zero(expert) for expert in whole.experts]
        held = torch.zeros(E, len(whole_grads[0]), dtype=torch.float64)
        held[first : first + len(own.experts)] = torch.stack(gradients(own.experts))
        dist.all_reduce(held)
        expected_grads.append(torch.stack(whole_grads))
        grads.append(held)
    assert x_G.grad is not None and w_G.grad is not None and x_B.grad is not None and w_B.grad is not None
    found = (y_BTD, x_B.grad, w_B.grad, torch.stack(grads))
    expected = (expected_GTD[mine], x_G.grad[mine], w_G.grad[mine], torch.stack(expected_grads))
    return {name: relative(*pair) for name, *pair in zip(QUANTITIES, found, expected, strict=True)}


def _gradient_or_zero(expert: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in expert.parameters()])


@pytest.fixture(scope="module")
def by_rank(request: pytest.FixtureRequest) -> list[dict[tuple[int, str], Differences]]:
    """What every rank of a world of `request.param` processes found."""
    return run_distributed(compare_with_reference, request.param)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_rank", EP_SIZES, indirect=True)
def test_layer_equals_reference(by_rank: list[dict[tuple[int, str], Differences]], case: str) -> None:
    for rank, found in enumerate(by_rank):
        for ep_size in EP_SIZES[len(by_rank)]:
            for quantity in QUANTITIES:
                assert found[ep_size, case][quantity] < 1e-12, f"{quantity} of rank {rank} at ep_size {ep_size}"


def test_the_cases_are_what_they_say() -> None:
    assert len(np.unique(route_table(CASES[0]))) > 4
    assert set(route_table(CASES[1]).flat) == {E - 1}
    assert set(route_table(CASES[2]).flat) == {0, 1}
