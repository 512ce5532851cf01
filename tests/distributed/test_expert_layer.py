"""The expert layer over 1, 2 and 4 processes computes what `ReferenceMoE` computes in one, to 1e-12 in float64: all
experts, the shared expert and the gate, in permuted slots, with images dealt to ranks in any order.

Axes: W ranks, B images of a rank, G = W x B images of all, T tokens, D width, M clusters, L layers, E experts,
K experts an image is sent to.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor, nn

from moce_ds.common.compat import quiet_deepspeed
from moce_ds.distributed.runtime import started
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.gate import ClusterGate, combine_weights
from moce_ds.moe.placement import held_experts, local_order
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.moe.routing_plan import Plan, make_plan

B, T, D, M, L, E, C = 6, 3, 8, 12, 2, 8, 5
EP_SIZES = {1: (1,), 2: (1, 2), 4: (1, 2, 4)}
BATCHES = ("random clusters", "all images to one expert", "a rank that gets nothing", "a new cluster")
QUANTITIES = ("output", "input gradient", "expert gradient", "shared gradient", "gate gradient")


@dataclass(frozen=True)
class Case:
    """One comparison."""

    ep: int
    k: int
    batch: str
    locality: bool

    @property
    def combine(self) -> str:
        """Both ways are tested."""
        return "straight_through" if self.batch == "a new cluster" else "prob"

    @property
    def shared(self) -> bool:
        """A shared expert needs the paper's combination."""
        return self.combine == "prob"


def cases(world: int) -> list[Case]:
    return [Case(*values) for values in product(EP_SIZES[world], (1, 2), BATCHES, (False, True))]


Differences = dict[str, float]
"""Largest difference from the reference, over the reference's largest value, by quantity."""


def make_expert() -> nn.Module:
    """An MLP; the model's own would import timm in every process."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(D, 2 * D), act=nn.GELU(), fc2=nn.Linear(2 * D, D)))


def places(k: int) -> np.ndarray:
    """slot_LE: a random one for every layer."""
    return np.random.default_rng(k).permuted(np.tile(np.arange(E), (L, 1)), axis=1)


def route_table(batch: str, k: int) -> np.ndarray:
    """expert_MLK of a case."""
    random = np.random.default_rng(3)
    if batch == "all images to one expert":
        return np.tile(np.arange(E - 1, E - 1 - k, -1), (M, L, 1))
    if batch == "a rank that gets nothing":  # slots 0 and 1 are on the first rank of a group whatever ep_size is
        experts_L2 = np.argsort(places(k), axis=1)[:, :2]
        return random.permuted(np.tile(experts_L2, (M, 1, 1)), axis=2)[:, :, :k]
    return random.permuted(np.tile(np.arange(E), (M, L, 1)), axis=2)[:, :, :k]


def batches_of(batch: str, W: int) -> list[np.ndarray]:
    """Clusters of the images, [G], of two steps; a new cluster comes in the second only."""
    random = np.random.default_rng(4)
    if batch == "a new cluster":
        second = random.integers(M - 1, size=W * B)
        second[[1, -1]] = M - 1
        return [random.integers(M - 1, size=W * B), second]
    return [random.integers(M, size=W * B) for _ in range(2)]


def forward(
    layers: Sequence[nn.Module], gate: ClusterGate, plan: Plan, x: Tensor, clusters: Tensor, how: str
) -> Tensor:
    """Expert layers one after the other, with the weights that the gate gives."""
    probs_LME = gate().double()
    for layer, module in enumerate(layers):
        x = module(
            x, plan.layers[layer], combine_weights(probs_LME, layer, clusters, plan.layers[layer].experts_BK, how)
        )
    return x


def gradient(*modules: nn.Module | None) -> Tensor:
    """One vector; what has no gradient counts as zero (an idle expert of the reference). It begins with a zero."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([torch.zeros(1, dtype=torch.float64), *(grad.flatten() for grad in grads)])


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def compare_with_reference() -> dict[Case, Differences]:
    """What one rank finds, for every case of its world."""
    torch.set_num_threads(1)
    with started() as runtime:
        quiet_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        return {case: _compare(case, runtime.rank, runtime.world_size) for case in cases(runtime.world_size)}


class DoubleGate(ClusterGate):
    """The gate in float64: that of training decides in float32, whose rounding would hide all else."""

    def forward(self, noise_LME: Tensor | None = None) -> Tensor:
        logits_LME = torch.einsum("lec,mc->lme", torch.stack(list(self.weights)), self.embeddings_MC)
        return torch.softmax(logits_LME / self.temperature, dim=-1)


def _compare(case: Case, rank: int, W: int) -> Differences:
    torch.manual_seed(0)
    slot_LE, table = places(case.k), route_table(case.batch, case.k)
    reference = [ReferenceMoE(make_expert, E, case.shared).double() for _ in range(L)]
    gate = DoubleGate(torch.randn(M, C), L, E, 1.0).double()
    layers = [_distributed(whole, slot_E, case, rank) for whole, slot_E in zip(reference, slot_LE, strict=True)]
    worst: Differences = dict.fromkeys(QUANTITIES, 0.0)
    for clusters_G in batches_of(case.batch, W):
        x_GTD, dy_GTD = torch.randn(2, W * B, T, D, dtype=torch.float64)
        order_G = np.arange(W * B)
        if case.locality:
            order_G = local_order(clusters_G, table[:, :, 0], slot_LE, W, case.ep)
        own_G = torch.from_numpy(order_G.reshape(W, B)[rank])
        plan = make_plan(clusters_G[order_G].reshape(W, B), table, slot_LE, rank, case.ep)
        whole_plan = make_plan(clusters_G[None], table, slot_LE, 0, 1)
        clusters = torch.from_numpy(clusters_G)
        expected = _passes(reference, gate, whole_plan, x_GTD, clusters, dy_GTD, case)
        found = _passes(layers, gate, plan, x_GTD[own_G], clusters[own_G], dy_GTD[own_G], case)
        assert all(p.grad is not None for own in layers for p in own.parameters()), "hooks must fire on every rank"
        for tensor in found[2:]:
            dist.all_reduce(tensor)
        expected[:2] = [tensor[own_G] for tensor in expected[:2]]
        for name, got, wanted in zip(QUANTITIES, found, expected, strict=True):
            if wanted.any():
                worst[name] = max(worst[name], relative(got, wanted))
            else:
                assert not got.any()
    return worst


def _distributed(whole: ReferenceMoE, slot_E: np.ndarray, case: Case, rank: int) -> ClusterMoE:
    """This rank's part of a reference layer."""
    own = ClusterMoE(make_expert, E, case.ep, case.shared).double()
    own.set_deepspeed_parallelism()
    own.set_local_experts(held_experts(slot_E, rank % case.ep, case.ep))
    for expert, number in zip(own.experts, own.expert_ids, strict=True):
        expert.load_state_dict(whole.experts[number].state_dict())
    if own.shared is not None and whole.shared is not None:
        own.shared.load_state_dict(whole.shared.state_dict())
    return own


def _passes(
    layers: Sequence[ReferenceMoE | ClusterMoE],
    gate: ClusterGate,
    plan: Plan,
    x: Tensor,
    clusters: Tensor,
    dy: Tensor,
    case: Case,
) -> list[Tensor]:
    """Forward and backward; the tensors of `QUANTITIES`, expert gradients by global number."""
    for module in (*layers, gate):
        module.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(layers, gate, plan, x, clusters, case.combine)
    y.backward(dy)
    experts_LE = torch.zeros(L, E, len(gradient(layers[0].experts[0])), dtype=torch.float64)
    for layer, module in enumerate(layers):
        numbers = module.expert_ids if isinstance(module, ClusterMoE) else list(range(E))
        experts_LE[layer, numbers] = torch.stack([gradient(expert) for expert in module.experts])
    assert x.grad is not None
    return [y.detach(), x.grad, experts_LE, gradient(*(module.shared for module in layers)), gradient(gate)]


@pytest.fixture(scope="module")
def by_rank(request: pytest.FixtureRequest) -> list[dict[Case, Differences]]:
    """What every rank of a world of `request.param` processes found."""
    return run_distributed(compare_with_reference, request.param)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("by_rank", EP_SIZES, indirect=True)
def test_layer_equals_reference(by_rank: list[dict[Case, Differences]], batch: str) -> None:
    compared = [case for case in cases(len(by_rank)) if case.batch == batch]
    assert len(compared) == 4 * len(EP_SIZES[len(by_rank)])
    for rank, case, quantity in product(range(len(by_rank)), compared, QUANTITIES):
        assert by_rank[rank][case][quantity] < 1e-12, f"{quantity} of rank {rank}, {case}"


@pytest.mark.parametrize("k", [1, 2])
def test_the_batches_are_what_they_say(k: int) -> None:
    assert len(np.unique(route_table(BATCHES[0], k))) > 4
    assert set(route_table(BATCHES[1], k).flat) == set(range(E - k, E))
    in_slots = np.stack([places(k)[layer][route_table(BATCHES[2], k)[:, layer]] for layer in range(L)])
    assert set(in_slots.flat) == {0, 1}
    first, second = batches_of(BATCHES[3], 2)
    assert M - 1 not in first and M - 1 in second
    assert not (places(k) == np.arange(E)).all(axis=1).any()
