"""Fine-tuning as a step of the transfer protocol: `moce finetune` in a process of its own, since it trains."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce_ds.config.values import arguments
from moce_ds.errors import STOPPED, ArtefactError
from moce_ds.host.interrupts import kept_signals, obeyed, wait_for
from moce_ds.storage.files import read_json, writes_to
from moce_ds.workflow.transfer_tasks import Task

_logger = logging.getLogger(__name__)

_TOLD_LINES = 8


def finetuned(encoder: Path, task: Task, seed: int, out: Path) -> dict[str, Any]:
    """Fine-tune an encoder on a task, with the best of its choices; returns the record of the test split.

    A choice is judged by the validation split alone. Begun before, it goes on.

    Raises:
        ArtefactError: the process failed; the end of its log is told.
    """
    words = [*task.config.finetune.words, f"data.metric={task.config.metric}", f"run.seed={seed}"]
    chosen: Sequence[str] = []
    if choices := task.config.finetune.choices:
        figures = [
            _run(encoder, task.train, None, task.val, [*words, *choice], out / f"choice-{number}")[task.config.metric]
            for number, choice in enumerate(choices)
        ]
        chosen = choices[figures.index(max(figures))]
    val = task.val or task.config.finetune.validation_share
    record = _run(encoder, task.train, val, task.test, [*words, *chosen], out / "final")
    return {**record, "settings": {**record["settings"], "chosen": list(chosen)}}


def _run(
    encoder: Path, train: Path, val: Path | float | None, test: Path | None, words: Sequence[str], out: Path
) -> dict[str, Any]:
    """One `moce finetune`; its only record. Signals are passed on to it, so that it stops at a step."""
    result, log = out / "result.json", out / "log.txt"
    command: list[object] = ["finetune", encoder, "--train", train, "--test", test]
    command += ["--val", val] if val is not None else []
    command += ["--out", out / "run", "--results", result, *words]
    if not result.exists():
        _logger.info(f"fine-tuning: tail -F {log}")
        with writes_to(out):
            out.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8") as opened, kept_signals(obeyed()) as asked:
                moce = [sys.executable, "-m", "moce_ds", *arguments(command)]
                # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
                child = subprocess.Popen(moce, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True)
                status = wait_for(child, asked)
        if status == STOPPED or (asked and status):
            raise KeyboardInterrupt
        if status or not result.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TOLD_LINES:]
            told = "\n  ".join(line.removeprefix("Error: ") for line in lines)
            raise ArtefactError(f"moce finetune ended with status {status} (all of it in {log}):\n  {told}")
    record: dict[str, Any] = read_json(result, "the result of fine-tuning", "moce finetune")[0]
    return record
