"""A real pipeline of tiny runs: killed and finished by the same command; a stage that fails, and is stopped."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from launching import SECONDS, launched, run_to_end, send, wait_for_step, wait_until
from tiny_pipeline import write_pipeline
from tiny_run import STEPS, TinyData, write_images

from moce_ds.checkpoint.format import steps_of
from moce_ds.cli.workflow.stage import Stage, StageRecord
from moce_ds.common.errors import STOPPED
from moce_ds.common.storage.locks import is_held
from moce_ds.common.storage.metrics_file import read_metrics

PIPELINE = (sys.executable, "-m", "moce_ds", "pipeline")


def record_of(stage: Stage) -> StageRecord:
    record = stage.record()
    assert record is not None
    return record


def processes_of(pipeline: subprocess.Popen[str]) -> list[int]:
    """A pipeline's process, and those of the stage that it runs."""
    children = Path(f"/proc/{pipeline.pid}/task/{pipeline.pid}/children")
    return [pipeline.pid, *map(int, children.read_text().split())]


def test_a_killed_pipeline_is_finished_by_the_same_command(tmp_path: Path) -> None:
    for part, count in (("images", 90), ("task/train", 60), ("task/test", 30)):
        write_images(tmp_path / part, count)
    path, out = tmp_path / "pipeline.yaml", tmp_path / "pipeline"
    task = str(tmp_path / "task")
    given = {"images": str(tmp_path / "images"), "tasks": {"some": task}, "heldout": f"{task}/test"}
    stages = write_pipeline(path, **given, processes=1, reconstruction=True)
    with launched(*PIPELINE, path) as pipeline:
        wait_for_step(out / "moce", 1)
        send(signal.SIGKILL, *processes_of(pipeline))
        wait_until(lambda: not is_held(stages["moce"].lock))
    finished = ("shards", "mae", "features", "clusters")
    kept = {name: record_of(stages[name]) for name in finished}
    assert [record.state for record in kept.values()] == ["done"] * 4
    assert record_of(stages["moce"]).state == "begun" and stages["export"].record() is None

    status, output = run_to_end(*PIPELINE, path)
    assert status == 0 and "Traceback" not in output, output
    assert all(f"{name} is done" in output for name in finished)
    ran = " ".join(re.findall(r"^\$ moce (\w+)", output, re.MULTILINE))
    assert ran == "pretrain shards shards select knn probe knn probe evaluate evaluate report"
    assert "7 of 7 stages done" in output
    assert {name: record_of(stages[name]) for name in finished} == kept
    assert all(stage.is_done() for stage in stages.values())
    assert [len(read_metrics(out / run / "metrics.jsonl")) for run in ("mae", "moce")] == [STEPS] * 2
    found = {(r["verb"], r["task"], r.get("model")) for r in json.loads((out / "results.json").read_text())}
    measured = {(verb, "some", model) for verb in ("knn", "probe") for model in ("dense", "expert")}
    evaluated = {("evaluate", name, "moce") for name in ("some", "held out")}
    assert found == measured | {("select", "some", None)} | evaluated
    page = (out / "report.html").read_text()
    assert ">some</td>" in page and "Images of some and their reconstructions by moce" in page


def test_a_parallel_stage_fails_with_its_reason_and_stops_as_asked(tiny_data: TinyData, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    mae = write_pipeline(path, shards=str(tiny_data.shards))["mae"]
    status, output = run_to_end(*PIPELINE, path, "words.mae=[run.init_from=none]")
    assert status == 1 and output.count("Error:") == 1 and "Traceback" not in output, output
    assert f"Error: Stage mae failed: run.init_from: none not found.\n  Its state is in {mae.records.path}" in output
    assert (record_of(mae).state, record_of(mae).message) == ("failed", "run.init_from: none not found.")

    run = tmp_path / "pipeline" / "mae"
    with launched(*PIPELINE, path) as pipeline:
        wait_for_step(run, 2)
        pipeline.send_signal(signal.SIGINT)
        output, _ = pipeline.communicate(timeout=SECONDS)
    assert pipeline.returncode == STOPPED, output
    assert "Stopped as asked in stage mae. Rerun the same command to resume." in output
    assert record_of(mae).state == "begun" and steps_of(run)[0] < STEPS and not is_held(mae.lock)
