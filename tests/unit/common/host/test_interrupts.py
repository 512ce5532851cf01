"""What ends a command from outside, and what does not: signals, a closed pipe, a terminal that is gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moce_ds.cli.launch.local import run_processes
from moce_ds.cli.workflow import transfer_tasks
from moce_ds.common.errors import LOST_PEER, STOPPED
from moce_ds.common.host.interrupts import obeyed
from moce_ds.distributed.runtime import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

OUTLIVING = """
import sys
from moce_ds.common.host.interrupts import outlive_readers
outlive_readers()
for stream in (sys.stdout, sys.stderr):
    print("first", file=stream, flush=True)
sys.stdin.read()  # until the readers have gone
for line in range(1000):
    print("later " * 20, flush=line % 2 == 0)
    print("later " * 20, file=sys.stderr)
"""


def run(code: str, **how: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, **how)  # type: ignore[call-overload]


def ended(process: "subprocess.Popen[bytes]") -> int:
    """Let a process go on whose readers have gone; returns its status."""
    assert process.stdin is not None
    process.stdin.close()
    return process.wait(timeout=300)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_nothing(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = run(OUTLIVING, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for stream in (process.stdout, process.stderr):
        assert stream is not None and stream.readline() == b"first\n"
        stream.close()
    assert ended(process) == 0


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    master, slave = os.openpty()
    process = run(OUTLIVING, stdout=slave, stderr=slave)
    os.close(slave)
    assert b"first" in os.read(master, 100)
    os.close(master)
    assert ended(process) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_no_reader_that_has_gone() -> None:
    with open("/dev/full", "w") as full:
        process = run(OUTLIVING, stdout=full, stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=300)
    assert process.returncode != 0 and b"No space left" in told


WORKING = """
import os, signal, sys
from moce_ds.common.host.interrupts import interruptible
try:
    with interruptible():
        try:
            signal.raise_signal({number})
        finally:
            print("cleared away", flush=True)
            {then}
except KeyboardInterrupt:
    sys.exit(4)
"""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_lets_things_be_cleared_away_and_a_second_does_not(number: signal.Signals) -> None:
    for then, status, told in (("", 4, "cleared away\n"), (f"signal.raise_signal({number:d})", STOPPED, "")):
        process = run(WORKING.format(number=int(number), then=then), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status and out == b"cleared away\n"
        assert (err == b"Interrupted.\n") is (not told)


LOADING = """
import signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "moce_ds.cli.main":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["moce", "pipeline", "x.yaml"]
from moce_ds.__main__ import main
main()
"""


def test_ctrl_c_while_the_program_is_loaded_is_a_stop() -> None:
    process = run(LOADING, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=300) == (b"", b"Interrupted.\n") and process.returncode == STOPPED


@pytest.fixture
def ignoring_hangups() -> object:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_for_a_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted
        signal.raise_signal(number)
        assert stop.wanted
    assert signal.getsignal(number) is before


def test_nohup_is_respected(ignoring_hangups: object) -> None:
    assert signal.SIGHUP not in obeyed()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.wanted


# How one of two processes ends, to which the launcher is the parent; and the launcher's status.
IMPATIENT = """
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
for count in (1, 2):
    os.kill(os.getppid(), signal.SIGINT)
    while len(asked) < count:
        time.sleep(0.001)
"""
ENDS = [
    ("os.kill(os.getpid(), signal.SIGKILL)", LOST_PEER),
    (f"sys.exit({LOST_PEER})", LOST_PEER),
    ("sys.exit(1)", 1),
    (f"sys.exit({STOPPED})", STOPPED),
    (f"{IMPATIENT}sys.exit({LOST_PEER})", STOPPED),
    (f"{IMPATIENT}time.sleep(60)", STOPPED),
]


@pytest.mark.parametrize(("how", "status"), ENDS, ids=["killed", "lost", "error", "stopped", "insisted", "hangs"])
def test_how_a_process_ends_decides_the_launchers_status(how: str, status: int) -> None:
    command = [sys.executable, "-c", f"import os, signal, sys, time\n{how}"]
    assert run_processes(command, 1, grace_seconds=0.5) == status


ASKING = """#!{python}
import os, pathlib, signal, time

def stop(*_):
    pathlib.Path("stopped").touch()
    os._exit({status})

signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_signal_reaches_the_fine_tuning_that_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(ASKING.format(python=sys.executable, status=STOPPED))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        transfer_tasks._finetune_once(Path("encoder"), Path("train"), None, Path("test"), [], tmp_path / "out")
    assert (tmp_path / "stopped").exists()
