"""Training steps of `Trainer.fit` on a fake GPU, in a fake group of 64 processes: the device never waits for the host,
except where a step is recorded or saved.

Tiny models of four blocks, two of them with eight experts (SDR: all, with two). Numbers of waits, copies and kernels do
not depend on widths. Bounds that are not targets are what has been reached, to be lowered with it.

Axes: B images of a micro-batch of a process, T visible tokens, D width.
"""

import pytest

from tests.device.conftest import Found
from tests.device.scenario import WORLD_SIZE

OURS = ("mae", "moce", "moce_accumulated", "moce_ep8", "sdr")
ROUTED = ("moce", "moce_accumulated", "moce_ep8", "sdr")
EVERY = (*OURS, "token_moe")
"""TokenMoE is DeepSpeed's own layer, which reads the loads of its experts from the device."""

TO_DEVICE = {"mae": 1, "moce": 2, "moce_accumulated": 4, "moce_ep8": 2, "sdr": 2, "token_moe": 5}
"""Copies, of "moce_accumulated" for two micro-batches: masks, clusters and the noise of the gate in one; and the plan,
which follows from the table that this noise is a part of. The others of TokenMoE are made in DeepSpeed's layer."""

COLLECTIVES = {"mae": 5, "moce": 9, "moce_accumulated": 9, "moce_ep8": 17, "sdr": 8, "token_moe": 19}
"""Of the device: gradients, their norm, updated weights, and eight exchanges of images."""

BUSY = 10
"""Operators that keep the device busy while the host waits: the layers before the first experts of SDR are as many."""

B, T, D = 8, 5, 64
EXPERT_LAYERS = 2


@pytest.mark.parametrize("model", OURS)
def test_no_wait_leaves_the_device_idle(found: Found, model: str) -> None:
    """Else the device has run all that it was given when the host goes on."""
    assert [wait for wait in found.step(model, "waits") if wait["ahead"] < BUSY] == []


@pytest.mark.parametrize("model", OURS)
def test_the_host_waits_once_for_the_step_before(found: Found, model: str) -> None:
    """For its losses, and for the routes that follow its update, while the device runs the first blocks of this one."""
    [wait] = found.step(model, "waits")
    assert wait["why"] == "Event.synchronize" and wait["ahead"] >= BUSY


def test_token_moe_waits_in_its_layers(found: Found) -> None:
    """Six times in each, and once in the agreement, which comes first: the device has only masks then."""
    layers = found.step("token_moe", "waits", ["forward"])
    assert len(layers) <= 6 * EXPERT_LAYERS and all("sharded_moe" in wait["where"] for wait in layers), layers
    assert len(found.step("token_moe", "waits", ("", "prepare", "backward", "step"))) <= 1


@pytest.mark.parametrize("model", ("moce", "moce_ep8"))
def test_a_route_table_costs_the_device_few_kernels(found: Found, model: str) -> None:
    kernels = found.models[model]["steps"]["ordinary"]["prepare"]["kernels"]
    assert sum(kernels.values()) < 30, kernels


@pytest.mark.parametrize("model", EVERY)
def test_copies_to_the_device(found: Found, model: str) -> None:
    copies = [copy for copy in found.step(model, "copies") if copy["to"] == "cuda"]
    assert len(copies) <= TO_DEVICE[model], copies


@pytest.mark.parametrize("model", OURS)
def test_no_copy_is_from_or_to_pageable_memory(found: Found, model: str) -> None:
    assert [copy for copy in found.step(model, "copies") if not copy["pinned"]] == []


@pytest.mark.parametrize("model", EVERY)
def test_copies_to_the_host(found: Found, model: str) -> None:
    """Losses, and the probabilities of the routes."""
    copies = [copy for copy in found.step(model, "copies") if copy["to"] == "cpu"]
    assert len(copies) == (2 if model in ROUTED else 1), copies


@pytest.mark.parametrize("model", EVERY)
def test_the_ranks_agree_once_on_the_host(found: Found, model: str) -> None:
    """In log2(64) rounds of a few numbers."""
    exchanged = [one for one in found.step(model, "collectives") if one["device"] == "cpu"]
    assert [one["name"] for one in exchanged] == ["send", "recv_"] * 6, exchanged
    assert all(one["bytes"] <= 128 for one in exchanged)


@pytest.mark.parametrize("model", EVERY)
def test_collectives_of_the_device(found: Found, model: str) -> None:
    collectives = [one for one in found.step(model, "collectives") if one["device"] == "cuda"]
    assert len(collectives) <= COLLECTIVES[model], collectives


def test_images_are_exchanged_in_bf16(found: Found) -> None:
    """Each expert layer sends whole images once to their experts and once back, and so do their gradients."""
    forward, backward = (
        [one for one in found.step("moce_ep8", "collectives", [phase]) if one["name"] == "alltoall_base_"]
        for phase in ("forward", "backward")
    )
    assert {one["dtype"] for one in forward + backward} == {"bfloat16"}
    sent, returned = forward[0::2], forward[1::2]
    assert [one["bytes"] for one in sent] == [B * T * D * 2] * EXPERT_LAYERS
    assert sorted(one["bytes"] for one in backward) == sorted(one["bytes"] for one in sent + returned)


@pytest.mark.parametrize("model", ("mae", "moce", "sdr"))
def test_images_of_local_experts_are_not_exchanged(found: Found, model: str) -> None:
    assert not [one for one in found.step(model, "collectives") if "alltoall" in one["name"]]


@pytest.mark.parametrize("model", OURS)
def test_gradients_are_reduced_once_those_of_products_in_bf16(found: Found, model: str) -> None:
    sizes = found.models[model]["sizes"]
    reduced = [one for one in found.step(model, "collectives", ["backward"]) if one["name"] == "allreduce_"]
    in_bf16 = sum(one["bytes"] // 2 for one in reduced if one["dtype"] == "bfloat16")
    in_fp32 = sum(one["bytes"] // 4 for one in reduced if one["dtype"] == "float32")
    assert (in_bf16, in_fp32) == (sizes["products"], sizes["shared"] + sizes["experts"] - sizes["products"])


@pytest.mark.parametrize("model", OURS)
def test_each_process_gathers_what_it_has_updated(found: Found, model: str) -> None:
    """Weights in fp32, a share of the shared ones and of its experts; a few numbers pad each group."""
    sizes, replicas = found.models[model]["sizes"], WORLD_SIZE // (8 if model == "moce_ep8" else 1)
    gathered = [one for one in found.step(model, "collectives", ["step"]) if "allgather" in one["name"]]
    assert {one["dtype"] for one in gathered} == {"float32"}
    numbers = sum(one["bytes"] // 4 for one in gathered)
    assert 0 <= numbers - (sizes["shared"] / WORLD_SIZE + sizes["experts"] / replicas) < 16


@pytest.mark.parametrize("model", OURS)
def test_no_rows_are_summed_in_bf16(found: Found, model: str) -> None:
    """Atomics on a GPU, each of which rounds."""
    assert found.step(model, "low_sums") == []


def test_only_the_first_micro_batch_of_a_step_brings_noise_of_the_gate(found: Found) -> None:
    copies = found.step("moce_accumulated", "copies", [""])  # not the plans, which go there in the forward pass
    first, second = (copy["bytes"] for copy in copies if copy["to"] == "cuda")
    noise = EXPERT_LAYERS * 64 * 8 * 4  # fp32, 64 clusters, 8 experts
    assert first == second + noise


@pytest.mark.parametrize("name", ("recorded", "saved"))
@pytest.mark.parametrize("model", OURS)
def test_a_complete_step_leaves_the_device_idle_for_its_figures_and_routes(found: Found, model: str, name: str) -> None:
    """A record and a checkpoint are of the step just taken: its losses and the norm of its gradient arrive in one copy;
    the routes without noise follow from its update."""
    idle = [wait for wait in found.step(model, "waits", name=name) if wait["ahead"] < BUSY]
    assert len(idle) == (2 if model in ROUTED else 1), idle
    assert {wait["why"] for wait in idle} == {"Event.synchronize"}


@pytest.mark.parametrize("name", ("recorded", "saved", "after_save"))
@pytest.mark.parametrize("model", OURS)
def test_training_copies_no_more_than_figures_and_routes_to_the_host(found: Found, model: str, name: str) -> None:
    """Weights and moments of a checkpoint are copied by its writer."""
    copies = [copy for copy in found.step(model, "copies", name=name) if copy["to"] == "cpu"]
    tables = 0 if model not in ROUTED else 1 if name == "after_save" else 2  # the second without noise
    assert len(copies) == 1 + tables and all(copy["pinned"] for copy in copies), copies


@pytest.mark.parametrize("model", OURS)
def test_the_step_after_a_save_waits_as_any_other(found: Found, model: str) -> None:
    """For its routes. The figures of the step before have been read as it was saved."""
    waits = found.step(model, "waits", name="after_save")
    assert len(waits) == (1 if model in ROUTED else 0) and all(wait["ahead"] >= BUSY for wait in waits), waits


@pytest.mark.parametrize("model", OURS)
def test_the_writer_copies_a_checkpoint_through_pinned_memory(found: Found, model: str) -> None:
    """Beside the training, on a stream of its own, for which it waits once a file."""
    writer = found.models[model]["writer"]
    assert writer["copies"] and all(copy["to"] == "cpu" and copy["pinned"] for copy in writer["copies"])
    assert {wait["why"] for wait in writer["waits"]} == {"Stream.synchronize"}
    assert sum(writer["kernels"].values()) == 0
