"""`metrics.jsonl`: which of several records of one step counts. `tests/test_every_harm.py` harms its lines."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.metrics_file import (
    drop_incomplete_line,
    each_record,
    last_check,
    read_metrics,
    sealed,
    verify_metrics,
)


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}, {"step": 3, "loss": 0.8}, {"step": 2, "loss": 0.7}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.7}, {"step": 3, "loss": 0.8}]


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(attempt, step) of each line: starts that resume somewhere before the end of the one before, and late lines of
    older ones."""
    lines: list[tuple[int, int]] = []
    last = 0
    for attempt in range(1, draw(st.integers(1, 4)) + 1):
        begin = draw(st.integers(1, last + 1))
        steps = range(begin, begin + draw(st.integers(0, 6)))
        lines += [(attempt, step) for step in steps]
        last = max([last, *steps])
        if attempt > 1 and draw(st.booleans()):
            lines.append((attempt - 1, last + 3))
    return lines


def write_lines(path: Path, lines: list[tuple[int, int]]) -> str:
    check = ""
    with open(path, "w") as file:
        for number, (attempt, step) in enumerate(lines):
            line, check = sealed({"step": step, "attempt": attempt, "number": number}, check)
            file.write(line)
    return check


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=runs())
def test_records_one_by_one_are_those_of_the_whole_file(tmp_path: Path, lines: list[tuple[int, int]]) -> None:
    path = tmp_path / "metrics.jsonl"
    check = write_lines(path, lines)
    assert list(each_record(path)) == read_metrics(path)
    assert last_check(path) == check
    with open(path, "a") as file:
        file.write('{"attempt":9,"number":7,"step":1')
    assert list(each_record(path)) == read_metrics(path) and last_check(path) == check
    drop_incomplete_line(path)
    assert write_lines(tmp_path / "again", lines) == check and (tmp_path / "again").read_text() == path.read_text()


def test_lines_in_the_form_of_an_earlier_version_have_the_same_checksum(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    check = write_lines(path, [(1, 1), (1, 2), (2, 2)])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"step": r["step"], **r}) + "\n" for r in records))
    assert [record["number"] for record in each_record(path)] == [0, 2]
    assert last_check(path) == check and verify_metrics(path, [check]).faults == []
    path.write_text(path.read_text().replace('"number": 1', '"number": 3'))
    assert len(verify_metrics(path, [check]).faults) == 1


def test_records_of_an_earlier_version_that_repeat_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "place": i}) + "\n" for i, step in enumerate([1, 2, 3, 2])))
    assert list(each_record(path)) == read_metrics(path)
    assert [record["place"] for record in each_record(path)] == [0, 3, 2]


def test_the_last_checksum_is_found_in_a_file_of_many_blocks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    check = write_lines(path, [(1, step) for step in range(1, 1200)])
    with open(path, "a") as file:
        file.write('{"step": 1200, "long": "' + "x" * 100_000)
    assert last_check(path) == check
    drop_incomplete_line(path)
    assert path.read_text().endswith(f'{check}"}}\n')


def test_one_altered_record_stops_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [(1, step) for step in range(1, 9)])
    path.write_text(path.read_text().replace('"number":4', '"number":5'))
    read = each_record(path)
    assert [next(read)["step"] for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ArtefactError, match="line 5 is not what was written after the previous line"):
        next(read)
