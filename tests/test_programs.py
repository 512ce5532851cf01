"""Programs beside `moce`: errors of the machine, like those of the user, end them with one message."""

import errno
import os
import runpy
import sys
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmJobEnvironment

from moce_ds.common.errors import LOST_PEER
from moce_ds.data.sources import demo_images
from moce_ds.inspection import study_folder
from moce_ds.training import import_deepspeed_checkpoint as native

DOORS = {
    "moce_ds.cli.workflow.study": (study_folder.StudyRecord, "read"),
    "moce_ds.cli.workflow.demo": (demo_images, "write_demo_images"),
    "moce_ds.cli.launch.slurm_job": (SlurmJobEnvironment, "__init__"),
    "tools.import_deepspeed": (native, "import_native"),
}
GIVEN = {
    "moce_ds.cli.workflow.study": ["{}", "num=2"],
    "moce_ds.cli.workflow.demo": ["--out", "{}"],
    "moce_ds.cli.launch.slurm_job": ["{}", "1", "5", "3"],
    "tools.import_deepspeed": ["{}", "{}/out", "--config", "{}/config.yaml"],
}


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 1), (errno.EIO, LOST_PEER)])
@pytest.mark.parametrize("program", DOORS)
def test_a_disk_that_fails_is_told_without_a_traceback(
    program: str,
    number: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    (tmp_path / "config.yaml").write_text("{run: {out: a}, data: {shards: b}, model: {arch: mae}}")
    monkeypatch.setattr(*DOORS[program], failing)
    monkeypatch.delitem(sys.modules, program, raising=False)
    monkeypatch.setattr(sys, "argv", [program, *(word.format(tmp_path) for word in GIVEN[program])])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(program, run_name="__main__")
    assert end.value.code == status
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path}: {os.strerror(number)}. ")
