"""On a GPU the host never waits inside the forward and backward pass of an expert layer: torch raises where it would.

Axes: B images, K experts an image is sent to, T tokens, D width, M clusters, L layers, E experts.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from moce_ds.distributed.device_copy import on_device
from moce_ds.models.mae import make_mlp
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.expert_layer import Execute, run_grouped, run_one_by_one
from moce_ds.moe.gate import ClusterGate, combine_weights, gate_losses
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

B, T, D, M, L, E = 16, 10, 64, 12, 2, 4


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Every operation that makes the host wait for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("execute", [run_one_by_one, run_grouped], ids=lambda function: function.__name__)
def test_forward_and_backward_never_wait(execute: Execute, k: int, shared: bool) -> None:
    device, random = torch.device("cuda"), np.random.default_rng(0)
    torch.manual_seed(0)
    gate = ClusterGate(torch.randn(M, 8), L, E, 1.0).to(device)
    layers = nn.ModuleList(ClusterMoE(lambda: make_mlp(D, 4.0), E, 1, shared) for _ in range(L)).to(device)
    for layer in layers:
        layer.execute = execute
    x_BTD, dy_BTD = torch.randn(2, B, T, D, device=device)
    x_BTD.requires_grad_()
    share_M = torch.full((M,), 1 / M, device=device)
    expert_MLK = random.permuted(np.tile(np.arange(E - 1), (M, L, 1)), axis=2)[:, :, :k]  # one expert has nothing
    clusters_WB = random.integers(M, size=(1, B))

    def step() -> None:
        plan = make_plan(clusters_WB, expert_MLK, default_placement(L, E), 0, 1).to(device)
        clusters_B = on_device(torch.from_numpy(clusters_WB[0]), device)
        torch.cuda.set_sync_debug_mode("error")
        with torch.autocast("cuda", torch.bfloat16):
            y_BTD, probs_LME = x_BTD, gate()
            for number, layer in enumerate(layers):
                planned = plan.layers[number]
                weight_BK = combine_weights(probs_LME, number, clusters_B, planned.experts_BK, "prob")
                y_BTD = layer(y_BTD, planned, weight_BK)
            losses = gate_losses(probs_LME, clusters_B, share_M)
        torch.autograd.backward([y_BTD, losses.balance + losses.imbalance], [dy_BTD.to(y_BTD.dtype), None])
        torch.cuda.set_sync_debug_mode("default")

    step()  # libraries set themselves up
    step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*layers.parameters(), *gate.parameters()))


@pytest.mark.usefixtures("no_waiting")
def test_what_waits_is_caught() -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        torch.ones(3, device="cuda").sum().item()
