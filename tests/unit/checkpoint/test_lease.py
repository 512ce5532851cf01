"""Who may write into a run folder: claims that race, an attempt that is over, and records of several attempts."""

import builtins
import errno
import json
import multiprocessing
import os
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moce_ds import __version__
from moce_ds.checkpoint.format import (
    ROUTING,
    WEIGHTS,
    find,
    grouped,
    step_folder,
    steps_of,
    write_checkpoint,
    write_files,
)
from moce_ds.checkpoint.lease import METRICS, RunLease, SupersededError
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.errors import LOST_PEER, ArtefactError
from moce_ds.common.storage.files import writes_to
from moce_ds.common.storage.metrics_file import read_metrics
from tests.examples.alone import ALONE

WEIGHT = {"cls_token": torch.ones(3)}
ROUTES = RoutingTable(6, (1,), np.zeros((1, 1), np.int64), np.ones((1, 1, 1)), np.ones(1))


def claim(run: Path) -> RunLease:
    return RunLease.claim(run, ALONE)


def live(attempts: list[RunLease]) -> list[int]:
    return [attempt.number for attempt in attempts if not attempt.superseded]


def test_a_new_attempt_ends_the_one_before(tmp_path: Path) -> None:
    first = claim(tmp_path)
    assert first.number == 1 and not first.superseded
    assert json.loads((tmp_path / "attempts/0001.json").read_text())["pid"] == os.getpid()
    record = RunFolder.open(tmp_path).attempts[1]
    assert (record.host, record.version, record.processes) == (socket.gethostname(), __version__, 1)
    assert record.device == "CPU" and record.command[1:] == sys.argv[1:] and "/" not in record.command[0]
    second = claim(tmp_path)
    assert second.number == 2 and first.superseded and not second.superseded
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["0001.json", "0002", "0002.json"]
    message = rf"Step 7: another process has taken over {tmp_path} \(this was attempt 1\)"
    with pytest.raises(SupersededError, match=message), first.writing(7):
        pytest.fail("must not be reached")


def test_an_attempt_that_ends_while_it_writes_says_so(tmp_path: Path) -> None:
    first = claim(tmp_path)
    with pytest.raises(SupersededError, match="Step 3: another process has taken over"), first.writing(3):
        claim(tmp_path)
        first.draft(3).mkdir()


def test_another_failure_is_no_take_over(tmp_path: Path) -> None:
    message, attempt = rf"{tmp_path} cannot be written to at step 3: .*No space left", claim(tmp_path)
    with pytest.raises(ArtefactError, match=message), attempt.writing(3):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("number", "status"), [(errno.ESTALE, LOST_PEER), (errno.ENOSPC, 1)])
def test_a_failure_that_may_pass_keeps_its_status(tmp_path: Path, number: int, status: int) -> None:
    attempt = claim(tmp_path)
    with (
        pytest.raises(ArtefactError, match=os.strerror(number)) as caught,
        attempt.writing(3),
        writes_to(tmp_path / "x"),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.status == status and ArtefactError.status == 1


def test_a_file_is_replaced_by_the_owner_only(tmp_path: Path) -> None:
    path, first = tmp_path / "pictures/routing.json", claim(tmp_path)
    with first.file(path, step=1) as draft:
        draft.write_text("of the first")
    with pytest.raises(SupersededError), first.file(path, step=2) as draft:
        draft.write_text("of the first, late")
        second = claim(tmp_path)
    assert path.read_text() == "of the first"
    with second.file(path, step=2) as draft:
        draft.write_text("of the second")
    assert path.read_text() == "of the second"
    assert not list(second.folder.iterdir())


def test_lines_of_an_older_attempt_go_where_nobody_reads(tmp_path: Path) -> None:
    metrics = tmp_path / METRICS
    claim(tmp_path)
    with open(metrics, "a") as kept_open:
        kept_open.write('{"step": 1}\n{"step": 2')
        kept_open.flush()
        claim(tmp_path)
        kept_open.write("}\n")
    assert metrics.read_text() == '{"step": 1}\n', "nor is half a line continued"


def test_metrics_are_not_replaced_by_a_claim_that_is_over(tmp_path: Path) -> None:
    """As after a SIGSTOP in the middle of a claim."""
    first = claim(tmp_path)
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    claim(tmp_path)
    with open(tmp_path / METRICS, "a") as of_the_second:
        with pytest.raises(SupersededError):
            first._take_over()
        of_the_second.write('{"step": 2}\n')
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 2]


def claim_often(run: Path, times: int) -> list[RunLease]:
    """Attempts of one process, without those that were taken over while they were claimed."""
    claimed = []
    for _ in range(times):
        try:
            claimed.append(claim(run))
        except SupersededError:
            continue
    return claimed


def check_race(run: Path, claimed: list[RunLease]) -> None:
    """Each attempt was of one process, and at most the newest of all still has its folder."""
    numbers = [attempt.number for attempt in claimed]
    assert len(set(numbers)) == len(numbers)
    left = [int(path.name) for path in (run / "attempts").iterdir() if path.name.isdigit()]
    assert len(left) <= 1 and live(claimed) == [number for number in left if number in numbers]
    assert not left or left[0] >= max(numbers)
    newest = claim(run)
    assert newest.number > max(numbers) and live([*claimed, newest]) == [newest.number]


def test_of_claims_that_race_one_is_left(tmp_path: Path) -> None:
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            check_race(tmp_path, [a for part in pool.map(claim_often, [tmp_path] * 4, [5] * 4) for a in part])


def test_of_processes_that_race_one_is_left(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        check_race(tmp_path, [a for part in pool.starmap(claim_often, [(tmp_path, 25)] * 4) for a in part])


@pytest.mark.parametrize("late", [".json", ""], ids=["its number", "its folder"])
def test_a_claim_that_was_slow_is_not_taken_for_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """Two others claim the run, and the second clears away what is older, before the slow one has made ..."""
    slow, new = tmp_path / f"attempts/0001{late}", RunLease(tmp_path, 0)
    plain_open, plain_mkdir = builtins.open, Path.mkdir

    def meanwhile(path: object) -> None:
        nonlocal new
        if path == slow:
            monkeypatch.undo()
            claim(tmp_path)
            new = claim(tmp_path)

    def slow_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        meanwhile(path)
        return plain_open(path, *args, **kwargs)

    def slow_mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        meanwhile(path)
        plain_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", slow_open)
    monkeypatch.setattr(Path, "mkdir", slow_mkdir)
    claimed = claim(tmp_path)
    assert new.superseded and claimed.number > new.number and not claimed.superseded
    assert [path.name for path in (tmp_path / "attempts").iterdir() if path.is_dir()] == [claimed.folder.name]


def saver_with_draft(run: Path, step: int) -> tuple[CheckpointManager, RunLease, dict]:
    """A saver whose draft of a step is written but not published."""
    attempt = claim(run)
    saver = CheckpointManager(None, RunSettings(out=run, keep_checkpoints=1), attempt, ALONE)
    saver._manifest = {"step": step, "routing": ROUTES}
    attempt.draft(step).mkdir()
    return saver, attempt, write_files(attempt.draft(step), grouped(WEIGHTS, WEIGHT).items())


def test_the_owner_publishes(tmp_path: Path) -> None:
    write_checkpoint(step_folder(tmp_path, 4), WEIGHT, {}, {"step": 4})
    saver, attempt, files = saver_with_draft(tmp_path, 6)
    (tmp_path / "routing.json").write_text("{}")  # of an earlier version
    saver._publish(attempt.draft(6), files)
    assert steps_of(tmp_path) == [6] and find(tmp_path).faults() == []
    assert (tmp_path / ROUTING).read_bytes() == (step_folder(tmp_path, 6) / ROUTING).read_bytes()
    assert RoutingTable.read(tmp_path / ROUTING).step == 6 and not (tmp_path / "routing.json").exists()


def test_an_attempt_that_is_over_publishes_nothing(tmp_path: Path) -> None:
    write_checkpoint(step_folder(tmp_path, 4), WEIGHT, {}, {"step": 4})
    saver, attempt, files = saver_with_draft(tmp_path, 6)
    owner = claim(tmp_path)
    with pytest.raises(SupersededError, match="Step 6: another process has taken over"):
        saver._publish(attempt.draft(6), files)
    assert steps_of(tmp_path) == [4], "nor is anything removed"
    assert not attempt.folder.exists() and not (tmp_path / ROUTING).exists()
    assert not list(owner.folder.iterdir())


def test_an_attempt_that_ends_while_it_publishes_has_published_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken over between the question who owns the run and the rename: there the rename itself decides."""
    saver, attempt, files = saver_with_draft(tmp_path, 6)
    rename = Path.rename

    def rename_late(self: Path, target: Path) -> Path:
        if self == attempt.draft(6):
            monkeypatch.setattr(Path, "rename", rename)
            claim(tmp_path)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    with pytest.raises(SupersededError, match="Step 6: another process has taken over"):
        saver._publish(attempt.draft(6), files)
    assert steps_of(tmp_path) == [] and not attempt.folder.exists()


def test_a_run_folder_that_has_gone_is_not_made_again(tmp_path: Path) -> None:
    saver, attempt, files = saver_with_draft(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(SupersededError):
        saver._publish(attempt.draft(6), files)
    assert not (tmp_path / "run").exists()


def written(folder: Path, *lines: object) -> list[tuple[int, float]]:
    """Step and loss of the records that are read from such lines; tuples are (step, attempt, loss)."""
    texts = []
    for line in lines:
        if isinstance(line, tuple):
            step, attempt, loss = line
            line = json.dumps({"step": step, "loss": loss} | ({"attempt": attempt} if attempt else {}))
        texts.append(line)
    (folder / METRICS).write_text("\n".join(texts))
    return [(record["step"], record["loss"]) for record in read_metrics(folder / METRICS)]


@pytest.mark.parametrize(
    ("lines", "read"),
    [
        pytest.param([(1, 0, 0.1), (2, 0, 0.2), (2, 0, 0.3)], [(1, 0.1), (2, 0.3)], id="without attempts"),
        pytest.param([(1, 1, 0.1), (2, 1, 0.2), (2, 2, 0.3)], [(1, 0.1), (2, 0.3)], id="resumed"),
        pytest.param([(1, 1, 0.1), (2, 1, 0.2), (3, 1, 0.3), (2, 2, 0.4)], [(1, 0.1), (2, 0.4)], id="taken back"),
        pytest.param(
            [(1, 1, 0.1), (2, 1, 0.2), (2, 2, 0.3), (3, 1, 0.4), (3, 2, 0.5), (4, 1, 0.6)],
            [(1, 0.1), (2, 0.3), (3, 0.5)],
            id="two writers at once",
        ),
        pytest.param(
            [(1, 1, 0.1), (5, 2, 0.5), (2, 3, 0.2), (6, 2, 0.6), (3, 1, 0.7)], [(1, 0.1), (2, 0.2)], id="three attempts"
        ),
        pytest.param([(1, 0, 0.1), (2, 0, 0.2), (2, 1, 0.3)], [(1, 0.1), (2, 0.3)], id="begun without attempts"),
        pytest.param([(1, 1, 0.1), '{"step": 2, "att'], [(1, 0.1)], id="half a last line"),
        pytest.param([(1, 1, 0.1), '{"step": 2, {"step": 2}', (2, 2, 0.2)], [(1, 0.1), (2, 0.2)], id="half inside"),
    ],
)
def test_each_step_is_read_once(tmp_path: Path, lines: list[object], read: list[tuple[int, float]]) -> None:
    assert written(tmp_path, *lines) == read
