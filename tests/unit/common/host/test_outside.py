"""Programs that are asked for something end, or are ended."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from moce_ds.common.host.outside import run_for

SHELL = shutil.which("sh") or "sh"


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and whose status nobody has read does not."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_output_and_status_of_a_program() -> None:
    good = run_for(60, [SHELL, "-c", "echo $WORD"], {"WORD": "yes"})
    assert (good.status, good.out, good.fault(60)) == (0, "yes\n", "")
    bad = run_for(60, [SHELL, "-c", "echo out; echo first >&2; echo last >&2; exit 3"])
    assert (bad.status, bad.fault(60)) == (3, "last")
    assert run_for(60, [SHELL, "-c", "exit 4"]).fault(60) == "status 4"
    assert run_for(60, [SHELL, "-c", "kill -SEGV $$"]).fault(60) == "killed by SIGSEGV"


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    hanging = run_for(0.5, [SHELL, "-c", f"sleep 600 & echo $! $$ > {tmp_path}/pids; wait"])
    assert hanging.status is None and hanging.fault(0.5) == "no answer within 0.5 s"
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and os.getpid() not in pids and not any(map(is_alive, pids))


def test_a_program_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_for(1, [str(tmp_path / "none")])
