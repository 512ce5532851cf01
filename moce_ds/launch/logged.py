"""Runs a command in a process of its own whose output goes to a log file."""

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moce_ds.host.interrupts import kept_signals, obeyed, wait_for
from moce_ds.storage.files import writes_to

_TAIL_LINES = 8


def run_logged(command: Sequence[str], log: Path) -> int:
    """Run a command, append its output to `log`, and return its exit status, negative for a signal that killed it.

    Signals are passed on to it, so that it stops where it can resume.

    Raises:
        ArtefactError: the log cannot be written.
        KeyboardInterrupt: a signal came meanwhile; the command has ended.
    """
    with writes_to(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        opened = open(log, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    with opened, kept_signals(obeyed()) as received:
        # In a session of its own: the terminal sends Ctrl-C only to this process, which passes it on once.
        child = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True)
        status = wait_for(child, received)
        if status < 0 and not received:
            opened.write(f"The process was killed by {signal.Signals(-status).name}.\n")
    if received:
        raise KeyboardInterrupt
    return status


def log_tail(log: Path) -> str:
    """The last non-empty lines of a log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_TAIL_LINES:])
