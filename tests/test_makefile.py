"""`make install` chooses the extra for the driver of the machine."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.examples import nvidia_smi

ROOT = Path(__file__).parent.parent


def extra(*words: str) -> str:
    """The extra that `make install` would install."""
    command = ("make", "--silent", "--no-print-directory", "--eval", "shown: ; @echo $(EXTRA)", "shown", *words)
    environment = {name: value for name, value in os.environ.items() if name not in ("EXTRA", "MAKEFLAGS")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("series", "expected"), [(None, "cpu"), (470, "cpu"), (550, "cu12"), (580, "cu13"), (610, "cu13")]
)
def test_the_extra_fits_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, series: int | None, expected: str
) -> None:
    nvidia_smi.install(monkeypatch, tmp_path, series)
    assert extra() == expected
    assert extra("EXTRA=cu12") == "cu12"


def test_a_version_that_the_driver_does_not_know_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi.install(monkeypatch, tmp_path, None)
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho '| NVIDIA-SMI 550.90.12   Driver Version: 550.90.12   CUDA Version: N/A |'\n"
    )
    assert extra() == "cpu"
