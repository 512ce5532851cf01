"""Run `moce ...` and keep what it said."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from harness import run_distributed

from moce_ds.cli.main import main

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
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
    """Run `moce ...` in a process of its own, as training must be: its groups are global."""
    return run_distributed(run_here, 1, *words)[0]


def refused(*words: object) -> str:
    """The message of a command's user error: one, on standard error, with status 1 and no traceback."""
    said = run_here("--quiet", *words)  # without notices before it
    assert said.status == 1, said
    assert said.err.count("Error:") == 1 and said.err.startswith("Error: "), said.err
    assert "Traceback" not in said.err + said.out
    return said.err.removeprefix("Error: ")
