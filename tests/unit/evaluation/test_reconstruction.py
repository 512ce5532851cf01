"""The three errors of a run on held-out images: own routes, the selected route, and a dense twin's.

Axes: M clusters, L expert layers, E experts.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from moce_ds.checkpoint.format import ROUTING, WEIGHTS, find, step_folder, write_checkpoint
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.cli.main import moce
from moce_ds.common.errors import ArtefactError
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.evaluation.reconstruction import Reconstructions, RoutedImages, evaluate_run, load_whole, run_routes
from moce_ds.models.build import ModelSpec
from moce_ds.models.moce import upcycle
from moce_ds.selection.routes import routes_of
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.selection.vote import count_votes, label_images, select_route

CPU = torch.device("cpu")


def with_weights(run: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A newer checkpoint in `run` with other weights."""
    old = find(run)
    step = old.step + 1
    manifest = {**old.manifest, "step": step, "routing": RoutingTable.read(old.folder / ROUTING)}
    write_checkpoint(step_folder(run, step), change(old.load(WEIGHTS)), {}, manifest)
    return run


def evaluated(run: Path, shards: Path, dense: Path | None = None, batch_size: int = 16) -> Reconstructions:
    checkpoint, clusters = run_clusters(run)
    images, config = ShardSet.open(shards), EncodeSettings(batch_size=batch_size, threads=1)
    clusters_N, _ = label_images(checkpoint, clusters, images, config, CPU)
    # From the weights, which a test may have changed after they were recorded.
    expert_MLK = run_routes(load_whole(checkpoint, clusters), checkpoint)  # type: ignore[arg-type]
    task = RoutedImages(images, clusters_N, count_votes(clusters_N, expert_MLK[:, :, 0]).route)
    return evaluate_run(checkpoint, clusters, task, dense, config, CPU)


def test_images_on_their_own_routes_differ_from_the_selected_one(
    tiny_moce_run: Callable[..., Path], tiny_shards: Path
) -> None:
    run = tiny_moce_run()
    found = evaluated(run, tiny_shards)
    assert found.n_images == 60 and found.dense is None and found.own != found.selected
    assert found.route == select_route(run, ShardSet.open(tiny_shards), EncodeSettings(threads=1), CPU).route
    again = evaluated(run, tiny_shards, batch_size=60)
    assert (again.own, again.selected) == pytest.approx((found.own, found.selected), rel=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_where_all_clusters_share_a_route_own_is_selected(
    tiny_moce_run: Callable[..., Path], tiny_shards: Path, k: int
) -> None:
    def same_for_all(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * (not name.startswith("gate.")) for name, tensor in weights.items()}

    run = with_weights(tiny_moce_run(f"experts.k={k}"), same_for_all)
    found = evaluated(run, tiny_shards)
    assert found.own == pytest.approx(found.selected, rel=1e-7)


def test_with_copies_of_a_dense_mae_all_three_are_the_same(
    tiny_moce_run: Callable[..., Path], tiny_mae_run: Path, tiny_shards: Path
) -> None:
    def copies(weights: dict[str, Tensor], perturbation: float = 0.0) -> dict[str, Tensor]:
        spec = ModelSpec.from_tree(find(run).manifest["model"])
        assert spec.experts is not None
        gates = {name: tensor for name, tensor in weights.items() if name.startswith("gate.")}
        return upcycle(find(tiny_mae_run).load(WEIGHTS), spec.experts, perturbation, seed=0) | gates

    run = tiny_moce_run("experts.combine=straight_through")
    found = evaluated(with_weights(run, copies), tiny_shards, tiny_mae_run)
    assert found.dense is not None
    assert found.own == pytest.approx(found.dense, abs=1e-6)
    assert found.selected == pytest.approx(found.dense, abs=1e-6)
    other = evaluated(with_weights(run, lambda weights: copies(weights, 0.5)), tiny_shards, tiny_mae_run)
    assert other.dense == found.dense and abs(other.own - found.dense) > 1e-4


@pytest.mark.parametrize("balance", ["loss", "sinkhorn"])
def test_the_choice_of_experts_is_that_of_training(tiny_moce_run: Callable[..., Path], balance: str) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run(f"experts.balance={balance}"))
    model = load_whole(checkpoint, clusters)
    expert_MLK = run_routes(model, checkpoint)  # type: ignore[arg-type]
    np.testing.assert_array_equal(expert_MLK[:, :, 0], checkpoint.routes.expert_ML)


def test_a_random_table_is_rebuilt_from_its_seed(tiny_moce_run: Callable[..., Path], tiny_shards: Path) -> None:
    run = tiny_moce_run("experts.gate=random", "run.seed=4")
    assert evaluated(run, tiny_shards).route in set(routes_of(find(run)))


def test_what_is_no_dense_twin_is_refused(
    tiny_moce_run: Callable[..., Path], tiny_mae_run: Path, tiny_shards: Path
) -> None:
    run = tiny_moce_run()
    with pytest.raises(ArtefactError, match=r"--dense: .*run has experts; expected the run of a dense MAE\."):
        evaluated(run, tiny_shards, run)
    with pytest.raises(ArtefactError, match="is a dense run"):
        evaluated(tiny_mae_run, tiny_shards)


def test_the_verb_prints_ratios_and_adds_a_record(
    tiny_moce_run: Callable[..., Path], tiny_mae_run: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    words = [
        str(tiny_moce_run()),
        "--data",
        str(tiny_shards),
        "--dense",
        str(tiny_mae_run),
        "--task",
        "mine",
        "threads=1",
    ]
    ran = CliRunner().invoke(moce, ["evaluate", *words, "--results", str(tmp_path / "results.json")])
    assert ran.exit_code == 0, ran.output
    title, *lines = ran.stdout.splitlines()
    assert title.strip() == "mine: reconstruction of 60 held-out images"
    heading, *rows = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines if line[0] in "┃│"]
    assert heading == ["model", "mean squared error", "ratio to dense twin", "PSNR minus dense twin's"]
    assert [row[0] for row in rows] == ["dense twin", "selected route", "own routes"]
    assert rows[0][2:] == ["1.0000", "+0.00 dB"]
    for _, error, ratio, gain in rows:
        assert float(error) / float(rows[0][1]) == pytest.approx(float(ratio), abs=2e-4)
        assert float(gain.removesuffix(" dB")) == pytest.approx(-10 * np.log10(float(ratio)), abs=0.01)
    assert "lower is better" in " ".join(ran.stdout.split()) and max(map(len, lines)) <= 100
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["verb"] == "evaluate" and record["task"] == "mine" and record["n_images"] == 60
    assert {"selected", "own", "dense", "route"} <= set(record)
