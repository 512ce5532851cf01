"""The cluster of the tests: it runs jobs as SLURM does, loses nodes and gets them back, and leaves nothing behind."""

import subprocess

import pytest
from cluster import Cluster


def state_of(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()


def test_every_node_has_a_name(cluster):
    assert sorted(cluster.run("srun", "--nodes=4", "hostname").split()) == cluster.nodes


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--partition=none", "Invalid partition"),
        ("--account=none", "Invalid account"),
        ("--nodes=5", "Node count"),
        ("--gpus-per-node=3", "Requested node configuration"),
    ],
)
def test_what_the_cluster_has_not_is_refused(cluster, option, told):
    with pytest.raises(subprocess.CalledProcessError) as error:
        cluster.run("sbatch", option, "--wrap=true")
    assert told in error.value.stderr
