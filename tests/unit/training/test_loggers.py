"""Tags and layout of TensorBoard; Weights & Biases and MLflow with the real libraries, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.metrics_file import METRICS
from moce_ds.training import remote_loggers
from moce_ds.training.loggers import check_services, scalars
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.remote_loggers import identity_of
from tests.examples.alone import ALONE

LAYER = {"load": [0.25, 0.75], "load_min": 0.25, "load_max": 0.75, "load_entropy": 0.81, "live": 2, "churn": 0.5}
RECORD = {
    "attempt": 1, "loss": 0.5, "reconstruction": 0.4, "lr": 0.1, "images_per_second": 1.0, "data_wait": 0.0,
    "grad_norm": None, "layers": {"3": LAYER}, "validation": {"top1": 0.9},
}  # fmt: skip
TAGS = {
    "loss/total", "loss/reconstruction", "optim/lr", "time/attempt", "time/images_per_second", "time/data_wait",
    "experts/load/block03/00", "experts/load/block03/01", "experts/load_min/block03", "experts/load_max/block03",
    "experts/load_entropy/block03", "experts/live/block03", "routing/churn/block03", "validation/top1",
}  # fmt: skip


def log(run: RunSettings, *steps: int) -> None:
    """A start of a run that records some steps."""
    lease = RunLease.claim(run.out, ALONE)
    (run.out / "config.yaml").write_text("model: {arch: moce}\nrun: {seed: 0}\n")
    with MetricLogger(lease, run, steps[0] - 1, 40, 16, ALONE) as logger:
        for step in steps:
            logger.metrics({"step": step, **RECORD})


def test_numbers_have_grouped_tags_and_a_layout(tmp_path: Path) -> None:
    assert set(scalars({"step": 1, **RECORD})) == TAGS
    log(RunSettings(out=tmp_path), 1, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == TAGS
    [held] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(held.tensor_proto.string_val[0])
    charts = {f"{c.title}: {chart.title}": list(chart.multiline.tag) for c in layout.category for chart in c.chart}
    assert charts["Load of each expert: block03"] == ["experts/load/block03/.*"]
    assert {"Load of experts: evenness", "Routing: live experts"} < set(charts)


def test_a_missing_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as runs of Weights & Biases leave it in the working directory
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"run.wandb=true: .*pip install 'moce-ds\[wandb\]'"):
        check_services(RunSettings(out=tmp_path, wandb=True))
    check_services(RunSettings(out=tmp_path))


def test_weights_and_biases_offline_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunSettings(out=tmp_path, wandb=True)
    log(run, 1, 2)
    log(run, 2, 3)
    starts = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.stem for path in starts] == [f"run-{identity_of(tmp_path)}"] * 2
    first, second = (path.read_bytes() for path in starts)
    assert all(tag.encode() in first and tag.encode() in second for tag in TAGS)


def test_mlflow_in_a_local_store_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = RunSettings(out=tmp_path / "run", mlflow=True)
    log(run, 1, 2)
    log(run, 2, 3)
    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("moce_ds").experiment_id])
    assert set(found.data.metrics) == TAGS and found.data.params["model.arch"] == "moce"
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss/total")
    assert sorted(metric.step for metric in history) == [1, 2, 2, 3]


def test_a_service_that_fails_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log(RunSettings(out=tmp_path, mlflow=True), 1, 2, 3)
    said = "".join(capfd.readouterr())
    assert said.count("WARNING: ") == 1 and f"{tmp_path}: nothing more is logged to mlflow: " in said
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3]


def test_the_process_of_a_service_ends_with_training(tmp_path: Path) -> None:
    """Also if training is killed: the end of its standard input is all that it waits for."""
    log(RunSettings(out=tmp_path), 1)
    command = [sys.executable, "-m", remote_loggers.__name__, "wandb", str(tmp_path), "0"]
    pytest.importorskip("wandb")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "WANDB_MODE": "offline"})
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert list((tmp_path / "wandb").glob("offline-run-*"))
