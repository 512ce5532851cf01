"""What DeepSpeed's own `save_checkpoint` writes of our models is read again exactly, and nothing in it is ever run.

Real engines write it in one and in two processes (`native_jobs`); the tests import it and compare.
"""

import dataclasses
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from harness import run_distributed
from native_jobs import BATCH, ELSEWHERE_LE, STEPS, save_all, save_and_import_all
from safetensors.torch import load_file
from tiny_run import CLUSTERS, EXPERT_LAYERS, TinyData, tiny_settings
from torch import Tensor

from moce_ds.checkpoint.format import OPTIMIZER, ROUTING, WEIGHTS, find
from moce_ds.common.config.settings import load
from moce_ds.common.errors import ArtefactError, ConfigError, MoceError
from moce_ds.common.storage.checksums import Findings
from moce_ds.common.storage.files import copy_tree, read_json
from moce_ds.data.clusters import Clusters
from moce_ds.exporting.write import export_route
from moce_ds.inspection import inspection
from moce_ds.models.mae import make_mlp
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.selection.routes import choose_cluster, routes_of
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.training.import_deepspeed_checkpoint import import_native
from moce_ds.training.pretrain import pretrain
from moce_ds.training.settings import PretrainSettings
from tests.examples.alone import ALONE
from tools.import_deepspeed import main

EVERYTHING = ["experts.k=2", "experts.combine=prob", "experts.shared_expert=true", "experts.embeddings=learnable"]
ONE: dict[str, list[str]] = {
    "mae-one": ["model.arch=mae"],
    "mae-one-bf16": ["model.arch=mae"],
    "moce-one": [],
    "moce-one-everything": EVERYTHING,
    "moce-one-random": ["experts.gate=random"],
    "token-one": ["model.arch=token_moe"],
}
TWO = {
    "mae-two": ["model.arch=mae", "engine.zero_stage=2"],
    "moce-two-ep1": ["experts.ep_size=1"],
    "moce-two-ep2": ["experts.ep_size=2"],
    "moce-two-elsewhere": ["experts.ep_size=2", "engine.zero_stage=2"],
    "token-two-ep1": ["model.arch=token_moe", "experts.ep_size=1"],
    "token-two-ep2": ["model.arch=token_moe", "experts.ep_size=2"],
}
ROUTED = [name for name in (*ONE, *TWO) if name.startswith("moce")]


@dataclass(frozen=True)
class Made:
    """`root/NAME` holds `native`, `imported`, `config.yaml` and what to expect; `losses` are those after importing."""

    root: Path
    losses: dict[str, float]

    def weights(self, name: str) -> dict[str, Tensor]:
        """What the engine held, all ranks together."""
        parts = sorted((self.root / name).glob("expected-*.safetensors"))
        return {key: tensor for part in parts for key, tensor in load_file(part).items()}

    def expected(self, name: str) -> dict[str, Any]:
        return read_json(self.root / name / "expected.json", "an expectation", "save_all")


@pytest.fixture(scope="module")
def made(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("native")

    def words(cases: dict[str, list[str]]) -> dict[str, list[str]]:
        return {
            name: tiny_settings(tiny_data.shards, root / name / "run", *other, clusters=tiny_data.clusters)
            for name, other in cases.items()
        }

    run_distributed(save_all, 2, words(TWO), root)
    losses = run_distributed(save_and_import_all, 1, words(ONE), list(TWO), root)[0]
    return Made(root, losses)


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_every_tensor_is_the_models_own(made: Made, name: str) -> None:
    checkpoint = find(made.root / name / "imported")
    got, expected = checkpoint.load(WEIGHTS), made.weights(name)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    experts = [key for key in got if ".mlp.experts." in key]
    assert len(experts) == (0 if "mae" in name else 4 * 4 * len(EXPERT_LAYERS))
    for block in EXPERT_LAYERS if experts else ():
        first, second = (got[f"blocks.{block}.mlp.experts.{e}.fc1.weight"] for e in (0, 1))
        assert not torch.equal(first, second), "experts that are all alike could be swapped unseen"
    manifest = checkpoint.manifest
    assert (checkpoint.step, manifest["images_read"]) == ((0, 0) if "bf16" in name else (STEPS, STEPS * BATCH))
    assert manifest["imported_from"]["precision"] == ("bfloat16" if "bf16" in name else "float32")
    assert manifest["imported_from"]["deepspeed"] == deepspeed.__version__
    assert checkpoint.names(OPTIMIZER) == [] and checkpoint.faults() == []


@pytest.mark.parametrize("name", [name for name in (*ONE, *TWO) if "bf16" not in name])
def test_a_model_that_starts_from_it_has_the_same_loss(made: Made, name: str) -> None:
    assert made.losses[name] == pytest.approx(made.expected(name)["loss"], abs=1e-6)


@pytest.mark.parametrize("name", ROUTED)
def test_the_run_folder_is_like_one_of_pretraining(made: Made, tiny_data: TinyData, name: str, tmp_path: Path) -> None:
    run = made.root / name / "imported"
    checkpoint, clusters = run_clusters(run)
    assert (run / ROUTING).read_bytes() == (checkpoint.folder / ROUTING).read_bytes()
    routes = routes_of(checkpoint)
    assert [list(route) for route in routes] == made.expected(name)["expert_ML"] and len(routes) == CLUSTERS
    assert clusters.hash == Clusters.open(tiny_data.clusters).hash
    if "everything" not in name:
        said = export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), tmp_path / "out", {})
        assert tuple(said["route"]) == routes[0] and said["max_difference"] < 1e-5
    assert load(PretrainSettings, run / "config.yaml").run.out == run


@pytest.mark.parametrize("name", ["mae-one", "moce-two-ep2", "token-two-ep2"])
def test_it_can_be_inspected_and_is_no_run_to_resume(made: Made, name: str) -> None:
    run = made.root / name / "imported"
    assert inspection.describe(run).row_count > 5
    assert inspection.findings(run) == Findings()
    with pytest.raises(ConfigError, match=r"run.out: .* without the optimizer's state.*run.init_from="):
        pretrain(load(PretrainSettings, run / "config.yaml", ["experts.ep_size=1"]), ALONE)


def test_experts_that_lie_elsewhere_bring_their_numbers(made: Made) -> None:
    """DeepSpeed names a file by the expert's place; the routes are by its number."""
    files = sorted((made.root / "moce-two-elsewhere/native").rglob("layer_*"))
    states = [torch.load(path, weights_only=True) for path in files]
    numbers = [int(tensor) for state in states for name, tensor in state.items() if name.endswith(".number")]
    assert numbers == np.argsort(ELSEWHERE_LE).ravel().tolist() != [0, 1, 2, 3] * 2


def test_deepspeed_loads_its_own_checkpoint_of_our_layer(made: Made) -> None:
    expected = made.expected("moce-two-elsewhere")
    loss, refused = expected["loaded"]
    assert loss == expected["loss"]
    assert "blocks.1.mlp.experts: got experts [1, 3], expected [0, 1]; call `set_local_experts` first." in refused


def test_a_layers_state_goes_out_and_in() -> None:
    layers = [ClusterMoE(lambda: make_mlp(8, 2.0), 4, 2, shared=True) for _ in range(2)]
    for layer in layers:
        layer.set_local_experts([3, 1])
    state = layers[0].state_dict()
    assert {name.split(".")[0] for name in state} == {"deepspeed_moe", "shared"}
    assert layers[1].load_state_dict(state).missing_keys == []
    mine, other = (dict(layer.named_parameters()) for layer in layers)
    assert "experts.0.fc1.weight" in mine and all(torch.equal(mine[name], other[name]) for name in mine)
    layers[1].set_local_experts([1, 3])
    with pytest.raises(RuntimeError, match=r"experts: got experts \[3, 1\], expected \[1, 3\]"):
        layers[1].load_state_dict(state)


def test_the_tool_says_what_it_made(made: Made, tmp_path: Path) -> None:
    source = made.root / "moce-two-ep2"
    words = [str(source / "native"), str(tmp_path / "out"), "--config", str(source / "config.yaml")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    out = " ".join(done.output.split())
    assert f"{tmp_path / 'out'}/checkpoints/step-00000002: the weights of step 2 (float32)" in out
    assert f"optimizer's state is left behind: start a new run from them with run.init_from={tmp_path / 'out'}" in out
    again = CliRunner().invoke(main, words)
    assert isinstance(again.exception, ConfigError) and "out exists: import into another" in str(again.exception)
    by_tag = CliRunner().invoke(main, [*words[:1], str(tmp_path / "b"), *words[2:], "--tag", "global_step2"])
    inner = CliRunner().invoke(main, [f"{words[0]}/global_step2", str(tmp_path / "c"), *words[2:]])
    assert by_tag.exit_code == inner.exit_code == 0
    hashes = [find(tmp_path / name).manifest["files"] for name in ("out", "b", "c")]
    assert hashes[0] == hashes[1] == hashes[2]


# Bad input. Each case spoils a copy of a good checkpoint.

SHARED = "mp_rank_00_model_states.pt"
EXPERT = "layer_1_expert_2_mp_rank_00_model_states.pt"
TAG = "global_step2"
NUMBER_2 = "blocks.3.mlp.deepspeed_moe.experts.deepspeed_experts.2.number"


Spoil = Callable[[Path], object]


def put(file: str, content: Callable[[dict[str, Any]], object]) -> Spoil:
    """Write what `content` makes of a file's content in its place."""

    def spoil(native: Path) -> None:
        with torch.serialization.safe_globals([Namespace]):
            found = torch.load(native / TAG / file, weights_only=True)
        torch.save(content(found), native / TAG / file)

    return spoil


def module(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the tensors of the shared file in place."""

    def content(found: dict[str, Any]) -> dict[str, Any]:
        change(found["module"])
        return found

    return put(SHARED, content)


def cut(file: str, left: int) -> Spoil:
    return lambda native: (native / TAG / file).write_bytes((native / TAG / file).read_bytes()[:left])


def latest(content: bytes) -> Spoil:
    return lambda native: (native / "latest").write_bytes(content)


def copied(source: str, target: str) -> Spoil:
    return lambda native: shutil.copy(native / TAG / source, native / TAG / target)


BAD: dict[str, tuple[Spoil, str]] = {
    "no latest": (lambda n: (n / "latest").unlink(), f"neither `latest` nor {SHARED}.*here: {TAG}"),
    "absent tag": (latest(b"global_step9"), f"holds no checkpoint 'global_step9'; folders here: {TAG}"),
    "tag elsewhere": (latest(b"../mae/global_step2"), "holds no checkpoint '../mae/global_step2'"),
    "tag above": (latest(b".."), r"holds no checkpoint '\.\.'"),
    "empty latest": (latest(b""), "holds no checkpoint ''"),
    "binary latest": (latest(b"\xff\x00a"), "holds no checkpoint"),
    "no shared file": (lambda n: (n / TAG / SHARED).unlink(), f"{SHARED} not found"),
    "ZeRO-3": (lambda n: (n / TAG / SHARED).rename(n / TAG / f"zero_pp_rank_0_{SHARED}"), f"{SHARED} not found"),
    "no expert": (lambda n: (n / TAG / EXPERT).unlink(), r"4 experts in each of 2 layers.*missing: layer 1 expert 2"),
    "more experts": (copied(EXPERT, EXPERT.replace("_2_", "_7_")), "not in the settings: layer 1 expert 7"),
    "shared cut short": (cut(SHARED, 5000), f"{SHARED} refused: .* damaged; no code was executed"),
    "expert cut short": (cut(EXPERT, -100), f"{EXPERT} refused: .* damaged; no code was executed"),
    "empty expert": (cut(EXPERT, 0), f"{EXPERT} refused"),
    "a list": (put(EXPERT, lambda _: [1]), f"{EXPERT} holds a list"),
    "no module": (put(SHARED, lambda c: {**c, "module": None}), f"{SHARED} holds no weights"),
    "no step": (put(SHARED, lambda c: {**c, "global_steps": "9"}), "global_steps is '9'"),
    "step beyond names": (put(SHARED, lambda c: {**c, "global_steps": 10**8}), "global_steps is 100000000"),
    "names that are no names": (put(EXPERT, lambda _: {3: torch.ones(2)}), "holds no weights"),
    "sparse": (put(EXPERT, lambda _: {"a": torch.eye(2).to_sparse()}), "holds no weights"),
    "complex": (module(lambda m: m.update(cls_token=m["cls_token"] + 1j)), "holds no weights"),
    "another expert": (
        copied(EXPERT.replace("_2_", "_1_"), EXPERT),
        r"missing blocks.3.mlp.experts.2.fc1.weight \(128, 32\)",
    ),
    "another number": (
        put(EXPERT, lambda c: {**c, NUMBER_2: torch.tensor(9)}),
        r"unexpected blocks.3.mlp.experts.9.fc1.weight",
    ),
    "another layer": (
        copied(EXPERT.replace("layer_1", "layer_0"), EXPERT),
        "expected one expert of block 3, found blocks.1.mlp",
    ),
    "empty file": (put(EXPERT, lambda _: {}), "expected one expert of block 3, found none"),
    "key missing": (module(lambda m: m.pop("norm.bias")), r"missing norm.bias \(32,\)"),
    "key extra": (module(lambda m: m.update(more=torch.ones(3))), r"unexpected more \(3,\)"),
    "wrong shape": (module(lambda m: m.update({"norm.bias": torch.ones(5)})), r"norm.bias is \(5,\), expected \(32,\)"),
    "other tables": (
        module(lambda m: m.update({"gate.embeddings_MC": m["gate.embeddings_MC"].flip(0)})),
        "other tables than those of the settings and clusters: gate.embeddings_MC",
    ),
    "tables missing": (module(lambda m: m.pop("share_M")), "clusters: share_M"),
}


@pytest.fixture
def native(made: Made, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made.root / "moce-two-ep2/native", tmp_path / "native"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_written(made: Made, native: Path, name: str) -> None:
    spoil, message = BAD[name]
    config = load(PretrainSettings, made.root / "moce-two-ep2/config.yaml")
    spoil(native)
    with pytest.raises(ArtefactError, match=f"(?s){message}"):
        import_native(native, native.parent / "out", config)
    assert [path.name for path in native.parent.iterdir()] == ["native"]


class Payload:
    """What unpickles to a call that writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("file", [SHARED, EXPERT])
@pytest.mark.parametrize("hide", [lambda p, _: p, lambda p, c: {**c, "more": p}, lambda p, _: Namespace(more=p)])
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(
    made: Made, native: Path, file: str, hide: Callable[[Payload, dict[str, Any]], object]
) -> None:
    witness = native.parent / "witness"
    put(file, lambda content: hide(Payload(witness), content))(native)
    config = load(PretrainSettings, made.root / "moce-two-ep2/config.yaml")
    with pytest.raises(ArtefactError, match=f"{file} refused: .*no code was executed"):
        import_native(native, native.parent / "out", config)
    assert [path.name for path in native.parent.iterdir()] == ["native"]
    torch.load(native / TAG / file, weights_only=False)  # the payload is a working one
    assert witness.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experts.num=2"], "2 experts in each of 2 layers.*not in the settings: layer 0 expert 2, layer 0 expert 3"),
        (["experts.layers=[1]"], "not in the settings: layer 1 expert 0"),
        (["experts.layers=[0, 3]"], "expected one expert of block 0, found blocks.1"),
        (["model.arch=mae"], "0 experts in each of 0 layers"),
        (["model.depth=5"], r"does not fit the model:.*missing blocks.4.norm1.weight \(32,\)"),
        (["model.width=16"], r"cls_token is \(1, 1, 32\), expected \(1, 1, 16\)"),
        (["experts.gate_sharing=tied"], r"unexpected gate.weights.1 \(4, 32\)"),
    ],
)
def test_settings_of_another_model_are_refused(made: Made, native: Path, words: list[str], message: str) -> None:
    config = load(PretrainSettings, made.root / "moce-two-ep2/config.yaml", words)
    with pytest.raises(ArtefactError, match=f"(?s){message}"):
        import_native(native, native.parent / "out", config)


def test_other_clusters_are_refused(made: Made, tiny_data: TinyData, native: Path) -> None:
    other = native.parent / "clusters"
    copy_tree(tiny_data.clusters, other)
    clusters = Clusters.open(other)
    dataclasses.replace(clusters, embeddings_MD=clusters.embeddings_MD[::-1]).write(other)
    words = [f"experts.clusters={other}"]
    config = load(PretrainSettings, made.root / "moce-two-ep2/config.yaml", words)
    with pytest.raises(
        ArtefactError, match=r"other tables .*: gate.embeddings_MC. Give .*experts.clusters of that run"
    ):
        import_native(native, native.parent / "out", config)


def test_faults_of_the_command_line(made: Made, native: Path) -> None:
    config = native.parent / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"arhc": "mae"}}))
    for words, message in (
        ([str(native), "out", "--config", str(config)], "Did you mean model.arch?"),
        ([str(native), "out", "--config", "absent.yaml"], "absent.yaml not found"),
        ([str(native / "absent"), "out", "--config", str(made.root / "mae-one/config.yaml")], "folders here: none"),
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1 and isinstance(done.exception, MoceError)
        assert message in " ".join(str(done.exception).split())
