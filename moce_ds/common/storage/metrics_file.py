"""`metrics.jsonl`: one record per line, each with a checksum that depends on the previous one.

        {"step": 7, "attempt": 1, "loss": 0.41, ..., "check": "9f0c..."}

This detects altered, exchanged and removed lines. It also detects lines that were cut off the end, up to the newest
checkpoint: its manifest contains the `check` of the last line at that time. A kill may
leave an incomplete last line; the next start of the run drops it. Earlier versions wrote lines without a checksum; they
may only precede all others.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.checksums import Findings, written_before
from moce_ds.common.storage.files import reads_from

METRICS = "metrics.jsonl"
_CHECK = "check"
_CURE = "restore it from a copy, or move it away: the run then continues without its earlier records."


def checked(record: Mapping[str, Any], before: str) -> dict[str, Any]:
    """A record with its checksum; `before` is that of the previous line (empty for the first line)."""
    return {**record, _CHECK: _check(record, before)}


def last_check(path: Path) -> str:
    """The checksum that the next line continues; empty if there is none. Raises ArtefactError."""
    lines = _Lines(path)
    return lines.checks[-1] if lines.checks else ""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in the order of the lines, without their checksums; empty if the file does not exist.

    Lines without a checksum that are not records are ignored.

    Raises:
        ArtefactError: a line is not what was written.
    """
    lines = _Lines(path)
    if lines.faults:
        raise ArtefactError(f"{path} is damaged: {lines.faults[0]}: {_CURE}")
    return lines.records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records by step, one a step; empty if the file does not exist.

    An attempt (start of the run) replaces earlier attempts' records from its first step on, including those that an
    earlier attempt wrote later. For lines without an attempt, the last line of a step counts.

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
    """Differences from what was written. Raises ArtefactError if the file cannot be read.

    Args:
        marks: checksums of lines that must be present, from the manifests of checkpoints.
    """
    lines = _Lines(path)
    lost = set(marks) - set(lines.checks)
    faults = [f"{METRICS}: {fault}" for fault in lines.faults]
    if lost and not faults:
        fault = "is missing" if not path.exists() else "lacks records from before the newest checkpoints: it was cut"
        faults = [f"{METRICS}: {fault}"]
    return Findings(faults, [written_before(METRICS)] if lines.unchecked else [])


class _Lines:
    """The lines of a file, checked in order."""

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
                self.faults.append(f"line {number} is not a record")
            return
        check = record.pop(_CHECK, None)
        if check is None:
            self.unchecked += 1
            if self.checks:
                self.faults.append(f"line {number} has no checksum, but earlier lines have one")
        elif check not in (_check(record, before) for before in self._befores(record)):
            self.faults.append(f"line {number} is not what was written after the previous line")
        if check is not None:
            self.checks.append(str(check))
            self._of_attempt[str(record.get("attempt"))] = str(check)
        self.records.append(record)

    def _befores(self, record: Mapping[str, Any]) -> set[str]:
        """Checksums that a line may continue: that of the previous line, or, if two attempts wrote at once, of its own
        attempt."""
        attempt_check = self._of_attempt.get(str(record.get("attempt")))
        return {self.checks[-1] if self.checks else "", *([attempt_check] if attempt_check else [])}


def _check(record: Mapping[str, Any], before: str) -> str:
    text = before + json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
