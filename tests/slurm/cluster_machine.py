"""A machine of a cluster: processes with a network, a host name, process ids and mounts of their own."""

import os
import signal
import subprocess
from pathlib import Path

_UNSHARE = ("unshare", "--net", "--uts", "--pid", "--fork", "--mount", "--mount-proc")


class Machine:
    """A shell in namespaces of its own; it runs what it is told. If it ends, all processes of the machine do.

    It also ends when the process that has switched it on ends, however that happens: its standard input is closed.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.pid = 0

    @property
    def is_on(self) -> bool:
        """Whether it has been switched on and not off."""
        return self._process is not None

    def power_on(self) -> None:
        """Switch it on: a host name, and a network without a cable."""
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                [*_UNSHARE, "bash"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is not for it
            )
        self.tell(f"hostname {self.name} && ip link set lo up && echo on")
        assert self._process.stdout
        if self._process.stdout.readline() != "on\n":
            raise RuntimeError(f"{self.name} does not start:\n{self._log.read_text()}")
        shell = self._process.pid
        self.pid = int(Path(f"/proc/{shell}/task/{shell}/children").read_text())
        self.tell("exec >&2")

    def tell(self, commands: str) -> None:
        """Have its shell run commands; returns at once."""
        assert self._process and self._process.stdin
        self._process.stdin.write(f"{commands}\n")
        self._process.stdin.flush()

    def power_off(self) -> None:
        """Kill all its processes at once; returns when there is none left."""
        if self._process is None:
            return
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate()
        self._process, self.pid = None, 0

    def in_network(self, *command: str) -> None:
        """Run a command of this machine's programs in its network. Raises subprocess.CalledProcessError."""
        subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", *command], check=True, capture_output=True)
