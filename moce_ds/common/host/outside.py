"""Programs that are run for what they print, for a limited time: a hanging driver or file server must not stop ours."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_LAST_SECONDS = 2.0  # for a killed program to end


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: its exit status, negative for a signal that killed it; None if it was still running after its time.
        out, err: what it printed; empty if it was still running.
    """

    status: int | None
    out: str = ""
    err: str = ""

    def fault(self, seconds: float) -> str:
        """Why it failed, as a part of a sentence; "" if it did not. `seconds` is the time that it had."""
        if self.status is None:
            return f"no answer within {seconds:g} s"
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}"
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return (lines[-1] if lines else f"status {self.status}") if self.status else ""


def run_for(seconds: float, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> Outcome:
    """Run a program for at most `seconds`; then it is killed, with the processes that it started.

    A program that waits for a driver or a file server cannot even be killed. It is left behind, and this function
    returns all the same.

    Raises:
        OSError: the program cannot be started.
    """
    child = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the kill also reaches the processes that it started
    )
    try:
        out, err = child.communicate(timeout=seconds)
        return Outcome(child.returncode, out, err)
    except subprocess.TimeoutExpired:
        return Outcome(None)
    finally:
        if child.returncode is None:
            _end(child)


def _end(child: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.communicate(timeout=_LAST_SECONDS)
