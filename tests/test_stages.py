"""All stages one after the other on 60 images, as a user runs them; asserting on what the files hold."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from moce_ds.checkpoint.format import find, steps_of
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.cli.stages.registry import run_verb
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.features import encode_all
from moce_ds.encoders.open import open_encoder
from moce_ds.encoders.settings import EncodeSettings
from tests.examples.alone import ALONE
from tests.examples.moce_command import TINY, Said, refused, run_alone, run_here

STEPS = 8  # 2 epochs of 60 images, 16 at a time
EXPERTS, LAYERS, CLUSTERS = 4, (1, 3), 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chain:
    """Folders that the stages wrote, and what each command said."""

    root: Path
    said: dict[str, Said]

    def __truediv__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def task(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task in two folders of images: digits or not, every other image for testing."""
    folder = tmp_path_factory.mktemp("task")
    for label in ("digits", "flower"):
        for number, image in enumerate(sorted((tiny_images / label).iterdir())):
            place = folder / ("test" if number % 2 else "train") / label
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place)
    return folder


@pytest.fixture(scope="module")
def chain(tiny_images: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All stages, one after the other, each in a process of its own."""
    root = tmp_path_factory.mktemp("chain")
    results = ("--results", root / "results.json", "--task", "digits")
    split = ("--train", task / "train", "--test", task / "test")
    tiny = (TINY, f"data.shards={root}/shards")
    experts = ("model.arch=moce", f"experts.clusters={root}/clusters", f"experts.num={EXPERTS}", "experts.layers=[1,3]")
    stages: dict[str, tuple[object, ...]] = {
        "shards": (tiny_images, root / "shards", "images_per_shard=25"),
        "pretrain": (*tiny, f"run.out={root}/mae"),
        "features": (root / "mae", root / "shards", root / "features", "block_rows=50"),
        "cluster": (
            root / "features", root / "clusters", "--shards", root / "shards", f"num_clusters={CLUSTERS}",
            "fit_images_per_cluster=null",
        ),
        "pretrain moce": (*tiny, f"run.out={root}/moce", f"run.init_from={root}/mae", *experts),
        "select": (root / "moce", "--data", task / "train", *results),
        "export": (root / "moce", root / "expert", "--data", task / "train"),
        "export dense": (root / "mae", root / "dense"),
        "knn": (root / "expert", *split, *results),
        "probe": (root / "expert", *split, *results),
        "knn dense": (root / "mae", *split, *results, "--model", "dense"),
        "report": (root,),
    }  # fmt: skip
    said = {}
    for stage, words in stages.items():
        verb = stage.split()[0]
        said[stage] = run_alone(verb, *words) if verb == "pretrain" else run_here(verb, *words)
        assert said[stage].status == 0, (stage, said[stage])
    return Chain(root, said)


def next_words(said: Said) -> list[str]:
    """The words of the command that a verb has named last."""
    wrote, _, command = said.err.splitlines()[-1].partition("Next: moce ")
    assert command and (wrote == "" or wrote.startswith("Wrote ")), said
    return shlex.split(command)


def test_every_stage_names_its_result_and_the_next_command(chain: Chain) -> None:
    mae, moce, clusters, shards = (chain / name for name in ("mae", "moce", "clusters", "shards"))
    expected = {
        "shards": ["pretrain", f"data.shards={shards}", f"run.out={mae}"],
        "pretrain": ["features", mae, shards, chain / "features"],
        "features": ["cluster", chain / "features", clusters, "--shards", shards],
        "pretrain moce": ["select", moce, "--data", "FOLDER"],
    }
    for stage, words in expected.items():
        assert next_words(chain.said[stage]) == list(map(str, words))
        assert f"Wrote {chain / stage}. Next" in chain.said[stage].err or "pretrain" in stage
    planned = run_here(*next_words(chain.said["cluster"]), "--dry-run")
    assert planned.status == 0 and f"moce -> {moce}" in planned.out, planned


def test_the_next_commands_can_be_pasted(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    said = chain.said["select"]
    for verb in ("export", "knn", "probe"):
        words = next_words(said)
        said = run_here(*words)
        assert (words[0], said.status) == (verb, 0), said
    assert next_words(said)[:2] == ["finetune", str(chain / "expert-digits")]
    assert chain.said["report"].err.endswith(f"Wrote {chain / 'report.html'}.\n")
    assert run_here("--quiet", "report", chain.root).err == ""
    run_verb(["report", chain.root])  # as a workflow does
    assert "Wrote" not in capsys.readouterr().err


def records(chain: Chain, verb: str) -> dict[str, dict[str, Any]]:
    """Records of results.json of one verb, by model."""
    found = json.loads((chain / "results.json").read_text())
    return {record.get("model", ""): record for record in found if record["verb"] == verb}


def test_shards_hold_every_image(chain: Chain, tiny_images: Path) -> None:
    shards = ShardSet.open(chain / "shards")
    assert (shards.count, len(shards.shards)) == (60, 3)
    assert shards.classes == ["china", "digits", "flower"]
    assert {shards.source(i) for i in range(60)} == {
        str(path.relative_to(tiny_images)) for path in tiny_images.rglob("*.*")
    }
    assert "60" in chain.said["shards"].out


def test_runs_are_complete(chain: Chain) -> None:
    for run in ("mae", "moce"):
        assert [record["step"] for record in read_metrics(chain / run / "metrics.jsonl")] == list(range(1, STEPS + 1))
        assert steps_of(chain / run) == [STEPS]
        assert list((chain / run / "tensorboard").iterdir())
        assert (chain / run / "reconstructions" / f"step-{STEPS:08d}.png").is_file()
    assert f"Starting from {chain / 'mae'}." in chain.said["pretrain moce"].err
    assert f"{STEPS} steps of 16 images = 1 processes x 1 parts x 16" in chain.said["pretrain"].err


def test_everything_that_the_stages_wrote_is_verified(chain: Chain) -> None:
    for name in ("shards", "mae", "features", "clusters", "moce", "expert", "dense", "results.json"):
        said = run_here("inspect", chain / name, "--verify")
        assert (said.status, said.out.splitlines()[-1]) == (0, "Verified: everything is as it was written."), said


def test_the_moce_starts_as_the_dense_model(chain: Chain) -> None:
    """On the same first batch: experts are copies of the MLPs but for 2% of noise, passed on as they are."""
    dense, experts = (read_metrics(chain / run / "metrics.jsonl") for run in ("mae", "moce"))
    untrained, trained, start = (r["reconstruction"] for r in (dense[0], dense[-1], experts[0]))
    assert start < (untrained + trained) / 2


def test_features_are_those_of_the_encoder(chain: Chain) -> None:
    features, shards = FeatureSet.open(chain / "features"), ShardSet.open(chain / "shards")
    expected = encode_all(open_encoder(chain / "mae", CPU), shards, EncodeSettings(), ALONE).numpy()
    assert features.identity.shards_fingerprint == shards.fingerprint
    np.testing.assert_allclose(features.all(), expected, rtol=1e-2, atol=1e-3)


def test_clusters_label_every_image(chain: Chain) -> None:
    clusters, features = Clusters.open(chain / "clusters"), FeatureSet.open(chain / "features")
    ids_N = load_ids(chain / "clusters", features.identity.shards_fingerprint, 60)
    assert (
        np.array_equal(np.bincount(ids_N, minlength=CLUSTERS), clusters.sizes_M) and len(clusters.sizes_M) == CLUSTERS
    )
    assert np.array_equal(clusters.assign(features.all()), ids_N)
    assert "NMI" in chain.said["cluster"].out and "purity" in chain.said["cluster"].out


def test_the_run_keeps_its_clusters_and_routes(chain: Chain) -> None:
    assert Clusters.open(chain / "moce" / "clusters").hash == Clusters.open(chain / "clusters").hash
    checkpoint = find(chain / "moce")
    path, beside = checkpoint.folder / "routing.safetensors", chain / "moce" / "routing.safetensors"
    assert beside.read_bytes() == path.read_bytes() and not (chain / "moce" / "routing.json").exists()
    table, tensors = RoutingTable.read(path), load_file(path)
    assert table.step == STEPS and np.array_equal(table.expert_ML, checkpoint.routes.expert_ML)
    expert_ML, probs_LME = tensors["expert_ML"], tensors["probs_LME"]
    assert expert_ML.shape == (CLUSTERS, len(LAYERS)) and np.array_equal(probs_LME.argmax(-1).T, expert_ML)
    np.testing.assert_allclose(probs_LME.sum(-1), 1, atol=1e-5)


def test_the_selected_route_wins_the_vote(chain: Chain, task: Path) -> None:
    (record,) = records(chain, "select").values()
    clusters = Clusters.open(chain / "clusters")
    table = find(chain / "moce").routes.expert_ML
    shards = ShardSet.open(chain / "shards")
    images = {f"digits/{path.name}" for path in (task / "train/digits").iterdir()}
    images |= {f"flower/{path.name}" for path in (task / "train/flower").iterdir()}
    ids = [i for i in range(60) if shards.source(i) in images]
    routes = [tuple(table[c]) for c in clusters.assign(FeatureSet.open(chain / "features").rows(np.array(ids)))]
    winner = min(set(routes), key=lambda route: (-routes.count(route), route))
    assert record["n_images"] == len(images) == 20
    assert (tuple(record["route"]), record["share"]) == (winner, pytest.approx(routes.count(winner) / 20))
    assert f"{record['share']:.1%}" in chain.said["select"].out


def test_the_export_is_timm_s_vit_on_that_route(chain: Chain) -> None:
    (record,) = records(chain, "select").values()
    provenance = json.loads((chain / "expert" / "provenance.json").read_text())
    assert provenance["route"] == record["route"] == provenance["votes"]["route"]
    assert provenance["step"] == STEPS and provenance["max_difference"] < 1e-5
    assert provenance["clusters_hash"] == Clusters.open(chain / "clusters").hash
    assert sum(provenance["clusters"].values()) == pytest.approx(1)
    config = json.loads((chain / "expert" / "config.json").read_text())
    state = load_file(chain / "expert" / "model.safetensors")
    VisionTransformer(**config["timm"]).load_state_dict(state, strict=True)
    trained = find(chain / "moce").load("weights")
    for layer, expert in zip(LAYERS, record["route"], strict=True):
        own = trained[f"blocks.{layer}.mlp.experts.{expert}.fc1.weight"]
        assert torch.equal(state[f"blocks.{layer}.mlp.fc1.weight"], own)


def test_the_dense_export_is_the_run_s_encoder(chain: Chain) -> None:
    state, trained = load_file(chain / "dense" / "model.safetensors"), find(chain / "mae").load("weights")
    assert all(torch.equal(state[name], trained[name]) for name in state if name != "pos_embed")


def test_accuracies_are_on_record(chain: Chain) -> None:
    """Digits are told from flowers by anything that has learned to see at all."""
    assert set(records(chain, "knn")) == {"expert", "dense"} and set(records(chain, "probe")) == {"expert"}
    for verb in ("knn", "probe"):
        for model, record in records(chain, verb).items():
            assert (record["task"], record["n_train"], record["n_test"]) == ("digits", 20, 20)
            assert record["top1"] == record["mean_per_class"] >= 0.75, (verb, model)  # ten images of each class
    assert f"top-1 {records(chain, 'probe')['expert']['top1']:.4f}" in chain.said["probe"].out


def test_the_report_is_one_page(chain: Chain) -> None:
    page = (chain / "report.html").read_text()
    assert chain.said["report"].out.strip() == str(chain / "report.html")
    assert not re.search(r"""(src|href)=["']?https?:""", page), "nothing is fetched"
    (record,) = records(chain, "select").values()
    for told in ("mae", "moce", "digits", "-".join(map(str, record["route"])), "data:image/"):
        assert told in page


def test_results_replace_their_own_kind_only(chain: Chain, task: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    shutil.copy(chain / "results.json", results)
    words = ("--train", task / "train", "--test", task / "test", "--results", results, "--task", "digits")
    assert run_here("knn", chain / "expert", *words).status == 0
    before, after = (json.loads(path.read_text()) for path in (chain / "results.json", results))
    assert sorted(before, key=str) == sorted(after, key=str)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", r"{moce} has experts: choose a route with one of --data, --cluster, --route"),
        ("--cluster 0 --route 1,1", "choose a route with one of --data, --cluster, --route"),
        ("--cluster 5", "--cluster: got 5; the run has clusters 0 to 4"),
        ("--route 1", "--route: no cluster takes 1; routes of this run: "),
        ("--route 9,9", "--route: no cluster takes 9-9; routes of this run: [0-3]-[0-3]"),
        ("--route one", "--route: got 'one'; expected one expert per layer, such as 3-5"),
    ],
)
def test_export_needs_one_possible_choice(chain: Chain, tmp_path: Path, words: str, told: str) -> None:
    message = refused("export", chain / "moce", tmp_path / "out", *words.split())
    assert re.search(told.format(moce=chain / "moce"), message), message
    assert list(tmp_path.iterdir()) == []


def test_export_by_cluster_and_by_route(chain: Chain, tmp_path: Path) -> None:
    table = find(chain / "moce").routes.expert_ML
    route = ",".join(map(str, table[2]))
    assert run_here("export", chain / "moce", tmp_path / "cluster", "--cluster", 2).status == 0
    assert run_here("export", chain / "moce", tmp_path / "route", "--route", route).status == 0
    by_cluster, by_route = (load_file(tmp_path / name / "model.safetensors") for name in ("cluster", "route"))
    assert all(torch.equal(by_cluster[name], by_route[name]) for name in by_cluster)
    provenance = json.loads((tmp_path / "cluster" / "provenance.json").read_text())
    assert provenance["route"] == table[2].tolist() and provenance["clusters"] == {"2": 1.0}


def test_nothing_is_overwritten(chain: Chain, tmp_path: Path) -> None:
    before = (chain / "expert" / "model.safetensors").read_bytes()
    assert f"{chain / 'expert'} exists" in refused("export", chain / "moce", chain / "expert", "--average", "uniform")
    assert f"{chain / 'dense'} exists" in refused("export", chain / "mae", chain / "dense", "--format", "hf-vit")
    message = refused("cluster", chain / "features", chain / "clusters", "num_clusters=3")
    assert "num_clusters: 5 there, 3 now" in message
    assert (chain / "expert" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("export {mae} {out} --cluster 0", "--cluster: {mae} is a dense run"),
        ("select {mae} --data {shards}", "{mae} is a dense run: it has no routes"),
        ("features {moce} {shards} {out}", "holds experts: choose one with `moce export`"),
        ("cluster {features} {out} num_clusters=61", "num_clusters=61 is more than the 60 images"),
        (
            "pretrain {tiny} data.shards={shards} run.out={out} run.init_from={moce}",
            "run.init_from: {moce} holds experts",
        ),
        ("pretrain {tiny} data.shards={shards} run.out={mae} optim.epochs=3", "optim.epochs: 2.0 -> 3.0"),
    ],
)
def test_what_does_not_fit_is_refused(chain: Chain, tmp_path: Path, words: str, told: str) -> None:
    places = {name: chain / name for name in ("mae", "moce", "shards", "features")}
    places |= {"tiny": TINY, "out": tmp_path / "out"}
    assert told.format(**places) in refused(*(word.format(**places) for word in words.split()))


@pytest.mark.parametrize(
    ("name", "kind", "told", "flipped"),
    [
        ("shards", "shard set", "60 in 3 shards", "shard-000001.tar"),
        ("features", "features", "60 of width 32, float16", "block-000000.npy"),
        ("clusters", "clusters", "5 of width 32, by sinkhorn", "encoder/model.safetensors"),
        ("clusters", "clusters", "5 of width 32, by sinkhorn", "clusters.safetensors"),
        ("mae", "run", "step 8, loss", f"checkpoints/step-{STEPS:08d}/optimizer/shared.safetensors"),
        (
            f"moce/checkpoints/step-{STEPS:08d}",
            "checkpoint",
            "4 in each of blocks 1, 3",
            "weights/block-01-expert-002.safetensors",
        ),
        ("expert", "encoder", "4 blocks, width 32, patch 4, 16 px", "model.safetensors"),
        ("results.json", "results", "probe digits expert", None),
    ],
)
def test_inspect(chain: Chain, tmp_path: Path, name: str, kind: str, told: str, flipped: str | None) -> None:
    said = run_here("inspect", chain / name, "--verify")
    assert said.status == 0, said
    assert f": {kind}" in " ".join(said.out.split()) and told in said.out
    assert "Verified: everything is as it was written." in said.out
    if flipped is None:
        return
    copy = tmp_path / Path(name).name
    shutil.copytree(chain / name, copy)
    _flip_a_bit(copy / flipped)
    said = run_here("inspect", copy, "--verify")
    assert said.status == 1 and "Traceback" not in said.err
    assert Path(flipped).name in said.out + said.err
    assert "Verified" not in said.out


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.unlink()  # artefacts may be hard links
    path.write_bytes(content)
