"""What the device tests rely on: each fault is seen on a fake GPU, and what is no fault is not."""

import pytest

from tests.device.conftest import Found


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("reads_a_number", "a number is read"),
        ("reads_a_list", "a copy to cpu, non_blocking=False, pinned=False"),
        ("decides", "a number is read"),
        ("copies_from_pageable_memory", "a copy to cuda, non_blocking=True, pinned=False"),
        ("makes_a_tensor_of_numbers", "a copy to cuda, non_blocking=False, pinned=False"),
        ("waits_for_a_pinned_copy", "a copy to cuda, non_blocking=False, pinned=True"),
        ("copies_to_pageable_memory", "a copy to cpu, non_blocking=True, pinned=False"),
        ("waits_for_the_device", "torch.cuda.synchronize"),
        ("indexes_from_the_host", "index with indices on the host"),
        ("compares", "the result of equal is read"),
    ],
)
def test_a_wait_is_seen(found: Found, program: str, why: str) -> None:
    [wait] = found.programs[program]["waits"]
    assert wait["why"] == why and wait["ahead"] == 0


def test_a_wait_knows_what_the_device_has_to_run_meanwhile(found: Found) -> None:
    [wait] = found.programs["waits_late"]["waits"]
    assert wait["why"] == "Event.synchronize" and wait["ahead"] == 2


@pytest.mark.parametrize("program", ["sums_in_bf16", "sums_gradients_in_bf16"])
def test_a_sum_in_bf16_is_seen(found: Found, program: str) -> None:
    [seen] = found.programs[program]["low_sums"]
    assert seen.startswith("index_add of [12, 8] to [3, 8]")


def test_a_permutation_is_no_sum(found: Found) -> None:
    assert found.programs["permutes_in_bf16"]["low_sums"] == []


def test_a_collective_is_seen(found: Found) -> None:
    [seen] = found.programs["reduces"]["collectives"]
    assert seen == {"name": "allreduce_", "device": "cuda", "dtype": "bfloat16", "bytes": 12 * 8 * 2}


def test_a_tensor_left_on_the_host_is_refused(found: Found) -> None:
    assert "found at least two devices" in found.programs["mixes_devices"]["error"]
    assert not found.programs["permutes_in_bf16"]["error"]
