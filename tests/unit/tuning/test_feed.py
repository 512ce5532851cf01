"""Worker processes that prepare data: what becomes of their errors and deaths, and of too little shared memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moce_ds.errors import LOST_PEER, DataError, MoceError
from moce_ds.host.machine import MachineError, machine_fault
from moce_ds.tuning.feed import prepared

CPU = torch.device("cpu")
TOGETHER = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
LARGE = """
import torch
from moce_ds.console import run_main
from moce_ds.tuning.feed import prepared

def make(index):
    return {"images": [torch.ones(1_000_000)]}

run_main(lambda: list(prepared(make, range(2), 1, torch.device("cpu"))))
"""


def killed(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(index: int) -> None:
    raise DataError("a.jpg is damaged.")


def without_memory(index: int) -> torch.Tensor:
    return torch.empty(10**17)


def wrong(index: int) -> None:
    raise RuntimeError("a defect")


def test_a_worker_that_is_killed_is_one_message_with_the_cure() -> None:
    with pytest.raises(
        MachineError, match=r"died, perhaps for lack of memory .*`data.workers`; 0 needs none"
    ) as caught:
        list(prepared(killed, range(4), 1, CPU))
    assert caught.value.status == LOST_PEER


def test_it_is_the_same_where_torch_says_it_in_the_midst_of_something_else() -> None:
    """Its handler of SIGCHLD raises wherever the main thread is."""
    fault = machine_fault(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert fault is not None and fault.status == LOST_PEER


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_they_were(workers: int) -> None:
    with pytest.raises(MoceError, match=r"^a.jpg is damaged.$"):
        list(prepared(refused, range(2), workers, CPU))
    with pytest.raises(MachineError, match=r"^Out of memory \(") as caught:
        list(prepared(without_memory, range(2), workers, CPU))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(RuntimeError, match="a defect"):
        list(prepared(wrong, range(2), workers, CPU))


def test_too_little_shared_memory_is_no_silence_without_end(tmp_path: Path) -> None:
    if subprocess.run([*TOGETHER, "true"], capture_output=True).returncode:
        pytest.skip("needs to mount a small /dev/shm")
    (tmp_path / "large.py").write_text(LARGE)
    told = subprocess.run(
        [*TOGETHER, sys.executable, str(tmp_path / "large.py")], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 1 and told.stderr.count("\n") == 1, told.stderr
    assert told.stderr.startswith("Error: Out of shared memory (") and "--shm-size" in told.stderr
