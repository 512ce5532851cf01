"""`moce doctor` prints a line for each check, or one document, and its status says whether there is a fault."""

import json

import pytest

from moce_ds.doctor import checkup
from moce_ds.doctor.finding import Finding, Status, fault, warning
from tests.examples.moce_command import run_here

FINE, ODD = Finding("Python", "3.11"), warning("open files", "256 for each process", "`ulimit -n 4096`.")
BAD = fault("GPUs", "PyTorch sees no GPU, but nvidia-smi lists 2 GPUs " + "x" * 80, "Install torch for CUDA 12.")


@pytest.fixture(params=[(FINE, ODD), (FINE, ODD, BAD)], ids=["no fault", "a fault"])
def found(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """Findings on a described machine."""
    monkeypatch.setattr(checkup, "findings", lambda folder: iter(request.param))
    return list(request.param)


def test_lines_and_status(found: list[Finding]) -> None:
    said = run_here("doctor")
    lines = [line.rstrip() for line in said.out.splitlines()]
    assert lines[0] == "ok       Python         3.11"
    assert lines[1] == "warning  open files     256 for each process. `ulimit -n 4096`."
    assert max(map(len, lines)) <= 100
    assert said.status == (BAD in found) and lines[-1] == f"{'1 fault' if BAD in found else '0 faults'}, 1 warning."
    assert ("fault    GPUs" in said.out) == (BAD in found)


def test_one_document(found: list[Finding]) -> None:
    said = run_here("doctor", "--json")
    document = json.loads(said.out)
    assert said.status == (BAD in found) == document["faults"] and document["warnings"] == 1
    assert [one["name"] for one in document["checks"]] == [one.name for one in found]
    assert document["checks"][1] == {
        "name": "open files", "text": "256 for each process", "status": "warning", "cure": "`ulimit -n 4096`."
    }  # fmt: skip


@pytest.mark.parametrize("status", ["warning", "fault"])
def test_a_name_cannot_change_the_terminal(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Finding("disk", "\x1b[31m/red\n[bold]", status, "cure")
    monkeypatch.setattr(checkup, "findings", lambda folder: iter([odd]))
    out = run_here("doctor").out
    assert "\x1b" not in out and "[bold]" in out
