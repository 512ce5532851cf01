"""Every kind of gate and expert layer trains on two processes as on one, and goes on after a stop as if there was none.

The runs are made once, by `made`; the tests compare what they left on disk.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_distributed
from jobs import Job, Told, run_jobs
from tiny_run import EXPERT_LAYERS, STEPS, TinyData, assert_same, final_state, losses, tiny_settings

from moce_ds.checkpoint.format import find
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.encoders.open import open_encoder

VARIANTS = {
    "plain": [],
    "checkpointed": ["engine.checkpoint_activations=true"],
    "grouped": ["experts.execution=grouped"],
    "two-experts": ["experts.k=2", "experts.embeddings=learnable"],
    "shared": ["experts.k=2", "experts.combine=prob", "experts.shared_expert=true"],
    "tied": ["experts.gate_sharing=tied", "experts.combine=prob"],
    "sinkhorn": ["experts.balance=sinkhorn"],
    "random": ["experts.gate=random", "experts.k=2"],
    "paths": ["model.arch=sdr", "experts.layers=null", "sdr.stages=1", "run.init_from={dense}"],
    "token": ["model.arch=token_moe"],
    "two-tokens": ["model.arch=token_moe", "experts.k=2", "engine.zero_stage=2"],
}
BY_CLUSTER = [name for name in VARIANTS if "token" not in name]


@pytest.fixture(scope="module")
def made(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Told]]:
    """The folder of all runs and what they told: `<name>-two`, `<name>-resumed` (stopped and begun again, two
    processes with ep_size 2), `<name>-one` (one process)."""
    runs = tmp_path_factory.mktemp("variants")

    def words(name: str, run: str, ep_size: int) -> list[str]:
        other = [f"experts.ep_size={ep_size}", *(word.format(dense=runs / "dense") for word in VARIANTS[name])]
        return tiny_settings(tiny_data.shards, runs / f"{name}-{run}", *other, clusters=tiny_data.clusters)

    jobs = {"dense": Job(tiny_settings(tiny_data.shards, runs / "dense"))}
    for name in VARIANTS:
        jobs[f"{name}-two"] = Job(words(name, "two", 2))
        jobs[f"{name}-stopped"] = Job(words(name, "resumed", 2), stop_after=3)
        jobs[f"{name}-resumed"] = Job(words(name, "resumed", 2))  # the same command
    told = run_distributed(run_jobs, 2, jobs)[0]
    run_distributed(run_jobs, 1, {name: Job(words(name, "one", 1)) for name in BY_CLUSTER})
    return runs, told


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns(made: tuple[Path, dict[str, Told]], name: str) -> None:
    loss = losses(made[0] / f"{name}-two")
    assert len(loss) == STEPS and loss[-1] < loss[0] - 0.05


@pytest.mark.parametrize("name", BY_CLUSTER)
def test_two_processes_are_one(made: tuple[Path, dict[str, Told]], name: str) -> None:
    assert_same(made[0], f"{name}-one", f"{name}-two")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stop_changes_nothing(made: tuple[Path, dict[str, Told]], name: str) -> None:
    runs, told = made
    assert 3 <= told[f"{name}-stopped"].steps < STEPS
    assert f"after step {told[f'{name}-stopped'].steps}." in told[f"{name}-resumed"].text
    assert_same(runs, f"{name}-two", f"{name}-resumed", tolerance=0)


@pytest.mark.parametrize("name", ["checkpointed", "grouped"])
def test_how_it_is_computed_does_not_matter(made: tuple[Path, dict[str, Told]], name: str) -> None:
    assert_same(made[0], "plain-two", f"{name}-two")


def test_the_variants_are_what_they_say(made: tuple[Path, dict[str, Told]]) -> None:
    runs, _ = made
    states = {name: final_state(runs / f"{name}-two") for name in VARIANTS}
    gates = {
        name: sorted(key for key in state if "gate." in key and "exp_avg" not in key) for name, state in states.items()
    }
    assert gates["plain"] == ["gate.weights.0", "gate.weights.1"] and gates["tied"] == ["gate.weights.0"]
    assert gates["random"] == gates["paths"] == [] and "gate.embeddings_MC" in gates["two-experts"]
    assert gates["token"] == [f"blocks.{block}.mlp.gate.weight" for block in EXPERT_LAYERS]
    for name, state in states.items():
        assert any(".mlp.shared." in key for key in state) == (name == "shared")
        assert any(".common." in key for key in state) == (name == "paths")
        assert all(f"blocks.{EXPERT_LAYERS[1]}.mlp.experts.{e}.fc1.weight" in state for e in range(4))
    assert len({losses(runs / f"{name}-two")[-1] for name in VARIANTS}) >= len(VARIANTS) - 2
    expert_ML = find(runs / "tied-two").routes.expert_ML
    assert (expert_ML[:, 0] == expert_ML[:, 1]).all()
    for name in VARIANTS:
        record = read_metrics(runs / f"{name}-two" / "metrics.jsonl")[-1]
        expected = {"importance", "token_load"} if "token" in name else {"moved", "layers"}
        expected |= {"distillation"} if name == "paths" else set() if "token" in name else {"imbalance", "balance"}
        assert expected <= set(record)
        assert (find(runs / f"{name}-two").manifest["routing"] is None) == ("token" in name)


def test_a_balanced_choice_keeps_loads_even(made: tuple[Path, dict[str, Told]]) -> None:
    """Six clusters of unequal sizes for four experts: none is idle, none has most of the images."""
    routes = find(made[0] / "sinkhorn-two").routes
    for expert_M in routes.expert_ML.T:
        load = np.bincount(expert_M, weights=routes.cluster_share_M, minlength=4)
        assert load.min() > 0 and load.max() < 0.5


def test_the_teacher_of_paths_is_the_dense_run_and_is_imitated(made: tuple[Path, dict[str, Told]]) -> None:
    run = made[0] / "paths-two"
    teacher, dense = (open_encoder(path, torch.device("cpu")) for path in (run / "teacher", made[0] / "dense"))
    assert teacher.fingerprint == dense.fingerprint
    distance = [record["distillation"] for record in read_metrics(run / "metrics.jsonl")]
    assert 0 < distance[-1] < distance[0]
