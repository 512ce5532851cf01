"""The progress line of a run, however slow it is."""

import pytest

from moce_ds.training.metric_logger import progress_line, time_left


@pytest.mark.parametrize(
    ("rate", "told"),
    [(1234.5, "1234 img/s"), (9.876, "9.88 img/s"), (0.1, "0.10 img/s"), (0.0042, "0.0042 img/s"), (0.0, "0 img/s")],
)
def test_the_rate_is_told_with_two_digits_at_least(rate: float, told: str) -> None:
    record = {"loss": 1.0, "images_per_second": rate, "data_wait": 0.5, "lr": 1e-4}
    assert progress_line(record) == f"loss 1.0000 {told} wait 50% lr 1.0e-04"


def test_the_time_left() -> None:
    assert time_left(7200, 2.0) == "1:00:00"
    assert time_left(7200, 0.0) == "?"
