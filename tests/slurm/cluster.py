"""A real SLURM cluster of several nodes on one machine: Debian's packages, as root, without services or cgroups.

    python tests/slurm/cluster.py 4 -- sbatch --wait --wrap "srun hostname"
    python tests/slurm/cluster.py 4      # a shell; the cluster ends with it

Each node, and the head with controller, accounting and munge, is a `Machine`: it has a network, a host name, process
ids, mounts and a `/dev/shm` of its own, and shares the file system, `/tmp` included. The head's network is a bridge
with a cable to each node and one to this machine, where the cluster is seen by SLURM_CONF alone. Several clusters can
be on at once. All state is in one folder; nothing else is left when a cluster is off, however it ended.

Each node has 4 CPUs, 4000 MB and 2 GPUs, none of them real. Partitions: `main`; `low`, whose jobs `high` preempts: they
get the signal they asked for and 20 s; `abrupt`, whose jobs it preempts with 3 s. Account: `lab`, for root.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

from cluster_config import write_config
from cluster_machine import Machine
from cluster_network import Network
from cluster_packages import missing
from waiting import wait_until

T = TypeVar("T")
_START, _REACT = 120, 240  # seconds, on a busy machine


class Cluster:
    """A cluster of nodes `node1`, `node2`, ...; see `start`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": f"{folder}/etc/slurm.conf"}
        self._logs = folder / "log"
        self._head = self._machine("head")
        self._machines = {node: self._machine(node) for node in self.nodes}
        self._network: Network | None = None

    @classmethod
    @contextmanager
    def start(cls, folder: Path, nodes: int) -> Iterator[Self]:
        """A cluster whose nodes are idle, until the block is left. Its state is in `folder`, which must be empty.

        Raises:
            TimeoutError, RuntimeError: something does not start; the message has the logs.
        """
        cluster = cls(folder, nodes)
        try:
            cluster._start()
            yield cluster
        finally:
            cluster.stop()

    def run(self, *command: str) -> str:
        """Output of a command that talks to the cluster. Raises subprocess.CalledProcessError."""
        try:
            return self._run(*command).stdout
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise

    def state(self, node: str) -> str:
        """State of a node as sinfo has it: `idle`, `mixed`, `down*`, ... (`*`: does not answer)."""
        return self.run("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%T").strip()

    def kill(self, node: str) -> None:
        """Switch a node off: all its processes end at once."""
        self._head.in_network("ip", "link", "delete", node)  # else the kernel may hold it for a while
        self._machines[node].power_off()

    def cut(self, node: str) -> None:
        """Pull the network cable of a node; its processes live on."""
        self._head.in_network("ip", "link", "set", node, "down")

    def join(self, node: str) -> None:
        """Put the network cable back; returns at once. A node that was given up meanwhile is asked again in turn only,
        after up to a minute; `revive` does not wait for that."""
        self._head.in_network("ip", "link", "set", node, "up")

    def revive(self, node: str) -> None:
        """Have a node again that was killed or cut: switched on, connected, and taking jobs."""
        if self._machines[node].is_on:
            self.join(node)
        else:
            self._power_on(node)
        self.wait_until(lambda: self._brings_up(node), _REACT, f"{node} takes jobs")

    def restore(self) -> None:
        """Cancel all jobs, and wait until all nodes are on, connected and idle."""
        self.run("scancel", "--user=root")
        for node in self.nodes:
            self.revive(node)
        self.wait_until(self._is_idle, _REACT, "nodes are idle and no job is left")

    def stop(self) -> None:
        """Switch everything off."""
        for machine in (*self._machines.values(), self._head):
            machine.power_off()
        if self._network:
            self._network.disconnect()
            self._network = None

    def wait_until(self, condition: Callable[[], T], seconds: float, what: str) -> T:
        """Wait until `condition` returns something true, and return that.

        Raises:
            TimeoutError: it did not within `seconds`; the message says `what`, and what jobs and nodes did.
        """
        return wait_until(condition, seconds, what, self._report)

    def _start(self) -> None:
        for name in ("log", "state", "spool", "sql"):
            (self.folder / name).mkdir(parents=True)
        self._head.power_on()
        self._network = Network.connect(self._head.pid)
        write_config(self.folder, self._network, self.nodes)
        self._start_head(self._network)
        for node in self.nodes:
            self._power_on(node)
        self._wait(self._is_idle, "idle nodes")

    def _start_head(self, network: Network) -> None:
        head, folder = self._head, self.folder
        head.tell(f"""
            mount --bind {folder}/hosts /etc/hosts
            mount -t tmpfs tmpfs {folder}/sql
            ip link add switch address {network.card("head")} type bridge
            ip addr add {network.head}/24 dev switch
            ip link set switch up
            ip link set outside master switch
            ip link set outside up
            umask 077 && head -c 128 /dev/urandom > {folder}/munge.key && umask 022
            munged --foreground --force --key-file={folder}/munge.key --socket={folder}/munge.socket \\
                --pid-file={folder}/munge.pid --seed-file={folder}/munge.seed --log-file={folder}/log/munge.log &
            database="--no-defaults --user=root --datadir={folder}/sql --innodb-log-file-size=8M"
            # Seen once to fail in two clusters that started at the same moment, for a reason that its log had lost.
            make_tables() {{ mariadb-install-db $database --auth-root-authentication-method=normal --skip-test-db; }}
            (make_tables || {{ rm -rf {folder}/sql/*; make_tables; }} &&
                mariadbd $database --socket={folder}/sql.socket --pid-file={folder}/sql.pid --bind-address=127.0.0.1 \\
                --skip-name-resolve --innodb-lock-wait-timeout=900 --innodb-buffer-pool-size=32M) &
        """)
        sql = ("mariadb", "--no-defaults", f"--socket={folder}/sql.socket", "--user=root", "--execute=select 1")
        self._wait(lambda: self._works(*sql), "the data base")
        head.tell("slurmdbd -D &")
        self._wait(lambda: self._works("sacctmgr", "show", "cluster"), "slurmdbd")
        for record in ("cluster lab", "account lab", "user root account=lab"):
            self.run("sacctmgr", "--immediate", "add", *record.split())
        head.tell("slurmctld -D &")
        self._wait(lambda: self._works("scontrol", "ping"), "slurmctld")

    def _machine(self, name: str) -> Machine:
        return Machine(name, self._logs / f"{name}.out", self.environment)

    def _power_on(self, node: str) -> None:
        assert self._network
        machine = self._machines[node]
        machine.power_on()
        self._head.in_network("ip", "link", "add", node, "type", "veth", "peer", "eth0", "netns", str(machine.pid))
        self._head.in_network("ip", "link", "set", node, "master", "switch", "up")
        machine.tell(f"""
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {self.folder}/etc /etc/slurm  # for programs that lose their SLURM_CONF
            mount -t tmpfs -o mode=1777 tmpfs /dev/shm
            ip link set eth0 address {self._network.card(node)}
            ip addr add {self._network.node(node)}/24 dev eth0
            ip link set eth0 up
            slurmd -D &
        """)

    def _is_idle(self) -> bool:
        return all(self.state(node) == "idle" for node in self.nodes) and not self.run("squeue", "--noheader")

    def _brings_up(self, node: str) -> bool:
        """Whether it takes jobs; asks for that where a node must be asked."""
        state = self.state(node)
        if state.startswith(("down", "drain")):
            self._works("scontrol", "update", f"nodename={node}", "state=resume")
        return state in ("idle", "mixed", "allocated")

    def _works(self, *command: str) -> bool:
        return self._run(*command, check=False).returncode == 0

    def _run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, _START, what, self._read_logs)

    def _read_logs(self) -> str:
        return _tails(*sorted(self._logs.iterdir()))

    def _report(self) -> str:
        commands = ("sinfo --long --Node --partition=main", "squeue --long", "scontrol --oneliner show jobs")
        nodes, queue, jobs = (self._run(*command.split(), check=False).stdout for command in commands)
        outputs = [Path(path) for path in dict.fromkeys(re.findall(r"Std(?:Out|Err)=(\S+)", jobs))]
        return "\n".join((nodes, queue, _tails(*outputs[-4:], self._logs / "slurmctld.log")))


def _tails(*files: Path) -> str:
    lines = {file: file.read_text(errors="replace").splitlines()[-60:] for file in files if file.is_file()}
    return "\n".join(line for file, tail in lines.items() for line in (f"--- {file}", *tail))


def main() -> int:
    """Run a command, or a shell, in the environment of a new cluster; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int)
    parser.add_argument("command", nargs="*", default=[os.environ.get("SHELL", "bash")], help="after --")
    asked = parser.parse_args()
    if reason := missing():
        print(f"Error: {reason}.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster.start(Path(folder), asked.nodes) as cluster:
        return subprocess.run(asked.command, env={**os.environ, **cluster.environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
