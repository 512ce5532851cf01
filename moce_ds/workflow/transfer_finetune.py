"""Fine-tuning as a step of the transfer protocol: `moce finetune` in a process of its own, since it trains."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce_ds.config.values import arguments
from moce_ds.errors import STOPPED, ArtefactError
from moce_ds.launch.logged import log_tail, run_logged
from moce_ds.storage.files import read_json
from moce_ds.workflow.transfer_tasks import Task

_logger = logging.getLogger(__name__)


def finetuned(encoder: Path, task: Task, seed: int, out: Path) -> dict[str, Any]:
    """Fine-tune an encoder on a task, with the best of its choices; returns the record of the test split.

    A choice is judged by the validation split alone. Fine-tuning that was stopped resumes.

    Raises:
        ArtefactError: the process failed; the message has the end of its log.
        KeyboardInterrupt: it was stopped.
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
    """The record of one `moce finetune`, which is run unless it is done."""
    result, log = out / "result.json", out / "log.txt"
    command: list[object] = ["finetune", encoder, "--train", train, "--test", test]
    command += ["--val", val] if val is not None else []
    command += ["--out", out / "run", "--results", result, *words]
    if not result.exists():
        _logger.info(f"fine-tuning: tail -F {log}")
        status = run_logged([sys.executable, "-m", "moce_ds", *arguments(command)], log)
        if status == STOPPED:
            raise KeyboardInterrupt
        if status or not result.exists():
            lines = log_tail(log).splitlines()
            message = "\n  ".join(line.removeprefix("Error: ") for line in lines)
            raise ArtefactError(f"moce finetune ended with status {status} (all of it in {log}):\n  {message}")
    record: dict[str, Any] = read_json(result, "the result of fine-tuning", "moce finetune")[0]
    return record
