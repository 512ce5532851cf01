"""The cluster of the tests: it runs jobs as SLURM does, loses nodes and gets them back, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from cluster import Cluster
from waiting import wait_until


def submit(cluster: Cluster, script: str, *options: str) -> str:
    """Number of a new job."""
    return cluster.run("sbatch", "--parsable", "--open-mode=append", *options, f"--wrap={script}").strip()


def shown(cluster: Cluster, job: str, what: str = "%T") -> str:
    """What squeue shows of a job: its state, `%N` its nodes."""
    return cluster.run("squeue", "--noheader", f"--jobs={job}", f"--format={what}").strip()


def left_of(folder: Path) -> list[str]:
    """Processes, mounts and network devices of the cluster in `folder`."""
    found = [mount for mount in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in mount]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            if f"SLURM_CONF={folder}/" in (process / "environ").read_text(errors="replace"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    number = re.search(
        r"^SlurmctldHost=head\(198\.18\.(\d+)\.1\)", (folder / "etc/slurm.conf").read_text(), re.MULTILINE
    )
    assert number
    return found + [str(cable) for cable in Path("/sys/class/net").glob(f"slurm{number[1]}")]


def test_every_node_has_a_name(cluster: Cluster) -> None:
    assert sorted(cluster.run("srun", "--nodes=4", "--account=lab", "hostname").split()) == cluster.nodes


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--partition=none", "Invalid partition"),
        ("--account=none", "Invalid account"),
        ("--nodes=5", "Node count"),
        ("--gpus-per-node=3", "Requested node configuration"),
    ],
)
def test_what_the_cluster_has_not_is_refused(cluster: Cluster, option: str, told: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        cluster.run("sbatch", option, "--wrap=true")
    assert told in error.value.stderr


@pytest.mark.parametrize(("partition", "name"), [("low", "USR1"), ("abrupt", "TERM")])
def test_a_job_is_warned_before_another_takes_its_nodes(
    cluster: Cluster, tmp_path: Path, partition: str, name: str
) -> None:
    output = tmp_path / "output"
    script = "trap 'echo USR1' USR1; trap 'echo TERM; exit 1' TERM; echo started; while :; do sleep 0.1; done"
    options = (f"--partition={partition}", "--signal=B:USR1@60", f"--output={output}")
    job = submit(cluster, script, *options, "--nodes=4", "--exclusive", "--time=60")
    cluster.wait_until(lambda: output.exists() and "started" in output.read_text(), 60, "the job runs")
    submit(cluster, "true", "--partition=high", "--output=/dev/null")
    cluster.wait_until(lambda: name in output.read_text(), 60, "the signal arrives")
    if partition == "low":  # it may go on for a while
        assert shown(cluster, job) == "RUNNING" and "TERM" not in output.read_text()


def test_a_job_of_a_killed_node_runs_on_another(cluster: Cluster) -> None:
    job = submit(cluster, "sleep 600", "--output=/dev/null")
    cluster.wait_until(lambda: shown(cluster, job) == "RUNNING", 60, "the job runs")
    lost = shown(cluster, job, "%N")
    cluster.kill(lost)
    cluster.wait_until(lambda: shown(cluster, job) == "PENDING", 60, "the job is requeued")
    cluster.wait_until(lambda: shown(cluster, job) == "RUNNING", 60, "the job runs again")
    assert shown(cluster, job, "%N") != lost
    account = cluster.run(
        "sacct", "--duplicates", "--allocations", "--noheader", f"--jobs={job}", "--format=state,nodelist"
    )
    assert account.split()[:2] == ["NODE_FAIL", lost]


def test_a_cut_node_comes_back(cluster: Cluster) -> None:
    cluster.cut("node2")
    cluster.wait_until(lambda: cluster.state("node2") == "idle*", 60, "node2 is missed")
    cluster.join("node2")
    cluster.wait_until(lambda: cluster.state("node2") == "idle", 60, "node2 is back")
    assert cluster.run("srun", "--nodelist=node2", "hostname").strip() == "node2"


def test_a_node_that_was_off_is_reached_by_the_others(cluster: Cluster, tmp_path: Path) -> None:
    def names(output: Path) -> list[str]:
        cluster.run("sbatch", "--wait", "--nodes=4", f"--output={output}", "--wrap=srun hostname")
        return sorted(output.read_text().split())

    assert names(tmp_path / "before") == cluster.nodes
    cluster.kill("node2")
    cluster.revive("node2")
    assert names(tmp_path / "after") == cluster.nodes


def test_another_cluster_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster.start(tmp_path, nodes=2) as other:
        assert other.run("srun", "--nodes=2", "hostname").split() != []
        assert len(left_of(tmp_path)) > 10
        assert left_of(cluster.folder) != left_of(tmp_path)
    assert left_of(tmp_path) == []
    assert [cluster.state(node) for node in cluster.nodes] == ["idle"] * 4


def test_a_cluster_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "gpu0").touch()  # where a device belongs
    with pytest.raises(FileExistsError), Cluster.start(tmp_path, nodes=1):
        pass
    assert left_of(tmp_path) == []


def test_a_cluster_whose_owner_is_killed_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("off")  # a short name: there is a limit to those of sockets
    program = Path(__file__).with_name("cluster.py")
    kill_owner = "sbatch --output=/dev/null --wrap='sleep 600' && srun hostname && kill -9 $PPID"
    command = [sys.executable, program, "1", "--", "sh", "-c", kill_owner]
    environment = {**os.environ, "TMPDIR": str(place)}
    assert (
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=120).returncode == -signal.SIGKILL
    )
    (folder,) = place.iterdir()
    wait_until(lambda: left_of(folder) == [], 60, "nothing is left", lambda: "\n".join(left_of(folder)))
