"""The gate's table, its noise and its two losses against formulas worked out by hand.

Axes: L expert layers, M clusters, E experts, K experts an image is sent to, C width of a cluster embedding, B images.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moce_ds.moe.gate import (
    ClusterGate,
    RandomGate,
    balanced_experts,
    chosen_experts,
    combine_weights,
    gate_losses,
    gate_noise,
    live_experts,
)

L, M, E, C = 2, 5, 8, 6


def gate(temperature: float = 1.0, init_scale: float = 0.1, tied: bool = False, learnable: bool = False) -> ClusterGate:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(M, C), dim=1)
    return ClusterGate(embeddings, L, E, temperature, tied=tied, learnable=learnable, init_scale=init_scale)


def table(*rows: list[float]) -> Tensor:
    """One layer's probabilities, a row for each cluster."""
    return torch.tensor([rows])


def test_table_and_losses_are_the_same_under_autocast() -> None:
    """The table on the host, which chooses the experts, is computed without autocast."""
    own, clusters_B = gate(init_scale=3.0), torch.tensor([0, 3, 3, 4])
    share_M = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    outside = own()
    with torch.autocast("cpu", torch.bfloat16):
        inside = own()
        losses = gate_losses(inside, clusters_B, share_M)
    assert torch.equal(inside, outside)
    assert losses == gate_losses(outside, clusters_B, share_M)


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


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_first_logits_have_the_stated_deviation(scale: float) -> None:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(500, 32), dim=1)
    logits = ClusterGate(embeddings, 1, 64, 1.0, init_scale=scale)().log()[0]
    assert (logits - logits.mean(dim=1, keepdim=True)).std().item() == pytest.approx(scale, rel=0.1)


def test_tied_layers_share_one_table_noise_included() -> None:
    own, noise = gate(tied=True), torch.randn(L, M, E)
    assert [tuple(p.shape) for p in own.parameters()] == [(E, C)]
    for given in (None, noise):
        probs = own(given)
        assert probs.shape == (L, M, E) and torch.equal(probs[0], probs[1])
    assert not torch.equal(own(noise), own())
    torch.testing.assert_close(own(noise)[0], gate()(noise)[0])
    own()[1, 0, 0].backward()
    assert own.weights[0].grad.abs().max() > 0


def test_learnable_embeddings_get_the_gradient_of_the_clusters_in_use() -> None:
    own = gate(learnable=True)
    assert torch.equal(own.embeddings_MC, gate().embeddings_MC) and "embeddings_MC" in dict(own.named_parameters())
    combine_weights(own(), 1, torch.tensor([2, 2]), torch.tensor([[0], [3]]), "straight_through").sum().backward()
    assert (own.embeddings_MC.grad.abs().amax(dim=1) > 0).tolist() == [c == 2 for c in range(M)]


def test_learning_embeddings_leaves_the_clusters_that_they_came_from_alone() -> None:
    clusters = np.eye(M, C, dtype=np.float32)
    own = ClusterGate(torch.from_numpy(clusters), L, E, 1.0, learnable=True)
    with torch.no_grad():
        own.embeddings_MC.zero_()
    assert np.array_equal(clusters, np.eye(M, C, dtype=np.float32))


@pytest.mark.parametrize("k", [1, 2])
def test_chosen_experts_are_those_of_highest_probability(k: int) -> None:
    probs = gate()()
    chosen = chosen_experts(probs, k)
    assert chosen.shape == (M, L, k) and chosen.dtype == torch.int64
    for cluster in range(M):
        for layer in range(L):
            found = probs[layer, cluster, chosen[cluster, layer]].tolist()
            assert found == sorted(probs[layer, cluster].tolist(), reverse=True)[:k]


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_gate_is_a_balanced_table_fixed_by_its_seed(tied: bool) -> None:
    own = RandomGate(42, 3, E, seed=5, tied=tied)
    torch.manual_seed(99)
    probs = own()
    assert list(own.parameters()) == [] and not probs.requires_grad
    assert probs.shape == (3, 42, E) and torch.equal(probs.sum(dim=-1), torch.ones(3, 42))
    clusters_LE = probs.sum(dim=1)
    assert set(clusters_LE.unique().tolist()) == {5.0, 6.0}
    assert torch.equal(own(torch.randn(3, 42, E)), probs) and torch.equal(RandomGate(42, 3, E, 5, tied=tied)(), probs)
    assert not torch.equal(RandomGate(42, 3, E, 6, tied=tied)(), probs)
    assert torch.equal(probs[0], probs[1]) == tied
    assert combine_weights(probs, 0, torch.tensor([7]), chosen_experts(probs, 1)[7:8, 0], "prob").item() == 1


@pytest.mark.parametrize("k", [1, 2])
def test_balanced_experts_have_nearly_equal_loads_where_clusters_are_small(k: int) -> None:
    """A gate that sends most images to one expert; clusters of a thousandth of the data, unequal in size."""
    torch.manual_seed(0)
    logits = torch.randn(2, 1000, E) + torch.tensor([3.0] + [0.0] * (E - 1))
    share = torch.rand(1000)
    share = share / share.sum()
    for choose, low, high in ((balanced_experts, 0.8, 1.2), (lambda p, _, k: chosen_experts(p, k), 0.0, 8.0)):
        chosen = choose(torch.softmax(logits, dim=-1), share, k)
        assert chosen.shape == (1000, 2, k) and chosen.dtype == torch.int64
        for layer in range(2):
            load = torch.bincount(chosen[:, layer, 0], weights=share, minlength=E) * E
            assert low <= load.min() and load.max() <= high
            assert k == 1 or (chosen[:, layer, 0] != chosen[:, layer, 1]).all()
    assert load.max() > 3  # without balance it is another matter


def test_balance_keeps_who_wants_an_expert_most() -> None:
    """Two experts, four equal clusters that all like the first: the two that like it most get it."""
    probs = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]])
    assert balanced_experts(probs, torch.full((4,), 0.25), 1)[:, 0, 0].tolist() == [0, 0, 1, 1]


def test_balance_does_not_see_what_a_cluster_s_logits_have_in_common() -> None:
    torch.manual_seed(1)
    logits, share = torch.randn(1, 40, E), torch.full((40,), 1 / 40)
    shifted = logits + 5 * torch.randn(1, 40, 1)
    first, second = (balanced_experts(torch.softmax(x.double(), dim=-1), share, 2) for x in (logits, shifted))
    assert torch.equal(first, second)


def test_live_experts_are_those_that_any_cluster_chooses() -> None:
    assert live_experts(np.array([[[0, 3]], [[3, 5]]])) == [[0, 3, 5]]


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


CLUSTERS, CHOSEN = torch.tensor([4, 0, 4]), torch.tensor([[1, 3], [7, 0], [2, 1]])


@pytest.mark.parametrize("k", [1, 2])
def test_prob_multiplies_by_p(k: int) -> None:
    probs, experts = gate()().detach(), CHOSEN[:, :k]
    weight = combine_weights(probs, 1, CLUSTERS, experts, "prob")
    expected = [[probs[1, c, e] for e in row] for c, row in zip(CLUSTERS, experts, strict=True)]
    assert torch.equal(weight, torch.tensor(expected))


@pytest.mark.parametrize("k", [1, 2])
def test_straight_through_sums_to_1_and_has_the_gradient_of_the_log_of_the_chosen_share(k: int) -> None:
    """For equal upstream gradients the sum of weights has the gradient of log(sum of p); for k = 1 that is log p."""
    experts, towards = CHOSEN[:, :k], torch.tensor([0.3, -2.0, 5.0])
    weight = combine_weights(gate()(), 1, CLUSTERS, experts, "straight_through")
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(3))
    gradients = []
    for function in (
        lambda probs: combine_weights(probs, 1, CLUSTERS, experts, "straight_through").sum(dim=1),
        lambda probs: probs[1, CLUSTERS[:, None], experts].sum(dim=1).log(),
    ):
        own = gate()
        (function(own()) * towards).sum().backward()
        gradients.append(own.weights[1].grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_straight_through_of_two_shares_out_by_p() -> None:
    probs = gate()()
    weight = combine_weights(probs, 0, CLUSTERS, CHOSEN, "straight_through")
    p = torch.stack([probs[0, c, row] for c, row in zip(CLUSTERS, CHOSEN, strict=True)])
    torch.testing.assert_close(weight[:, 0] / weight[:, 1], p[:, 0] / p[:, 1])
