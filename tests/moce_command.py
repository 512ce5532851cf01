"""Run `moce ...` and keep what it said."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from moce_ds.cli import main

TINY = Path(__file__).parent / "distributed" / "tiny.yaml"
"""Settings of a pre-training run that takes a second."""


@dataclass(frozen=True)
class Said:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


def run_here(*words: object) -> Said:
    """Run `moce ...` in this process, through the console script's own entry point."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["moce", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Said(status, out.getvalue(), err.getvalue())


def run_alone(*words: object) -> Said:
    """Run `python -m moce_ds ...` in a process of its own, as training must be: its groups are global."""
    command = [sys.executable, "-m", "moce_ds", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Said(done.returncode, done.stdout, done.stderr)


def refused(*words: object) -> str:
    """The message of a command's user error: one, on standard error, with status 1 and no traceback."""
    said = run_here(*words)
    assert said.status == 1, said
    assert said.err.count("Error:") == 1 and said.err.startswith("Error: "), said.err
    assert "Traceback" not in said.err + said.out
    return said.err.removeprefix("Error: ")
