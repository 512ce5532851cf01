"""`metrics.jsonl`: one record per line, each with a checksum that depends on the previous one.

        {"attempt":1,"epoch":0.02,...,"step":7,"check":"9f0c..."}

This detects altered, exchanged and removed lines. It also detects lines that were cut off the end, up to the newest
checkpoint: its manifest contains the `check` of the last line at that time. A kill may
leave an incomplete last line; the next start of the run drops it. Earlier versions wrote lines without a checksum; they
may only precede all others.

A long run has many lines: all functions but `read_records` and `read_metrics` hold a few at a time.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.checksums import Findings, written_before
from moce_ds.common.storage.files import reads_from

METRICS = "metrics.jsonl"
_CHECK = "check"
_ATTEMPT, _STEP = re.compile(rb'\{"attempt":(\d+),'), re.compile(rb',"step":(\d+)')  # in lines of this version
_BLOCK = 2**16  # bytes read at a time from the end
_CURE = "restore it from a copy, or move it away: the run then continues without its earlier records."


def sealed(record: Mapping[str, Any], before: str) -> tuple[str, str]:
    """The line of a record, and its checksum; `before` is that of the previous line (empty for the first line).

    The line is the text that the checksum covers, so that readers need not write the record again; earlier versions
    wrote it in another form. Raises ValueError if a number is not finite.
    """
    text = _text(record, allow_nan=False)
    check = _digest(text.encode(), before)
    return f"{text[:-1]}{_seal(check)}", check


def last_check(path: Path) -> str:
    """The checksum that the next line continues; empty if there is none. Raises ArtefactError."""
    if path.is_file():
        with reads_from(path, _CURE):
            for line in _backwards(path):
                record = _record(line)
                if record is not None and _CHECK in record:
                    return str(record[_CHECK])
    return ""


def drop_incomplete_line(path: Path) -> None:
    """Cut off what follows the last line feed, which a kill has left. Raises OSError."""
    with open(path, "rb+") as file:
        incomplete = len(next(_backwards(path)))
        file.truncate(file.seek(0, os.SEEK_END) - incomplete)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in the order of the lines, without their checksums; empty if the file does not exist.

    Lines without a checksum that are not records are ignored.

    Raises:
        ArtefactError: a line is not what was written.
    """
    return list(_intact(path))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records by step, one a step; empty if the file does not exist.

    An attempt (start of the run) replaces earlier attempts' records from its first step on, including those that an
    earlier attempt wrote later. For lines without an attempt, the last line of a step counts.

    Raises:
        ArtefactError: a line is not what was written.
    """
    by_step: dict[int, dict[str, Any]] = {}
    newest = 0
    for record in _intact(path):
        attempt = record.get("attempt", newest)
        if attempt > newest:
            newest = attempt
            by_step = {step: kept for step, kept in by_step.items() if step < record["step"]}
        if attempt == newest:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """The records of `read_metrics` one by one, in constant memory: the file is read twice.

    A file of an earlier version in which a resumed run repeats steps is read as a whole.

    Raises:
        ArtefactError: a line is not what was written.
    """
    course = _course(path)
    if not course.rising:
        yield from read_metrics(path)
        return
    newest = start = 0
    for record in _intact(path, course.lines):
        attempt = record.get("attempt", newest)
        if attempt > newest:
            newest, start = attempt, start + 1
        if attempt == newest and record["step"] < course.end(start):
            yield record


def new_records(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The records of the whole lines after the position of a file that grows; nothing is verified."""
    while (line := file.readline()).endswith(b"\n"):
        if (record := _record(line)) is not None:
            record.pop(_CHECK, None)
            yield record
    file.seek(-len(line), os.SEEK_CUR)


def flat_record(tree: Mapping[str, Any], separator: str = ".") -> Iterator[tuple[str, Any]]:
    """The values of a record under joined names, such as `layers.3.load.0`; all but the step."""
    for key, value in tree.items():
        if isinstance(value, dict | list):
            parts = value if isinstance(value, dict) else {str(i): item for i, item in enumerate(value)}
            yield from ((f"{key}{separator}{name}", item) for name, item in flat_record(parts, separator))
        elif key != "step":
            yield key, value


def verify_metrics(path: Path, marks: Iterable[str]) -> Findings:
    """Differences from what was written. Raises ArtefactError if the file cannot be read.

    Args:
        marks: checksums of lines that must be present, from the manifests of checkpoints.
    """
    lost, faults, checker = set(marks), [], _Checker()
    for line in _checked_lines(path, checker):
        lost.discard(checker.last)
        if line.fault:
            faults.append(f"{METRICS}: {line.fault}")
    if lost and not faults:
        fault = "is missing" if not path.exists() else "lacks records from before the newest checkpoints: it was cut"
        faults = [f"{METRICS}: {fault}"]
    return Findings(faults, [written_before(METRICS)] if checker.unchecked else [])


class _Line(NamedTuple):
    """The record of a line without its checksum, if it is one; and what is wrong with the line."""

    record: dict[str, Any] | None
    fault: str = ""


@dataclass
class _Checker:
    """Checks lines in order; holds what the next one depends on.

    Attributes:
        last: the checksum of the last line that has one; empty before.
        unchecked: lines without a checksum.
    """

    last: str = ""
    unchecked: int = 0
    _of_attempt: dict[str, str] = field(default_factory=dict)

    def take(self, number: int, line: bytes) -> _Line:
        """Check the next line."""
        record, fault = _record(line), ""
        if record is None:
            return _Line(None, f"line {number} is not a record" if self.last and line.endswith(b"\n") else "")
        check = record.pop(_CHECK, None)
        if check is None:
            self.unchecked += 1
            return _Line(record, f"line {number} has no checksum, but earlier lines have one" if self.last else "")
        attempt = str(record.get("attempt"))
        # A line continues the previous one, or, if two attempts wrote at once, that of its own attempt.
        text = line[: -len(seal)] + b"}" if line.endswith(seal := _seal(check).encode()) else _text(record).encode()
        if check not in (_digest(text, before) for before in (self.last, self._of_attempt.get(attempt, self.last))):
            fault = f"line {number} is not what was written after the previous line"
        self.last = self._of_attempt[attempt] = str(check)
        return _Line(record, fault)


@dataclass
class _Course:
    """The lines of a file, the first step of each start after the first, and whether the steps of each start rise."""

    lines: int = 0
    begins: list[int] = field(default_factory=list)
    rising: bool = True

    def end(self, start: int) -> float:
        """The step from which on later starts replace the records of a start."""
        return self._ends[start]

    @cached_property
    def _ends(self) -> list[float]:
        return [min(self.begins[start:], default=float("inf")) for start in range(len(self.begins) + 1)]


def _course(path: Path) -> _Course:
    course, newest, last = _Course(), 0, -1
    for course.lines, line in _numbered(path):
        number, steps = _ATTEMPT.match(line), _STEP.findall(line)
        if number and len(steps) == 1 and line.endswith(b'"}\n'):  # a shortcut for whole lines of this version
            step, attempt = int(steps[0]), int(number[1])
        elif record := _record(line):
            step, attempt = record["step"], record.get("attempt", newest)
        else:
            continue
        if attempt > newest:
            newest, last = attempt, -1
            course.begins.append(step)
        if attempt == newest:
            course.rising &= step > last
            last = step
    return course


def _intact(path: Path, lines: int | None = None) -> Iterator[dict[str, Any]]:
    """The records of the first `lines` lines, or of all. Raises ArtefactError if a line is not what was written."""
    for line in _checked_lines(path, _Checker(), lines):
        if line.fault:
            raise ArtefactError(f"{path} is damaged: {line.fault}: {_CURE}")
        if line.record is not None:
            yield line.record


def _checked_lines(path: Path, checker: _Checker, lines: int | None = None) -> Iterator[_Line]:
    return (checker.take(number, line) for number, line in islice(_numbered(path), lines))


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers; none if it does not exist. Raises ArtefactError."""
    if path.is_file():
        with reads_from(path, _CURE), open(path, "rb") as file:
            yield from enumerate(file, 1)


def _backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first."""
    with open(path, "rb") as file:
        begin, rest = file.seek(0, os.SEEK_END), b""
        while begin:
            end, begin = begin, max(0, begin - _BLOCK)
            file.seek(begin)
            rest, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line with its checksum; None if it is none."""
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("attempt", 0), int):
        return record
    return None


def _text(record: Mapping[str, Any], allow_nan: bool = True) -> str:
    """The text of a record that its checksum covers."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=allow_nan)


def _digest(text: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + text).hexdigest()[:16]


def _seal(check: object) -> str:
    """The end of a line, in place of the last brace of its record."""
    return f',"{_CHECK}":"{check}"}}\n'
