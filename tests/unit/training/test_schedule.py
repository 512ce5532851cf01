"""Learning rate and loss weights by step, against the formulas."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moce_ds.training.schedule import Schedule, make_schedule
from moce_ds.training.settings import PretrainSettings


def test_public_recipe(tiny_config: Callable[..., PretrainSettings]) -> None:
    """1.5e-4 x 4096 / 256 = 2.4e-3 after 40 of 800 epochs, half a cosine from there."""
    config = tiny_config("optim.base_lr=1.5e-4", "optim.batch_size=4096", "optim.epochs=800", "optim.warmup_epochs=40")
    schedule = make_schedule(config.optim, num_images=40_960)
    assert (schedule.steps, schedule.warmup_steps) == (8000, 400)
    assert schedule.peak_lr == pytest.approx(2.4e-3)
    assert schedule.lr(0) == 0
    assert schedule.lr(100) == pytest.approx(2.4e-3 / 4)
    assert schedule.lr(400) == pytest.approx(2.4e-3)
    assert schedule.lr(4200) == pytest.approx(1.2e-3)  # half-way down
    assert schedule.lr(6100) == pytest.approx(2.4e-3 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert schedule.lr(8000) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 500), st.integers(0, 500), st.floats(1e-5, 1), st.floats(0, 1))
def test_rises_then_falls_between_its_bounds(steps: int, warmup: int, peak: float, floor: float) -> None:
    warmup, floor = min(warmup, steps), floor * peak
    schedule = Schedule(peak, floor, steps, warmup, 0)
    rates = [schedule.lr(step) for step in range(steps + 1)]
    assert all(a <= b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert max(rates) == pytest.approx(peak) and min(rates[warmup:]) >= floor * (1 - 1e-9)


def test_steps_cover_the_epochs_and_there_is_at_least_one(tiny_config: Callable[..., PretrainSettings]) -> None:
    assert make_schedule(tiny_config("optim.epochs=1").optim, 60).steps == 5
    assert make_schedule(tiny_config("optim.epochs=1").optim, 61).steps == 6
    assert make_schedule(tiny_config("optim.epochs=0.001").optim, 60).steps == 1
    assert make_schedule(tiny_config("optim.epochs=1", "optim.warmup_epochs=7").optim, 60).warmup_steps == 5


def test_imbalance_is_phased_in(tiny_config: Callable[..., PretrainSettings]) -> None:
    schedule = make_schedule(tiny_config("optim.epochs=10").optim, 60, imbalance_start=0.2)
    assert schedule.steps == 50
    assert [schedule.imbalance_share(step) for step in (0, 5, 10, 50)] == [0, 0.5, 1, 1]
    at_once = make_schedule(tiny_config().optim, 60, imbalance_start=0)
    assert at_once.imbalance_share(0) == 1
