"""MoCE with all experts in one process: it is the dense MAE at the start, and every image takes its own route.

Axes: B images, M clusters, L expert layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moce_ds.models.mae import DecoderShape, MaskedAutoencoder, nothing_masked
from moce_ds.models.moce import ExpertShape, Moce, Routing, make_gate, upcycle
from moce_ds.models.shapes import LossWeights
from moce_ds.models.vit import ViTShape
from moce_ds.moe.gate import RandomGate, chosen_experts
from moce_ds.moe.placement import default_placement
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.moe.routing_plan import make_plan

SHAPE, DECODER = ViTShape(16, 4, 16, 3, 2), DecoderShape(8, 1, 2)
M, E, LAYERS = 5, 4, (0, 2)


def dense() -> Any:
    """A dense MAE in float64."""
    torch.manual_seed(1)
    return MaskedAutoencoder(SHAPE, DECODER, 0.75).double()


def moce(combine: str, perturbation: float = 0.0, k: int = 1, shared: bool = False) -> Any:
    """A MoCE made of `dense()`; its gate is sure enough for routes to differ."""
    torch.manual_seed(2)
    embeddings = torch.nn.functional.normalize(torch.randn(M, 6), dim=1)
    share = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    experts = ExpertShape(E, LAYERS, k=k, combine=combine, shared=shared)
    made = Moce(SHAPE, DECODER, 0.75, experts, embeddings, share, ReferenceMoE).double()
    state = upcycle(dict(dense().named_parameters()), made.experts, perturbation, seed=0)
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(name.startswith("gate.") or name in ("pos_embed", "decoder_pos_embed", "share_M") for name in missing)
    with torch.no_grad():
        for weight in made.gate.weights:
            weight *= 8
    return made


def experts_of(model: Moce, noise: Tensor | None = None) -> np.ndarray:
    """The route table, expert_MLK."""
    return chosen_experts(model.gate(noise), model.experts.k).numpy()


def routing(model: Moce, clusters: Sequence[int], noise: Tensor | None = None) -> Routing:
    clusters_WB = np.array([clusters], dtype=np.int64)
    plan = make_plan(clusters_WB, experts_of(model, noise), default_placement(len(LAYERS), E), 0, 1)
    return Routing(torch.from_numpy(clusters_WB[0]), plan, noise)


@pytest.fixture(scope="module")
def images(photo_pixels: Tensor) -> Tensor:
    return photo_pixels[:6]


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.rand(6, 16, generator=torch.Generator().manual_seed(0))


CLUSTERS = (0, 3, 1, 4, 2, 3)


@pytest.mark.parametrize(
    ("combine", "k", "shared"), [("straight_through", 1, False), ("straight_through", 2, False), ("prob", 2, True)]
)
def test_without_perturbation_it_is_the_dense_mae(
    images: Tensor, noise: Tensor, combine: str, k: int, shared: bool
) -> None:
    model = moce(combine, k=k, shared=shared)
    assert len(np.unique(experts_of(model), axis=0)) > 1  # the images do take different routes
    expected = dense()(images, noise).reconstruction
    found = model(images, noise, routing(model, CLUSTERS)).reconstruction
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert (found.patches_BNP - expected.patches_BNP).abs().max() < 1e-6  # combine weights are float32


def test_the_paper_s_combination_is_not_the_dense_mae(images: Tensor, noise: Tensor) -> None:
    other = moce("prob")
    found = other(images, noise, routing(other, CLUSTERS)).reconstruction.loss
    assert abs(found - dense()(images, noise).loss) > 1e-4


def test_two_experts_and_a_shared_one_are_summed_by_their_probabilities(images: Tensor, noise: Tensor) -> None:
    """In the last block alone, whose tokens are then known: y = p1 E1(x) + p2 E2(x) + (1 - p1 - p2) E_shared(x)."""
    model = moce("prob", perturbation=0.5, k=2, shared=True)
    seen: list[Tensor] = []
    block = model.blocks[LAYERS[1]].mlp
    block.register_forward_hook(lambda _, given, result: seen.extend([given[0], result]))
    model(images, noise, routing(model, CLUSTERS))
    x_BTD, y_BTD = seen
    probs, chosen = model.gate().double(), experts_of(model)
    for b, cluster in enumerate(CLUSTERS):
        first, second = chosen[cluster, 1]
        p, q = probs[1, cluster, first], probs[1, cluster, second]
        expected = p * block.experts[first](x_BTD[b]) + q * block.experts[second](x_BTD[b])
        expected += (1 - p - q) * block.shared(x_BTD[b])
        assert (y_BTD[b] - expected).abs().max() < 1e-6


def test_activation_checkpointing_changes_nothing(images: Tensor, noise: Tensor) -> None:
    results = []
    for given in (False, True):
        model = moce("straight_through", perturbation=0.1, k=2)
        model.checkpoint_activations = given
        output = model(images, noise, routing(model, CLUSTERS))
        (output.reconstruction.loss + output.losses["balance"]).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert (gradient is None) == (results[1][name] is None)
        assert gradient is None or torch.equal(gradient, results[1][name])


def test_the_loss_is_the_weighted_sum_of_its_parts(images: Tensor, noise: Tensor) -> None:
    model = moce("straight_through")
    measured = model(images, noise, routing(model, CLUSTERS)).losses
    assert measured["loss"] == measured["reconstruction"], "without weights the gate's losses are only measured"
    model.weights = LossWeights(imbalance=0.25, balance=2.0)
    half = replace(routing(model, CLUSTERS), imbalance_share=0.5)
    found = model(images, noise, half).losses
    expected = measured["reconstruction"] + 0.125 * measured["imbalance"] + 2 * measured["balance"]
    assert found["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert found.keys() == {"loss", "reconstruction", "imbalance", "balance"}


def test_a_random_gate_is_a_gate(images: Tensor, noise: Tensor) -> None:
    """The control: a MoCE whose gate has nothing to learn, with the losses of a table of ones and zeros."""
    own = make_gate(ExpertShape(E, LAYERS, gate="random", seed=3), torch.zeros(M, 6))
    assert isinstance(own, RandomGate) and list(own.parameters()) == []
    model = moce("prob")
    model.gate = own
    output = model(images, noise, routing(model, CLUSTERS))
    assert output.reconstruction.loss.item() == pytest.approx(dense()(images, noise).loss.item(), abs=1e-6)
    assert output.losses["imbalance"].item() == pytest.approx(-len(LAYERS) * (E - 1))


@pytest.mark.parametrize("combine", ["prob", "straight_through"])
def test_each_image_goes_through_the_experts_of_its_cluster(images: Tensor, noise: Tensor, combine: str) -> None:
    """One image at a time through blocks whose MLP is replaced by p times the chosen expert."""
    model = moce(combine, perturbation=0.5)
    probs, chosen = model.gate(), experts_of(model)
    together = model(images, noise, routing(model, CLUSTERS)).reconstruction.patches_BNP
    for b, cluster in enumerate(CLUSTERS):
        mae = dense()
        for layer, block in enumerate(LAYERS):
            expert = int(chosen[cluster, layer, 0])
            p = probs[layer, cluster, expert].double() if combine == "prob" else 1.0
            mlp = mae.blocks[block].mlp
            mlp.load_state_dict(model.blocks[block].mlp.experts[expert].state_dict())
            mlp.fc2.weight.data *= p
            mlp.fc2.bias.data *= p
        alone = mae(images[b : b + 1], noise[b : b + 1]).reconstruction.patches_BNP
        assert (together[b : b + 1] - alone).abs().max() < 1e-6


def test_only_experts_on_a_route_learn_and_the_gate_does(images: Tensor, noise: Tensor) -> None:
    model = moce("straight_through", perturbation=0.1)
    chosen = experts_of(model)
    model(images, noise, routing(model, [3] * 6)).reconstruction.loss.backward()
    for layer, block in enumerate(LAYERS):
        for e, expert in enumerate(model.blocks[block].mlp.experts):
            learned = expert.fc1.weight.grad is not None and expert.fc1.weight.grad.abs().max() > 0
            assert learned == (e == chosen[3, layer, 0])
        assert model.gate.weights[layer].grad.abs().max() > 0


def test_noise_reaches_routes_and_losses(images: Tensor, noise: Tensor) -> None:
    model = moce("prob", perturbation=0.5)
    push = torch.zeros(len(LAYERS), M, E)
    push[0, 3, (experts_of(model)[3, 0, 0] + 1) % E] = 100.0
    calm, pushed = (model(images, noise, routing(model, CLUSTERS, given)) for given in (None, push))
    changed = (calm.reconstruction.patches_BNP - pushed.reconstruction.patches_BNP).abs().amax(dim=(1, 2)) > 1e-9
    assert changed.tolist() == [cluster == 3 for cluster in CLUSTERS]
    assert pushed.losses["imbalance"] < calm.losses["imbalance"]


def test_upcycled_experts_are_the_dense_mlp_with_noise_of_the_stated_size() -> None:
    source = {name: p.detach() for name, p in dense().float().named_parameters()}
    shape = ExpertShape(E, LAYERS)
    state = upcycle(source, shape, 0.1, seed=0)
    seen = []
    for name, tensor in source.items():
        block, _, rest = name.removeprefix("blocks.").partition(".mlp.")
        if not (name.startswith("blocks.") and rest and int(block) in LAYERS):
            assert torch.equal(state.pop(name), tensor)
            continue
        for expert in range(E):
            copy = state.pop(f"blocks.{block}.mlp.experts.{expert}.{rest}")
            if rest.endswith("bias"):
                assert torch.equal(copy, tensor)
            else:
                change = (copy - tensor) / tensor.square().mean().sqrt()
                assert change.std().item() == pytest.approx(0.1, rel=0.15) and abs(change.mean().item()) < 0.02
                seen.append(change.flatten())
    assert state == {}
    correlation = torch.corrcoef(torch.stack(seen)) - torch.eye(len(seen))
    assert correlation.abs().max() < 0.2  # no two experts, layers or matrices share their noise


def test_an_expert_s_start_depends_on_seed_layer_and_number_only() -> None:
    source = {name: p.detach() for name, p in dense().float().named_parameters()}
    four = upcycle(source, ExpertShape(4, LAYERS, combine="prob"), 0.1, seed=0)
    backwards = dict(reversed(source.items()))
    torch.manual_seed(123)
    eight = upcycle(backwards, ExpertShape(8, (1, 2), temperature=0.1), 0.1, seed=0)
    other = upcycle(source, ExpertShape(4, LAYERS, combine="prob"), 0.1, seed=1)
    for expert in range(4):
        name = f"blocks.2.mlp.experts.{expert}.fc1.weight"
        assert torch.equal(four[name], eight[name]) and not torch.equal(four[name], other[name])


def test_tokens_on_a_route_show_every_patch_to_the_chosen_experts(images: Tensor) -> None:
    model = moce("prob", perturbation=0.5)
    mae = dense()
    for layer, (block, expert) in enumerate(zip(LAYERS, (3, 1), strict=True)):
        mae.blocks[block].mlp.load_state_dict(model.blocks[block].mlp.experts[expert].state_dict())
        for tensor in (mae.blocks[block].mlp.fc2.weight, mae.blocks[block].mlp.fc2.bias):
            tensor.data *= (0.3, 0.7)[layer]
    found = model.encode(images, nothing_masked(6, 16), model.on_route((3, 1), (0.3, 0.7)))
    x = torch.cat([mae.cls_token.expand(6, -1, -1), mae.patch_embed(images)], dim=1) + mae.pos_embed
    for block in mae.blocks:
        x = block(x)
    assert found.shape == (6, 17, 16)
    assert (found - mae.norm(x)).abs().max() < 1e-6  # combine weights are kept in float32
