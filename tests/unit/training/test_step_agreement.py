"""One agreement per step: it carries the totals of the step before, and a fault ends the step."""

import pytest
import torch

from moce_ds.common.errors import DataError
from moce_ds.training.step_agreement import StepAgreement, StepTotals
from tests.examples.alone import ALONE


def totals(step: int, *losses: float) -> StepTotals:
    """Those of a step with one micro-batch for each loss."""
    parts = [{"loss": torch.tensor(loss), "balance": torch.tensor(2 * loss)} for loss in losses]
    return StepTotals(step, parts, shares=len(losses), further={"moved": 0.5}, applied=True, norm=0.25)


def test_a_step_hears_of_the_one_before() -> None:
    agreement = StepAgreement(ALONE, lambda: {"stopping": False})
    agreement.begin(1)
    first = agreement.reach(7)
    assert first is not None and first.totals is None and first.flags == {"stopping": 0}
    assert agreement.reach() is None, "once per step"
    agreement.submit(totals(1, 1.0, 3.0))
    agreement.begin(2)
    second = agreement.reach(7)
    assert second is not None and second.totals is not None and (second.step, second.totals.step) == (2, 1)
    assert second.sums == {"loss": 2.0, "balance": 4.0, "moved": 0.5}
    agreement.submit(totals(2, 5.0))
    last = agreement.reach()
    assert last is not None and last.totals is not None and (last.step, last.totals.step) == (2, 2), "complete at once"


def test_flags_are_asked_when_the_exchange_takes_place() -> None:
    wanted = False
    agreement = StepAgreement(ALONE, lambda: {"stopping": wanted})
    agreement.begin(1)
    wanted = True
    agreed = agreement.reach()
    assert agreed is not None and agreed.flags == {"stopping": 1}


def test_the_first_fault_ends_the_next_exchange() -> None:
    agreement = StepAgreement(ALONE, dict)
    agreement.begin(1)
    agreement.fail(DataError("image 3 is damaged"))
    agreement.fail(DataError("image 4 is damaged"))
    agreement.submit(totals(1, 1.0))
    with pytest.raises(DataError, match="image 3 is damaged"):
        agreement.reach()


def test_a_bug_is_raised_where_it_happens() -> None:
    agreement = StepAgreement(ALONE, dict)
    with pytest.raises(RuntimeError, match="a bug"):
        agreement.fail(RuntimeError("a bug"))


@pytest.mark.parametrize("applied", [True, False])
def test_the_device_may_know_alone_whether_a_step_was_applied(applied: bool) -> None:
    parts, norm = [{"loss": torch.tensor(1.0)}], 0.75 if applied else float("inf")
    known = StepTotals(1, parts, 1, {}, applied, norm)
    on_device = StepTotals(1, parts, 1, {}, torch.tensor(applied), torch.tensor(norm))
    assert known.applied is on_device.applied is applied
    assert known.norm == on_device.norm == norm
    assert known.read() == on_device.read() == {"loss": 1.0}
