"""`metrics.jsonl`: one record a line, each with a checksum that continues the one of the line before.

    {"step": 7, "attempt": 1, "loss": 0.41, ..., "check": "9f0c..."}

So a line that was altered, exchanged or taken out is noticed, and so are lines cut off the end, where a checkpoint was
written after them: its manifest holds the `check` of the last line of then. Half a last line is what a kill leaves; the
next start of the run drops it. Earlier versions wrote lines without a checksum; they may only stand before all others.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moce_ds.errors import ArtefactError
from moce_ds.storage.checksums import Findings, written_before
from moce_ds.storage.files import reads_from

METRICS = "metrics.jsonl"
_CHECK = "check"
_CURE = "restore it from a copy, or move it away: the run goes on without the records of its past."


def checked(record: Mapping[str, Any], before: str) -> dict[str, Any]:
    """A record with its checksum, where that of the line before is `before` (empty: there is none)."""
    return {**record, _CHECK: _check(record, before)}


def last_check(path: Path) -> str:
    """The checksum that the next line continues; empty where there is none. Raises ArtefactError."""
    found = _Lines(path)
    return found.checks[-1] if found.checks else ""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in the order of the lines, without their checksums; none where there is no file.

    Lines without a checksum that are no record are ignored.

    Raises:
        ArtefactError: a line is not what was written.
    """
    found = _Lines(path)
    if found.faults:
        raise ArtefactError(f"{path} is damaged: {found.faults[0]}: {_CURE}")
    return found.records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records by step, one a step; none where there is no file.

    An attempt (start of the run) takes back what earlier ones recorded from its own first record on, also where an
    earlier one wrote on after it had begun; without attempts, the later line counts.

    Raises:
        ArtefactError: a line is not what was written.
    """
    by_step: dict[int, dict[str, Any]] = {}
    newest = 0
    for record in read_records(path):
        attempt = record.get("attempt", newest)
        if attempt > newest:
            newest = attempt
            by_step = {step: kept for step, kept in by_step.items() if step < record["step"]}
        if attempt == newest:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def verify_metrics(path: Path, marks: Iterable[str]) -> Findings:
    """What is not as it was written. Raises ArtefactError where the file cannot be read.

    Args:
        marks: checksums of lines that must be there, from the manifests of checkpoints.
    """
    found = _Lines(path)
    lost = set(marks) - set(found.checks)
    faults = [f"{METRICS}: {fault}" for fault in found.faults]
    if lost and not faults:
        there = "is missing" if not path.exists() else "lacks records from before the newest checkpoints: it was cut"
        faults = [f"{METRICS}: {there}"]
    return Findings(faults, [written_before(METRICS)] if found.unchecked else [])


class _Lines:
    """The lines of a file, checked one after the other."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self.checks: list[str] = []
        self.faults: list[str] = []
        self.unchecked = 0
        self._of_attempt: dict[Any, str] = {}
        if not path.is_file():
            return
        with reads_from(path, _CURE):
            text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            self._take(number, line)

    def _take(self, number: int, line: str) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or "step" not in record:
            if self.checks and line.endswith("\n"):
                self.faults.append(f"line {number} is no record")
            return
        check = record.pop(_CHECK, None)
        if check is None:
            self.unchecked += 1
            if self.checks:
                self.faults.append(f"line {number} has no checksum, and lines before it have one")
        elif check not in (_check(record, before) for before in self._befores(record)):
            self.faults.append(f"line {number} is not what was written after the line before it")
        if check is not None:
            self.checks.append(str(check))
            self._of_attempt[str(record.get("attempt"))] = str(check)
        self.records.append(record)

    def _befores(self, record: Mapping[str, Any]) -> set[str]:
        """What a line may continue: the line before, or, where two attempts wrote side by side, that of its own."""
        own = self._of_attempt.get(str(record.get("attempt")))
        return {self.checks[-1] if self.checks else "", *([own] if own else [])}


def _check(record: Mapping[str, Any], before: str) -> str:
    text = before + json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
