"""Series that are reduced while they are read: bounded, and true to what every record says."""

import json
from pathlib import Path

import numpy as np
import pytest

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage import metrics_series
from moce_ds.common.storage.metrics_series import Series


def write(path: Path, values: list[float | None]) -> Path:
    """Records with a number, and every third with a vector."""
    with open(path, "w") as file:
        for step, value in enumerate(values, 1):
            record: dict[str, object] = {"step": step, "loss": value, "note": "text", "layers": {"3": {"live": 4}}}
            if step % 3 == 0:
                record["layers"] = {"3": {"live": 4, "load": [step, 1.0]}}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize("held", [1, 5, 64])
def test_a_reduced_series_is_made_of_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, held: int
) -> None:
    monkeypatch.setattr(metrics_series, "BUCKETS", 4)
    monkeypatch.setattr(metrics_series, "_HELD", held)
    values = np.random.default_rng(count).normal(size=count)
    series = Series.read(write(tmp_path / "metrics.jsonl", values.tolist()))
    assert series.last is not None and series.last["step"] == count
    found = series.at("loss")
    stride = 1
    while len(range(0, count, stride)) > 8:
        stride *= 2
    starts = range(0, count, stride)
    for start, step, mean, low, high in zip(starts, *found, strict=True):
        part = values[start : start + stride]
        assert (low, high) == (part.min(), part.max())
        assert mean == pytest.approx(part.mean()) and step == pytest.approx(start + (len(part) + 1) / 2)
    if count >= 3:
        load = series.at("layers", "3", "load")
        assert load.mean_P.shape == (len(load.steps_P), 2) and len(load.steps_P) <= 8
        np.testing.assert_allclose(load.mean_P[:, 0], load.steps_P)
        np.testing.assert_allclose(load.mean_P[:, 1], 1)


def test_values_that_are_missing_or_not_finite_are_left_out(tmp_path: Path) -> None:
    found = Series.read(write(tmp_path / "metrics.jsonl", [1.0, None, float("inf"), 2.0])).at("loss")
    assert found.steps_P.tolist() == [1, 4] and found.mean_P.tolist() == [1, 2]


def test_what_is_not_there_is_empty(tmp_path: Path) -> None:
    series = Series.read(tmp_path / "metrics.jsonl")
    assert series.last is None and list(series) == [] and not len(series.at("loss").steps_P)
    series = Series.read(write(tmp_path / "metrics.jsonl", [1.0] * 3))
    assert set(series) == {("step",), ("loss",), ("layers", "3", "live"), ("layers", "3", "load")}


@pytest.mark.parametrize("values", [[[1.0], 2.0], [[1.0], [1.0, 2.0]], [["a"], ["b"]], [[{}], [{}]]])
def test_values_of_several_kinds_are_named(tmp_path: Path, values: list[object]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "odd": {"key": value}}) + "\n" for i, value in enumerate(values)))
    with pytest.raises(ArtefactError, match=r"metrics.jsonl: the values of odd\.key are not numbers"):
        Series.read(path)
