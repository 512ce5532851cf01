"""Two live writers of one run folder: a job that goes on after its successor has begun finds that it is over."""

import json
import signal
import subprocess
import time
from pathlib import Path

from launching import SECONDS, launched, local, ranks_of, send, wait_for_step, wait_until
from tiny_run import TinyData, tiny_settings

from moce_ds.checkpoint.format import Checkpoint, step_folder, steps_of
from moce_ds.common.storage.metrics_file import read_metrics

STEPS = 90  # so many that the second is still at it when the first wakes up


def stop_while_saving(launcher: subprocess.Popen[str], run: Path) -> list[int]:
    """Stop all processes of a run at a moment at which a checkpoint is being written; returns their numbers."""
    pids = [*ranks_of(launcher).values(), launcher.pid]
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        wait_until(lambda: any(run.glob("attempts/0001/step-*")))
        send(signal.SIGSTOP, *pids)
        if any(run.glob("attempts/0001/step-*")) and not any(run.glob("attempts/0001/step-*/manifest.json")):
            return pids
        send(signal.SIGCONT, *pids)
    raise AssertionError("was never seen saving")


def test_the_older_of_two_writers_ends_and_leaves_no_trace(tiny_data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny_settings(
        tiny_data.shards,
        run,
        f"optim.epochs={STEPS * 16 / 90}",
        "experts.ep_size=2",
        "run.checkpoint_every=1",
        f"run.keep_checkpoints={STEPS}",
        clusters=tiny_data.clusters,
    )
    with launched(*local(2, "--max-restarts", "1"), "pretrain", *words) as first:
        wait_for_step(run, 3)
        stopped = stop_while_saving(first, run)
        with launched(*local(2), "pretrain", *words) as second:
            wait_until(lambda: (run / "attempts/0002").exists())
            begun_after = max(steps_of(run))
            wait_for_step(run, begun_after + 3, attempt=2)
            send(signal.SIGCONT, *stopped)
            told, _ = first.communicate(timeout=SECONDS)
            assert second.poll() is None, "they were at it at the same time"
            output, _ = second.communicate(timeout=SECONDS)

    assert first.returncode == 1 and "Restart" not in told, told
    assert told.count(f"another process has taken over {run} (this was attempt 1)") == 1, told
    assert "Traceback" not in told and told.count("Error:") == 1, told
    assert second.returncode == 0, output
    assert f"Resuming {run} after step {begun_after}." in output

    attempts = {step: Checkpoint.open(step_folder(run, step)).manifest["attempt"] for step in steps_of(run)}
    assert attempts == {step: 1 if step <= begun_after else 2 for step in range(1, STEPS + 1)}
    assert [fault for step in attempts for fault in Checkpoint.open(step_folder(run, step)).faults()] == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["attempt"] == 2] == list(range(begun_after + 1, STEPS + 1))
    assert [line["attempt"] for line in lines] == sorted(line["attempt"] for line in lines), "nothing came in between"
    records = read_metrics(run / "metrics.jsonl")
    assert [(record["step"], record["attempt"]) for record in records] == sorted(attempts.items())
    assert sorted(path.name for path in (run / "attempts").iterdir()) == ["0001.json", "0002", "0002.json"]
    assert not list((run / "attempts/0002").iterdir())
