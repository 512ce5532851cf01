"""Grouped experts compute what the same experts compute one by one, in bf16, gradients included.

Axes: B images, T tokens, S rows, D width, H hidden width, E experts, M clusters.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moce_ds.models.mae import make_mlp
from moce_ds.moe.expert_layer import Execute, choose_execution, run_grouped, run_one_by_one
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import LayerPlan, make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

D, E, T = 64, 4, 50
ONE_EXPERT_IDLE = (7, 0, 20, 3)
MANY_ROWS = (256, 256, 0, 0)  # 12,800 tokens of an expert: sums by atomics in bf16 are off by 13% and more


def plan_of(counts: tuple[int, ...]) -> LayerPlan:
    clusters_WB = np.repeat(np.arange(E), counts)[None]
    table_MLK = np.arange(E)[:, None, None]  # one cluster per expert
    return make_plan(clusters_WB, table_MLK, default_placement(1, E), 0, 1).to(torch.device("cuda")).layers[0]


def results(experts: nn.ModuleList, execute: Execute, x_STD: Tensor, plan: LayerPlan) -> list[Tensor]:
    """Output, gradient of the input, and those of all weights and biases, in fp32."""
    experts.zero_grad(set_to_none=True)
    x_STD = x_STD.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y_STD = execute(experts, x_STD, plan)
    y_STD.backward(torch.ones_like(y_STD) + 0.1 * y_STD.detach())
    grads = [x_STD.grad, *(parameter.grad for parameter in experts.parameters())]
    return [y_STD.detach().float(), *(grad.float() for grad in grads if grad is not None)]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9: on others the program runs experts one by one",
)
@pytest.mark.parametrize("counts", [ONE_EXPERT_IDLE, MANY_ROWS], ids=["one idle", "many rows"])
def test_grouped_equals_one_by_one(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    experts = nn.ModuleList(make_mlp(D, 4.0) for _ in range(E)).to("cuda")
    assert choose_execution(torch.device("cuda"), True, experts) is run_grouped
    x_STD = torch.randn(sum(counts), T, D, device="cuda", dtype=torch.bfloat16)
    plan = plan_of(counts)
    one_by_one, grouped = (results(experts, execute, x_STD, plan) for execute in (run_one_by_one, run_grouped))
    assert len(one_by_one) == len(grouped) == 2 + 4 * E
    for expected, found in zip(one_by_one, grouped, strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm() + 1e-6
