"""Starting runs as a user does, watching what they leave on disk, and killing what they consist of."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moce_ds.common.storage.metrics_file import read_metrics

SECONDS = 300
"""The limit on a hang; a start takes about 5 s on an idle machine. It is less than the 600 s after which the process
group gives up by itself, so what ends within it has not waited for that."""
PATIENT = "run.peer_timeout=3600"
"""For runs in which a process is lost or fails: what ends within SECONDS has not waited for a silent peer either."""


def local(nproc: int, *options: str) -> tuple[str, ...]:
    """The words that start a verb in so many processes."""
    return (sys.executable, "-m", "moce_ds", "launch", "local", "--nproc", str(nproc), *options)


@contextmanager
def launched(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A running launcher, its output in one pipe; whatever is left of it in the end is killed."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        send(signal.SIGKILL, *ranks_of(process).values())
        process.kill()
        process.wait()


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process number of every rank that a launcher has started and not yet seen end."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    found = {}
    for pid in children.read_text().split() if children.exists() else ():
        with suppress(OSError):  # ended meanwhile
            rank = re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text())
            if rank:
                found[int(rank[1])] = int(pid)
    return found


def send(number: signal.Signals, *pids: int) -> None:
    """Send a signal to processes; those that have ended do not mind."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def wait_for_step(run: Path, step: int, attempt: int = 1) -> None:
    """Return when so many steps are on record, the last of them by that attempt or a later one."""

    def there() -> bool:
        records = read_metrics(run / "metrics.jsonl")
        return bool(records) and records[-1]["step"] >= step and records[-1]["attempt"] >= attempt

    wait_until(there)


def run_to_end(*command: str | Path) -> tuple[int, str]:
    """Exit status and output."""
    with launched(*command) as process:
        output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output
