"""Which experts `moce export` takes: by expert, all of them, averages; and options that do not go together.

Axes: L expert layers, M clusters, E experts.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moce_ds.checkpoint.format import ROUTING, Checkpoint, find, publish, step_folder
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.common.errors import ConfigError
from moce_ds.exporting import request
from moce_ds.exporting.write import export_route
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.moce import Moce
from moce_ds.models.parameters import load_weights_strict
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.selection.routes import choose_all, choose_average, choose_expert, routes_of
from moce_ds.selection.run_clusters import run_clusters
from tests.examples.moce_command import refused, run_here

MakeRun = Callable[..., Path]


def test_an_expert_s_route_is_the_one_that_most_images_take_through_it() -> None:
    """By the last layer; two small clusters on a route outweigh one that is larger than either."""
    routing = {"expert_ML": [[0, 1], [2, 1], [0, 1], [1, 0]], "cluster_share_M": [0.2, 0.3, 0.2, 0.3]}
    checkpoint = Checkpoint(Path("nowhere"), {"routing": routing})
    chosen = choose_expert(checkpoint, 1)
    assert chosen.experts == (0, 1) and chosen.clusters == {0: 0.5, 2: 0.5}
    assert choose_expert(checkpoint, 0).experts == (1, 0)
    with pytest.raises(ConfigError, match="no cluster takes 2 in the last expert layer; taken there: 0, 1"):
        choose_expert(checkpoint, 2)


def test_all_are_the_routes_that_are_taken(tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_moce_run()
    checkpoint, _ = run_clusters(run)
    routes = sorted(set(routes_of(checkpoint)))
    assert [chosen.experts for chosen in choose_all(checkpoint)] == routes and len(routes) > 1
    said = run_here("export", run, tmp_path / "experts", "--all")
    assert said.status == 0, said
    found = sorted(path.name for path in (tmp_path / "experts").iterdir())
    assert found == sorted(f"route-{'-'.join(map(str, route))}" for route in routes)
    for name in found:
        provenance = json.loads((tmp_path / "experts" / name / "provenance.json").read_text())
        assert (
            name == f"route-{'-'.join(map(str, provenance['route']))}" and str(tmp_path / "experts" / name) in said.out
        )


def test_all_are_replaced_if_asked(tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    command = ("export", tiny_moce_run(), tmp_path / "experts", "--all", "--replace")
    assert run_here(*command).status == 0
    route = next((tmp_path / "experts").iterdir())
    (route / "config.json").unlink()
    assert run_here(*command).status == 0 and (route / "config.json").exists()
    mine = route.rename(route.with_name("mine"))  # exports, but not of --all
    assert "experts exists" in refused(*command) and (mine / "config.json").exists()


@pytest.mark.parametrize("words", [["--cluster", "0"], ["--all"]])
@pytest.mark.parametrize("place", ["file/sub", "/proc/none/sub"])
def test_a_place_that_cannot_be_written(tiny_moce_run: MakeRun, tmp_path: Path, words: list[str], place: str) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / place
    assert refused("export", tiny_moce_run(), out, *words).startswith(f"{out} cannot be written: ")


@pytest.mark.parametrize("how", ["uniform", "weighted"])
@pytest.mark.parametrize("histogram", [None, {1: 0.75, 4: 0.25}], ids=["training set", "task"])
def test_an_average_is_that_of_the_experts_that_images_take(
    tiny_moce_run: MakeRun, tmp_path: Path, how: str, histogram: dict[int, float] | None
) -> None:
    """Against sums written out by hand."""
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=prob"))
    said = export_route(checkpoint, clusters, choose_average(checkpoint, how, histogram), tmp_path / "out", {})
    shares = histogram or dict(enumerate(clusters.share_M))
    model = build_model(ModelSpec.from_tree(checkpoint.manifest["model"]), clusters, ReferenceMoE)
    weights = checkpoint.load("weights")
    load_weights_strict(dict(model.named_parameters()), weights, "the test")
    assert isinstance(model, Moce)
    probs_LME, state = model.gate().detach(), load_file(tmp_path / "out" / "model.safetensors")
    for layer, block in enumerate((0, 2)):
        taken = {c: routes_of(checkpoint)[c][layer] for c in shares}
        experts = set(taken.values())
        expected = {"fc1.weight": torch.zeros(64, 16), "fc2.bias": torch.zeros(16)}
        for expert in experts:
            total = sum(share for c, share in shares.items() if taken[c] == expert)
            gate = sum(shares[c] / total * probs_LME[layer, c, expert] for c in shares if taken[c] == expert)
            weight = 1 / len(experts) if how == "uniform" else total
            assert said["experts"][layer][str(expert)]["weight"] == pytest.approx(weight, rel=1e-6)
            for rest, tensor in expected.items():
                factor = weight * (gate if rest == "fc2.bias" else 1)
                tensor += factor * weights[f"blocks.{block}.mlp.experts.{expert}.{rest}"]
        for rest, tensor in expected.items():
            assert (state[f"blocks.{block}.mlp.{rest}"] - tensor).abs().max() < 1e-6
    assert said["route"] is None and said["average"] == how and said["exact_for"].startswith("nothing")
    assert said["clusters"] == pytest.approx({str(c): s for c, s in shares.items()}, rel=1e-6)


def test_a_task_averages_by_its_votes(tiny_moce_run: MakeRun, tiny_images: Path, tmp_path: Path) -> None:
    run = tiny_moce_run()
    data = ("--data", tiny_images / "digits")
    for name, words in (("auto", ("--route", "auto")), ("plain", ()), ("soup", ("--average", "weighted"))):
        said = run_here("export", run, tmp_path / name, *data, *words)
        assert said.status == 0, said
    told = {n: json.loads((tmp_path / n / "provenance.json").read_text()) for n in ("auto", "plain", "soup")}
    assert told["auto"] == told["plain"] and told["auto"]["route"] == told["auto"]["votes"]["route"]
    assert told["soup"]["clusters"] == told["soup"]["votes"]["clusters"] and told["soup"]["route"] is None
    assert "weighted average of step 5" in said.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--expert 7", "--expert: no cluster takes 7 in the last expert layer; taken there: "),
        ("--route auto", "--route auto: the images of --data choose the route"),
        (
            "--all --cluster 0",
            "Got --cluster and --all: choose a route with one of --data, --cluster, --route, --expert",
        ),
        (
            "--data {images} --cluster 0",
            "--data: --cluster takes no images; use --data with --route auto or --average.",
        ),
        ("--average mean", "--average: got 'mean'; expected uniform or weighted."),
    ],
)
def test_options_that_cannot_be(
    tiny_moce_run: MakeRun, tiny_images: Path, tmp_path: Path, words: str, told: str
) -> None:
    run = tiny_moce_run()
    before = sorted(tmp_path.iterdir())
    given = (word.format(images=tiny_images) for word in words.split())
    assert told in refused("export", run, tmp_path / "out", *given)
    assert sorted(tmp_path.iterdir()) == before


def test_shares_of_a_layer_sum_to_1(tiny_moce_run: MakeRun) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run())
    for how in ("uniform", "weighted"):
        for layer in choose_average(checkpoint, how, dict(enumerate(clusters.share_M))).layers:
            assert sum(sum(voices.values()) for voices in layer.values()) == pytest.approx(1)


def test_a_checkpoint_of_another_version_is_refused(tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_moce_run()
    manifest = find(run).folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("moce_ds checkpoint 3", "moce_ds checkpoint 9"))
    told = refused("export", run, tmp_path / "out", "--cluster", 0)
    assert "format 'moce_ds checkpoint 9'; this version reads 'moce_ds checkpoint 3'" in told
    assert not (tmp_path / "out").exists()


def test_an_expert_s_damaged_file_is_named_and_nothing_written(tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_moce_run()
    checkpoint = find(run)
    expert = routes_of(checkpoint)[0][1]
    file = checkpoint.folder / "weights" / f"block-02-expert-{expert:03d}.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    assert f"{file} is damaged" in refused("export", run, tmp_path / "exports" / "out", "--cluster", 0)
    assert "is damaged" in refused("export", run, tmp_path / "exports" / "all", "--all")
    assert list((tmp_path / "exports").iterdir()) == []


def test_an_export_reads_one_checkpoint_of_a_run_that_still_trains(
    tiny_moce_run: MakeRun, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = tiny_moce_run(), request.opened_images

    def save_another_step(path: Path) -> Any:
        first = find(run)
        shutil.copytree(first.folder, run / "draft")
        table = RoutingTable.read(first.folder / ROUTING)
        other = replace(table, step=10, expert_ML=(table.expert_ML + 1) % 4)
        publish(run / "draft", step_folder(run, 10), {**first.manifest, "step": 10, "routing": other})
        return opened(path)

    def exported(out: Path) -> Any:
        assert run_here("export", run, out, "--data", tiny_images).status == 0
        provenance = json.loads((out / "provenance.json").read_text())
        return provenance["step"], provenance["route"], provenance["votes"]

    expected = exported(tmp_path / "alone")
    monkeypatch.setattr(request, "opened_images", save_another_step)
    assert exported(tmp_path / "meanwhile") == expected and find(run).step == 10
