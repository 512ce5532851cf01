"""Profiles of SLURM: what they ask sbatch for, and what they refuse. Real jobs are in tests/slurm."""

import re
import subprocess
from pathlib import Path

import pytest

from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.main import moce
from moce_ds.cli.workflow.submit import PARALLEL, usable_nodes
from moce_ds.common.config.settings import from_tree, keys, load
from moce_ds.common.errors import ConfigError
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import refused, run_here

DOCS = Path(__file__).parents[4] / "docs/slurm.md"


def profile(*words: str) -> SlurmProfile:
    return load(SlurmProfile, None, words)


def test_one_process_a_gpu() -> None:
    asked = profile("nodes=4", "gpus_per_node=8", "cpus_per_task=12", "mem=900G", "account=ours").sbatch(
        after=["7", "9"]
    )
    assert asked["gpus_per_node"] == 8 and asked["mem"] == "900G" and asked["account"] == "ours"
    assert asked["additional_parameters"]["mincpus"] == 96
    assert "--ntasks-per-node=8" in asked["srun_args"] and "--cpus-per-task=12" in asked["srun_args"]
    assert asked["dependency"] == "afterok:7:9"
    assert "partition" not in asked, "what is not said is the cluster's to choose"


def test_a_range_of_nodes_and_further_lines() -> None:
    asked = profile("nodes=4", "min_nodes=2", "signal=USR1", "signal_seconds=600", "extra.exclude=node7").sbatch([])
    lines = asked["additional_parameters"]
    assert (lines["nodes"], lines["signal"], lines["exclude"]) == ("2-4", "USR1@600", "node7")
    assert lines["requeue"] is True


def test_numbers_of_further_lines_are_kept_as_given() -> None:
    assert from_tree(SlurmProfile, {"extra": {"nice": 100, "one": 1, "hold": True}}, "a tree").extra == {
        "nice": 100, "one": 1, "hold": True,
    }  # fmt: skip
    assert profile("extra.begin=0800", "extra.hold=true").extra == {"begin": "0800", "hold": True}


def test_sizes_are_spoken() -> None:
    assert profile().size == "1 node x 1 process"
    assert profile("nodes=4", "min_nodes=1", "gpus_per_node=8").size == "1 to 4 nodes x 8 processes"


def test_a_verb_that_runs_alone_takes_the_share_of_one_process() -> None:
    one = profile("nodes=4", "min_nodes=2", "gpus_per_node=8", "cpus_per_task=12").for_one_process()
    asked = one.sbatch([])
    assert (asked["nodes"], asked["gpus_per_node"], asked["additional_parameters"]["mincpus"]) == (1, 1, 12)
    assert "nodes" not in asked["additional_parameters"]


def test_environment_reaches_the_shell_with_its_variables_read() -> None:
    given = 'a "b" `c` \\ $HOME'
    (line,) = (line for line in profile(f"env.X={given}").sbatch([])["setup"] if line.startswith("export X="))
    said = subprocess.run(["sh", "-c", f'{line}; printf %s "$X"'], env={"HOME": "/h"}, capture_output=True, text=True)
    assert said.stdout == given.replace("$HOME", "/h")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nodes=1", "min_nodes=2"], "min_nodes: 2 is more than nodes 1"),
        (['setup=["a\\nb"]'], "setup: 'a\\nb' holds a line break"),
        (["signal=KILL"], "signal: got 'KILL'"),
        (["gpu_per_node=1"], "Did you mean gpus_per_node?"),
        (["node=2"], "Did you mean nodes?"),
    ],
)
def test_refusals(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        profile(*words)


def test_only_nodes_that_divide_the_batch_are_used() -> None:
    run = load(PretrainSettings, None, ["data.shards=x", "run.out=y", "optim.batch_size=24"])
    assert usable_nodes(run.optim, run.ep_size, profile("nodes=6", "min_nodes=2", "tasks_per_node=2")) == [2, 3, 4, 6]
    with pytest.raises(ConfigError, match="24 is not divisible by 10 processes"):
        usable_nodes(run.optim, run.ep_size, profile("nodes=5", "tasks_per_node=2"))


def test_the_settings_that_the_page_names_are_there() -> None:
    known = {key for key, _ in keys(SlurmProfile)}
    named = re.findall(r"`([a-z_]+)(?:\.\w+)?=[^`]*`", DOCS.read_text())
    assert len(named) > 5
    assert set(named) <= known


def test_the_help_names_the_verbs_that_use_all_processes() -> None:
    told, _, _ = " ".join(run_here("launch", "slurm", "--help").out.split()).partition("use all processes")
    named = re.findall(r"`(\w+)`", told)
    assert tuple(named) == PARALLEL and set(named) <= set(moce.commands)


def test_a_range_of_nodes_is_refused_where_the_batch_is_not_looked_at() -> None:
    told = refused("launch", "slurm", "nodes=4", "min_nodes=2", "detect", "encoder")
    assert "min_nodes: detect runs on a fixed number of nodes" in told
