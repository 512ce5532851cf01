"""Programs beside `moce`: errors of the machine, like those of the user, end them with one message."""

import errno
import os
import runpy
import sys
from pathlib import Path

import pytest

from moce_ds import checksums
from moce_ds.data import demo_images

DOORS = {"launchers.cell": (checksums, "read_checked"), "launchers.demo": (demo_images, "write_demo_images")}


@pytest.mark.parametrize("program", DOORS)
def test_a_full_disk_is_told_without_a_traceback(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(*DOORS[program], full)
    monkeypatch.delitem(sys.modules, program, raising=False)
    given = [str(tmp_path), "num=2"] if program == "launchers.cell" else ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [program, *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(program, run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path}: No space left on device. Free some space there")
