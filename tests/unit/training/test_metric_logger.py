"""The progress line of a run, however slow it is."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.storage.metrics_file import METRICS, read_metrics
from moce_ds.training import metric_logger
from moce_ds.training.loggers import Thinned
from moce_ds.training.metric_logger import MetricLogger, progress_line, time_left
from tests.examples.alone import ALONE


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


def test_a_long_run_is_thinned_to_a_resolution() -> None:
    """All records at first; then the gaps grow with the run, whatever the interval of the records."""
    for every in (1, 10):
        thinned = Thinned(8)
        taken = [step for step in range(every, 1000 * every + 1, every) if thinned.takes(step)]
        assert taken[:8] == [every * n for n in range(1, 9)]
        gaps = [(after - before) / after for before, after in pairwise(taken)]
        assert max(gaps[8:]) < 1 / 8 + every / taken[8] and len(taken) < 8 * (1 + math.log(1000 / 8)) + 8
    assert Thinned(8).takes(1000), "the first record of a resumed run"


def test_statistics_of_layers_become_rare_and_tables_of_experts_rarer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_logger, "_TABLES", 8)
    monkeypatch.setattr(metric_logger, "STATISTICS", 16)
    layer = {"load": [0.25, 0.75], "load_min": 0.25, "load_max": 0.75, "load_entropy": 0.81, "live": 2}
    record = {"loss": 0.5, "images_per_second": 1.0, "data_wait": 0.0, "lr": 0.1, "layers": {"3": layer}}
    with MetricLogger(RunLease.claim(tmp_path, ALONE), RunSettings(out=tmp_path), 0, 50, 16, ALONE) as logger:
        for step in range(1, 51):
            logger.metrics({"step": step, **record})
    found = read_metrics(tmp_path / METRICS)
    assert len(found) == 50 and all(r["loss"] == 0.5 for r in found)
    layers = {r["step"]: r["layers"]["3"] for r in found if "layers" in r}
    assert list(layers) == [*range(1, 17), *range(18, 33, 2), *range(35, 48, 3), 50], "and the last"
    assert all(layer["load_max"] == 0.75 for layer in layers.values())
    tables = [step for step, layer in layers.items() if "load" in layer]
    assert tables == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 38, 44, 50]
