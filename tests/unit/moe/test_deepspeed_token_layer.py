"""V-MoE's two losses against formulas worked out by hand.

Axes: S tokens, E experts.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from moce_ds.moe.deepspeed_token_layer import TokenMoeLayer, importance_loss, load_loss


def variation(loads: list[float]) -> float:
    mean = sum(loads) / len(loads)
    return sum((x - mean) ** 2 for x in loads) / len(loads) / mean**2


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_importance_is_the_variation_of_summed_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3)
    summed = [0.0] * 3
    for row in logits.tolist():
        total = sum(math.exp(x) for x in row)
        summed = [s + math.exp(x) / total for s, x in zip(summed, row, strict=True)]
    assert importance_loss(logits).item() == pytest.approx(variation(summed), rel=1e-4)
    one_sided = torch.tensor([[50.0, 0, 0, 0]] * 5)
    assert importance_loss(one_sided).item() == pytest.approx(3)  # one of four has everything: E - 1


@pytest.mark.parametrize("k", [1, 2])
def test_load_is_the_variation_of_the_chance_to_be_chosen_again(k: int) -> None:
    torch.manual_seed(1)
    logits, noise = torch.randn(6, 3), 1 / 3
    noisy = logits + noise * torch.randn(6, 3)
    loads = [0.0] * 3
    for row, noisy_row in zip(logits.tolist(), noisy.tolist(), strict=True):
        threshold = sorted(noisy_row)[-k]
        loads = [load + 1 - phi((threshold - x) / noise) for load, x in zip(loads, row, strict=True)]
    assert load_loss(logits, noisy, k, noise).item() == pytest.approx(variation(loads), rel=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_of_load_is_the_derivative_of_the_formula(k: int) -> None:
    """Central differences with the noise held; the threshold moves along, so a constant changes nothing."""
    rng = np.random.default_rng(3)
    start_SE, e_SE, noise = rng.normal(size=(7, 4)), rng.normal(size=(7, 4)) / 4, 1 / 4

    def formula(logits_SE: np.ndarray) -> float:
        threshold_S1 = np.sort(logits_SE + e_SE, axis=1)[:, -k, None]
        load_E = ndtr((logits_SE - threshold_S1) / noise).sum(axis=0)
        return float((load_E.std() / load_E.mean()) ** 2)

    slope_SE = np.zeros_like(start_SE)
    for place in np.ndindex(start_SE.shape):
        step_SE = np.zeros_like(start_SE)
        step_SE[place] = 1e-6
        slope_SE[place] = (formula(start_SE + step_SE) - formula(start_SE - step_SE)) / 2e-6
    logits_SE = torch.from_numpy(start_SE).requires_grad_()
    loss = load_loss(logits_SE, logits_SE + torch.from_numpy(e_SE), k, noise)
    loss.backward()
    assert loss.item() == pytest.approx(formula(start_SE), rel=1e-12)
    assert logits_SE.grad is not None
    np.testing.assert_allclose(logits_SE.grad.numpy(), slope_SE, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(logits_SE.grad.sum(dim=1).numpy(), 0, atol=1e-12)


def test_the_gate_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(4)
    gate = TokenMoeLayer(lambda: torch.nn.Linear(16, 16), 16, 4, 1).deepspeed_moe.gate.eval()
    x_SD = torch.randn(64, 16)
    expected = gate(x_SD)
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(x_SD)
    for ours, exact in zip(found, expected, strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("k", [1, 2])
def test_equal_logits_have_no_loss(k: int) -> None:
    logits = torch.full((5, 4), 0.7)
    assert importance_loss(logits).item() == pytest.approx(0, abs=1e-12)
    assert load_loss(logits, logits, k, 0.25).item() == pytest.approx(0, abs=1e-12)


def test_both_push_towards_even_loads() -> None:
    torch.manual_seed(2)
    start = torch.randn(50, 4) + torch.tensor([1.0, 0.5, 0.0, -0.5])
    noise = torch.randn(50, 4) / 4
    for loss in (importance_loss, lambda x: load_loss(x, x + noise, 1, 0.25)):
        logits = start.clone().requires_grad_()
        before = loss(logits)
        before.backward()
        assert logits.grad is not None and logits.grad.abs().max() > 0
        assert loss(start - 5 * logits.grad) < before
