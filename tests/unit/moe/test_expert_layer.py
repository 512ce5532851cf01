"""Experts in one process: `ExpertLayer` against the blackboard version, and the two ways to run experts.

Axes: B images, K experts an image is sent to, S rows, T tokens, D width, E experts.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moce_ds.models.mae import make_mlp
from moce_ds.moe.expert_layer import Execute, ExpertLayer, choose_execution, run_grouped, run_one_by_one
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.moe.routing_plan import LayerPlan, plan_layer

B, T, D, E = 7, 3, 16, 4


def make_expert() -> nn.Module:
    return make_mlp(D, 2.0)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def run(
    module: nn.Module, x_BTD: Tensor, plan: LayerPlan, weight_BK: Tensor, dy_BTD: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor]]:
    """Output, and gradients of input, combine weights and parameters."""
    x_BTD, weight_BK = x_BTD.clone().requires_grad_(), weight_BK.clone().requires_grad_()
    y_BTD = module(x_BTD, plan, weight_BK)
    y_BTD.backward(dy_BTD)
    return y_BTD.detach(), x_BTD.grad, weight_BK.grad, gradients(module)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_the_layer_is_the_reference(k: int, shared: bool) -> None:
    torch.manual_seed(0)
    reference = ReferenceMoE(make_expert, E, shared).double()
    slots = np.array([2, 0, 3, 1])
    layer = ExpertLayer(make_expert, E, shared).double()
    by_slot = {f"experts.{slots[e]}.": f"experts.{e}." for e in range(E)}
    state = reference.state_dict()
    layer.load_state_dict({name: state[by_slot.get(name[:10], name[:10]) + name[10:]] for name in layer.state_dict()})
    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(3), (B, 1)), axis=1)[:, :k]  # expert 3 gets nothing
    plan = plan_layer(chosen[None], slots, 0, 1)
    x_BTD, dy_BTD = torch.randn(2, B, T, D, dtype=torch.float64)
    weight_BK = torch.rand(B, k, dtype=torch.float64) / k
    *found, own = run(layer, x_BTD, plan, weight_BK, dy_BTD)
    *expected, theirs = run(reference, x_BTD, plan, weight_BK, dy_BTD)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for name, gradient in own.items():
        wanted = theirs[by_slot.get(name[:10], name[:10]) + name[10:]]
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert all(p.grad is not None for p in layer.parameters())  # DeepSpeed's hooks fire for an idle expert too


def test_equal_experts_and_shared_expert_are_the_dense_mlp() -> None:
    torch.manual_seed(0)
    layer = ExpertLayer(make_expert, E, shared=True).double()
    dense = make_expert().double()
    for mlp in (*layer.experts, layer.shared):
        assert mlp is not None
        mlp.load_state_dict(dense.state_dict())
    plan = plan_layer(np.array([[[0, 1], [2, 3], [3, 0]]]), np.arange(E), 0, 1)
    x_BTD = torch.randn(3, T, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x_BTD, plan, torch.tensor([[0.2, 0.1], [0.5, 0.5], [0.0, 0.3]])), dense(x_BTD))


def sorted_rows(counts: list[int]) -> LayerPlan:
    """The plan of rows that are sorted by expert already."""
    experts_S = np.repeat(np.arange(len(counts)), counts)
    return plan_layer(experts_S[None, :, None], np.arange(len(counts)), 0, 1)


COUNTS = ([3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [2, 2, 2, 3])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_grouped_products_equal_the_loop(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    def result(execute: Execute) -> list[Tensor]:
        torch.manual_seed(0)
        experts = nn.ModuleList(make_expert() for _ in range(E)).to(dtype)
        x_STD, dy_STD = torch.randn(2, sum(counts), T, D).to(dtype)
        x_STD.requires_grad_()
        y_STD = execute(experts, x_STD, sorted_rows(counts))
        y_STD.backward(dy_STD)
        assert x_STD.grad is not None and all(p.grad is not None for p in experts.parameters())
        return [y_STD.detach(), x_STD.grad, *gradients(experts).values()]

    for got, wanted in zip(result(run_grouped), result(run_one_by_one), strict=True):
        assert got.dtype == wanted.dtype == dtype and got.shape == wanted.shape
        if got.numel():
            assert (got - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


def test_rows_of_experts_run_one_by_one_are_neither_copied_nor_joined() -> None:
    experts = nn.ModuleList(make_expert() for _ in range(E))
    x_STD = torch.randn(9, T, D, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        y_STD = run_one_by_one(experts, x_STD, sorted_rows([3, 0, 5, 1]))
        y_STD.backward(torch.ones_like(y_STD))
    calls = Counter(event.name for event in profiled.events())
    assert calls["aten::addmm"] == 2 * E and calls["aten::mm"] == 4 * E
    assert calls["aten::gelu"] == calls["aten::gelu_backward"] == E
    copies = ("aten::cat", "aten::stack", "aten::clone", "aten::contiguous", "aten::add_", "aten::index_select")
    assert not [name for name in copies if calls[name]]


def test_under_autocast_both_ways_give_bf16_from_fp32_weights() -> None:
    def result(execute: Execute) -> Tensor:
        torch.manual_seed(0)
        layer = ExpertLayer(make_expert, E)
        layer.execute = execute
        plan = plan_layer(np.array([[[0], [2], [2]]]), np.arange(E), 0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD = layer(torch.randn(3, T, D), plan, torch.ones(3, 1))
        y_BTD.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
        return y_BTD.detach()

    loop, grouped = result(run_one_by_one), result(run_grouped)
    assert loop.dtype == grouped.dtype == torch.bfloat16
    assert (loop - grouped).abs().max() < 0.03


def test_the_biases_of_grouped_experts_are_summed_in_fp32() -> None:
    """Thousands of rows an expert: sums in bf16 would be off by several percent."""
    torch.manual_seed(0)
    experts = nn.ModuleList(make_expert() for _ in range(2))
    x_STD = torch.randn(1600, 4, D, dtype=torch.bfloat16)
    dy_STD = (torch.randn(1600, 4, D) + 0.2).to(torch.bfloat16)
    run_grouped(experts, x_STD, sorted_rows([700, 900])).backward(dy_STD)
    wanted_ED = torch.stack([part.double().sum(dim=(0, 1)) for part in dy_STD.split([700, 900])])
    got_ED = torch.stack([gradients(expert)["fc2.bias"] for expert in experts])
    assert ((got_ED - wanted_ED).norm() / wanted_ED.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("capability", "width", "held", "grouped"),
    [((9, 0), 16, 2, True), ((9, 0), 12, 2, False), ((9, 0), 16, 1, False), ((8, 0), 16, 2, False),
     ((10, 0), 16, 2, False)],
)  # fmt: skip
def test_experts_are_grouped_where_that_is_fast_and_right(
    capability: tuple[int, int], width: int, held: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    experts = nn.ModuleList(make_mlp(width, 4.0) for _ in range(held))
    chosen = choose_execution(torch.device("cuda"), True, experts)
    assert chosen is (run_grouped if grouped else run_one_by_one)


def test_on_a_cpu_experts_run_one_by_one() -> None:
    experts = nn.ModuleList(make_expert() for _ in range(8))
    assert choose_execution(torch.device("cpu"), True, experts) is run_one_by_one
