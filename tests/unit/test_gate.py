"""The gate's table, its noise and its two losses against formulas worked out by hand.

Axes: L expert layers, M clusters, E experts, C width of a cluster embedding, B images.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moce_ds.moe.gate import ClusterGate, chosen_experts, combine_weight, gate_losses, gate_noise

L, M, E, C = 2, 5, 8, 6


def gate(temperature: float = 1.0) -> ClusterGate:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(M, C), dim=1)
    return ClusterGate(embeddings, L, E, temperature)


def table(*rows: list[float]) -> Tensor:
    """One layer's probabilities, a row for each cluster."""
    return torch.tensor([rows])


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_table_is_a_softmax_over_experts_of_what_the_weights_make_of_the_embedding(temperature: float) -> None:
    own = gate(temperature)
    noise = torch.randn(L, M, E)
    for given in (None, noise):
        probs = own(given)
        assert probs.shape == (L, M, E) and probs.dtype == torch.float32
        for layer, weights in enumerate(own.weights):
            for cluster, embedding in enumerate(own.embeddings_MC):
                logits = (weights @ embedding).tolist()
                logits = [x + (0 if given is None else noise[layer, cluster, e].item()) for e, x in enumerate(logits)]
                total = sum(math.exp(x / temperature) for x in logits)
                expected = [math.exp(x / temperature) / total for x in logits]
                assert probs[layer, cluster].tolist() == pytest.approx(expected, rel=1e-4)


def test_only_the_weights_are_learned() -> None:
    own = gate()
    assert {name: tuple(p.shape) for name, p in own.named_parameters()} == {
        "weights.0": (E, C),
        "weights.1": (E, C),
    }
    own.double()
    assert own().dtype == torch.float32  # routes are decided in one precision


def test_routes_are_nearly_uniform_at_the_start() -> None:
    assert gate()().max() < 2 / E


def test_chosen_experts_are_those_of_highest_probability() -> None:
    probs = gate()()
    chosen = chosen_experts(probs)
    assert chosen.shape == (M, L) and chosen.dtype == np.int64
    for cluster in range(M):
        for layer in range(L):
            assert probs[layer, cluster, chosen[cluster, layer]] == probs[layer, cluster].max()


def test_noise_is_shared_normal_and_scaled_by_the_number_of_experts() -> None:
    shape = (4, 100, E)
    state = torch.get_rng_state()
    noise = gate_noise(3, 17, shape, 1.5)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    torch.manual_seed(99)
    assert torch.equal(gate_noise(3, 17, shape, 1.5), noise)  # whatever this rank has drawn before
    assert noise.std().item() == pytest.approx(1.5 / E, rel=0.05) and abs(noise.mean().item()) < 0.02
    for other in (gate_noise(4, 17, shape, 1.5), gate_noise(3, 18, shape, 1.5)):
        assert not (other == noise).any()


ONE_HOT = [1.0] + [0.0] * 7
UNIFORM = [1 / 8] * 8


def test_imbalance_runs_from_0_to_1_minus_the_number_of_experts() -> None:
    for row, expected in ((UNIFORM, 0), (ONE_HOT, -7), ([0.5, 0.5] + [0.0] * 6, -3)):
        losses = gate_losses(table(row), torch.zeros(4, dtype=torch.int64), torch.ones(1))
        assert losses.imbalance.item() == pytest.approx(expected, abs=1e-5)


def test_imbalance_is_the_mean_over_the_batch_and_the_sum_over_layers() -> None:
    probs = torch.cat([table(UNIFORM, ONE_HOT), table(ONE_HOT, ONE_HOT)])
    clusters = torch.tensor([0, 1, 1, 1])
    found = gate_losses(probs, clusters, torch.tensor([0.5, 0.5])).imbalance.item()
    assert found == pytest.approx(-7 * 3 / 4 - 7)  # 3 of 4 images are sure in the first layer, all in the second


def test_balance_is_the_variation_of_the_load_over_the_whole_training_set() -> None:
    other = [0.0, 1.0] + [0.0] * 6
    batch = torch.tensor([0, 0, 0])  # what is in the batch does not matter, the clusters' shares do
    for rows, share, expected in (
        ((UNIFORM, UNIFORM), [0.9, 0.1], 0),
        ((ONE_HOT, ONE_HOT), [0.5, 0.5], 7),  # one expert does everything
        ((ONE_HOT, other), [0.5, 0.5], 3),  # two share it
        ((ONE_HOT, other), [0.75, 0.25], 8 * (0.75**2 + 0.25**2) - 1),
        ((ONE_HOT, other), [1.0, 0.0], 7),
    ):
        found = gate_losses(table(*rows), batch, torch.tensor(share)).balance.item()
        assert found == pytest.approx(expected, abs=1e-5)
    both = gate_losses(torch.cat([table(ONE_HOT, other)] * 2), batch, torch.tensor([0.5, 0.5]))
    assert both.balance.item() == pytest.approx(6)


def test_losses_push_where_they_should() -> None:
    """A step against the gradient makes gates surer, and loads more even."""
    clusters, share = torch.arange(M), torch.full((M,), 1 / M)
    for name in ("imbalance", "balance"):
        own = gate()
        before = gate_losses(own(), clusters, share)
        getattr(before, name).backward()
        with torch.no_grad():
            for weight in own.weights:
                assert weight.grad is not None and weight.grad.abs().max() > 0
                weight -= 0.5 * weight.grad
        after = gate_losses(own(), clusters, share)
        assert getattr(after, name) < getattr(before, name)


def test_prob_multiplies_by_p() -> None:
    probs = gate()()
    clusters, experts = torch.tensor([4, 0, 4]), torch.tensor([1, 7, 2])
    weight = combine_weight(probs, 1, clusters, experts, "prob")
    assert torch.equal(weight, torch.stack([probs[1, 4, 1], probs[1, 0, 7], probs[1, 4, 2]]))


def test_straight_through_multiplies_by_1_and_has_the_gradient_of_log_p() -> None:
    clusters, experts = torch.tensor([4, 0, 4]), torch.tensor([1, 7, 2])
    towards = torch.tensor([0.3, -2.0, 5.0])
    gradients = []
    for function in (
        lambda probs: combine_weight(probs, 1, clusters, experts, "straight_through"),
        lambda probs: probs[1, clusters, experts].log(),
    ):
        own = gate()
        value = function(own())
        (value * towards).sum().backward()
        gradients.append(own.weights[1].grad)
    assert torch.equal(combine_weight(gate()(), 1, clusters, experts, "straight_through"), torch.ones(3))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0
