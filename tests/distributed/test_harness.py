"""A harness that cannot fail proves nothing: a failing rank, a dying rank and a hanging rank are told apart."""

import os
import signal
import time

import pytest
from harness import WorldError, run_distributed


def rank_and_double(number: int) -> tuple[int, int]:
    return int(os.environ["RANK"]), 2 * number


def misbehave(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise ValueError("rank one is unhappy")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def test_results_come_by_rank() -> None:
    assert run_distributed(rank_and_double, 2, 21) == [(0, 42), (1, 42)]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", "(?s)rank 1 of 2 failed with status 1.*ValueError: rank one is unhappy"),
        ("die", "rank 1 of 2 failed with status -9"),
        ("hang", r"(?s)ranks 1 of 2 were not done after 8 s.*misbehave"),
    ],
)
def test_a_rank_that_misbehaves_is_named(how: str, told: str) -> None:
    with pytest.raises(WorldError, match=told):
        run_distributed(misbehave, 2, how, seconds=8 if how == "hang" else 120)
