"""The runner on small stages: what it runs, in which order, what it leaves out, and what it keeps on record."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moce_ds.cli.workflow.runner import Outcome, Progress, StageError, run_stages
from moce_ds.cli.workflow.stage import Launch, Stage, StageFile, StageRecord, Workflow
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import LOST_PEER, STOPPED, DataError
from moce_ds.common.host.program import configure_logging
from moce_ds.common.storage.locks import held

Make = Callable[..., Stage]


@pytest.fixture
def ran() -> list[str]:
    """Names of the stages whose work was run, in order."""
    return []


@pytest.fixture
def make(tmp_path: Path, ran: list[str]) -> Make:
    """A stage that notes its name and writes a file; call it with the name, the work and what it needs."""

    def made(name: str, then: Callable[[], object] = dict, source: str = "one", **more: Any) -> Stage:
        def work() -> dict[str, Any]:
            ran.append(name)
            then()
            (tmp_path / f"{name}.txt").write_text(source)
            return {}

        records, lock = StageFile(tmp_path / f"{name}.json"), tmp_path / f".{name}.lock"
        outputs = [tmp_path / f"{name}.txt"]
        return Stage(name, records, lock, lambda: MadeFrom({"source": source}), work, outputs=outputs, **more)

    return made


def run(stages: Sequence[Stage], keep_going: bool = False) -> Outcome:
    return run_stages(stages, Progress(Workflow("test", "stage", Path(), stages)), keep_going)


def state(stage: Stage) -> str | None:
    record = stage.record()
    return record and record.state


def failing() -> None:
    raise DataError("no image")


def test_a_stage_is_run_once_for_what_it_is_made_from(
    make: Make, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    stages = [make("a"), make("b", needs=["a"])]
    assert run(stages).status == 0 and ran == ["a", "b"]
    assert "stage 1 of 2 a ...\nstage 1 of 2 a done in 0 s\nstage 2 of 2 b ...\n" in capsys.readouterr().err
    assert run(stages).status == 0 and ran == ["a", "b"]
    assert capsys.readouterr().err == "stage 1 of 2 a is done\nstage 2 of 2 b is done\n"
    assert run([make("a", source="two"), stages[1]]).status == 0 and ran == ["a", "b", "a"]
    stages[1].outputs[0].unlink()
    assert stages[1].state() == "changed" and run(stages[1:]).status == 0 and ran[3:] == ["b"], "its output was gone"


def test_a_failure_keeps_back_what_needs_it_and_nothing_else(make: Make, ran: list[str]) -> None:
    stages = [make("a", failing), make("b", needs=["a"]), make("c", needs=["b"]), make("d")]
    outcome = run(stages, keep_going=True)
    assert (
        ran == ["a", "d"]
        and outcome.status == 1
        and [state(stage) for stage in stages] == ["failed", None, None, "done"]
    )
    record = stages[0].record()
    assert record is not None and record.message == "no image" and record.seconds >= 0
    (failure,) = outcome.failures
    path = stages[0].records.path
    told = f"Stage a failed: no image\nIts state is in {path}. Rerun the same command to resume."
    assert str(StageError("stage", failure)) == told
    ran.clear()
    stages[0] = make("a")
    assert run(stages, keep_going=True).status == 0 and ran == ["a", "b", "c"]


def test_without_going_on_the_first_failure_is_the_last_stage(make: Make, ran: list[str]) -> None:
    assert run([make("a", failing), make("b")]).status == 1 and ran == ["a"]


def test_a_defect_is_on_record_too(make: Make) -> None:
    stage = make("a", lambda: [][0])
    with pytest.raises(IndexError):
        run([stage])
    assert state(stage) == "failed"


@pytest.mark.parametrize("stop", [lambda: signal.raise_signal(signal.SIGINT), lambda: sys.exit(STOPPED)])
def test_a_stage_that_is_stopped_stays_begun(make: Make, ran: list[str], stop: Callable[[], object]) -> None:
    stages = [make("a", stop), make("b")]
    if stop.__code__.co_names[0] == "sys":  # a command that stops by itself ends the process that it runs in
        with pytest.raises(SystemExit):
            run(stages)
    else:
        outcome = run(stages)
        assert (outcome.status, [stage.name for stage in outcome.stopped]) == (STOPPED, ["a"])
    assert ran == ["a"] and state(stages[0]) == "begun"


def test_a_stage_that_another_process_runs_comes_last(make: Make, ran: list[str], tmp_path: Path) -> None:
    stages = [make("a"), make("b")]
    holding = f"""
import pathlib
from moce_ds.common.storage.locks import held
with held(pathlib.Path({str(stages[0].lock)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert stages[0].state() == "running"
        release = make("b", lambda: other.communicate("\n"))
        assert run([stages[0], release]).status == 0
    assert ran == ["b", "a"]


def test_a_stage_of_its_own_process_has_a_log(make: Make, tmp_path: Path) -> None:
    log = tmp_path / "logs/a.txt"
    for code, status, message in (
        ("print('trained')\nraise SystemExit(3)", 3, "trained"),
        ("import os\nos.kill(os.getpid(), 9)", LOST_PEER, "trained\nThe process was killed by SIGKILL."),
    ):
        stage = replace(make("a"), launch=Launch([sys.executable, "-c", code], log))
        outcome = run([stage])
        record = stage.record()
        assert outcome.status == status and record is not None
        assert (record.state, record.message) == ("failed", message)


def test_the_status_of_several_failures(make: Make, tmp_path: Path) -> None:
    ending = Launch([sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "log.txt")
    (failure,) = run([replace(make("a"), launch=ending)]).failures

    def status(*statuses: int) -> int:
        return Outcome([replace(failure, status=status) for status in statuses]).status

    assert (status(), status(3), status(LOST_PEER, LOST_PEER), status(LOST_PEER, 1)) == (0, 3, LOST_PEER, 1)


def test_what_an_earlier_version_recorded_is_done(make: Make, tmp_path: Path, ran: list[str]) -> None:
    """As commit 878e397 wrote it."""
    stage = make("a")
    stage.outputs[0].write_text("one")
    old = {
        "made_from": {"source": "one"},
        "at": "2026-01-01T00:00:00+00:00",
        "state": "done",
        "seconds": 3.0,
        "told": "",
    }
    stage.records.path.write_text(json.dumps(old))
    assert stage.record() == StageRecord({"source": "one"}, "done", "2026-01-01T00:00:00+00:00", 3.0)
    assert run([stage]).status == 0 and ran == []
    stage.records.write(StageRecord({"source": "one"}, "failed", "now", 1.0, "no image"))
    kept = json.loads(stage.records.path.read_text())
    assert kept.pop("content_sha256") and kept == {
        **old,
        "at": "now",
        "state": "failed",
        "seconds": 1.0,
        "told": "no image",
    }


def test_a_lock_that_is_held_is_seen(make: Make) -> None:
    stage = make("a")
    with held(stage.lock):
        assert stage.state() == "running"
    assert stage.state() == "waiting"
