"""Bad input as a user meets it: what is wrong is named with what to do, status 1, nothing half written, nothing run.

Each kind of damage is tested beside the code that finds it; here are those that a whole command has to find.
"""

import json
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from moce_ds.checkpoint.format import WEIGHTS, find
from moce_ds.common.config.settings import to_yaml
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.features import write_features
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.models.vit import load_encoder, save_encoder
from moce_ds.training.settings import PretrainSettings
from tests.examples.alone import ALONE
from tests.examples.moce_command import TINY, refused, run_here

MoceRun = Callable[..., Path]


class Payload:
    """What unpickles to a call that makes a folder."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.witness,)


@pytest.fixture
def other_shards(tiny_images: Path, tmp_path: Path) -> Path:
    """A shard set of some of the tiny images: 20 of 60."""
    write_shards(tiny_images / "digits", tmp_path / "other", ShardSettings(workers=1))
    return tmp_path / "other"


@pytest.fixture
def other_encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """An encoder of the same size whose weights are other ones, itself without a fault."""
    encoder, folder = load_encoder(tiny_encoder), tmp_path / "other encoder"
    folder.mkdir()
    state = encoder.model.state_dict()
    state["norm.weight"] += 1e-3
    save_encoder(folder, state, encoder.shape, encoder.input, encoder.provenance)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def exchange_encoder(folder: Path, encoder: Path) -> None:
    """Put another encoder into a features or clusters folder."""
    shutil.rmtree(folder / "encoder")
    shutil.copytree(encoder, folder / "encoder")


@pytest.fixture
def begun(
    tiny_moce_run: MoceRun, tiny_config: Callable[..., PretrainSettings], tiny_clusters: Path, tmp_path: Path
) -> Path:
    """The run folder of a MoCE as pre-training leaves it at a stop, its shards and clusters its own copies."""
    clusters = shutil.copytree(tiny_clusters, tmp_path / "clusters")
    shards = shutil.copytree(tiny_config().data.shards, tmp_path / "shards")
    words = (f"data.shards={shards}", f"experts.clusters={clusters}")
    run = tiny_moce_run(*words)
    config = tiny_config("model.arch=moce", "experts.num=4", *words)
    (run / "config.yaml").write_text(to_yaml(config))
    return run


# A new run


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "run/model.safetensors"])
def test_pickles_are_not_executed(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"model": Payload(witness)}))
    given = path.parent if "/" in name else path
    message = refused(
        "pretrain", TINY, f"data.shards={tiny_shards}", f"run.out={tmp_path}/out", f"run.init_from={given}"
    )
    assert re.search(
        rf"(run.init_from: {path} refused: it contains objects|{path} is damaged .*: run.init_from expects)",
        message,
    ), message
    assert not witness.exists() and not (tmp_path / "out" / "config.yaml").exists()


def test_every_weight_that_does_not_fit_is_listed(begun: Path, tiny_shards: Path, tmp_path: Path) -> None:
    dense = {name: t for name, t in find(begun).load(WEIGHTS).items() if "experts" not in name and "gate" not in name}
    words = yaml.safe_load((begun / "config.yaml").read_text())["model"]
    sizes = [f"model.{k}={v}" for k, v in words.items() if v is not None and k not in ("arch", "vit")]
    del dense["norm.weight"], dense["blocks.1.norm1.bias"]
    save_file(dense | {"head.scale": torch.ones(3), "cls_token": torch.ones(1, 1, 5)}, tmp_path / "w.safetensors")
    message = refused(
        "pretrain", TINY, *sizes, f"data.shards={tiny_shards}", f"run.out={tmp_path}/out",
        f"run.init_from={tmp_path}/w.safetensors",
    )  # fmt: skip
    for told in (
        "missing norm.weight (16,)", "missing blocks.1.norm1.bias (16,)", "missing blocks.0.mlp.fc1.weight (64, 16)",
        "unexpected head.scale (3,)", "cls_token is (1, 1, 5), expected (1, 1, 16)",
    ):  # fmt: skip
        assert f"\n  {told}\n" in message
    assert not (tmp_path / "out" / "config.yaml").exists()


def moce_words(shards: Path, clusters: Path, out: Path) -> list[object]:
    return [TINY, f"data.shards={shards}", f"run.out={out}", "model.arch=moce", f"experts.clusters={clusters}"]


def test_clusters_of_other_images(tiny_clusters: Path, other_shards: Path, tmp_path: Path) -> None:
    message = refused("pretrain", *moce_words(other_shards, tiny_clusters, tmp_path / "out"))
    told = r"{} labels another shard set \(\w{{12}}, 60 images\) than the one in use \(\w{{12}}, 20 images\): run `moce"
    assert re.match(told.format(tiny_clusters), message), message
    assert not (tmp_path / "out").exists()


def test_clusters_whose_encoder_was_exchanged(
    tiny_clusters: Path, tiny_shards: Path, other_encoder: Path, tmp_path: Path
) -> None:
    """The run could be trained; a task's images would get labels that mean nothing."""
    clusters = shutil.copytree(tiny_clusters, tmp_path / "clusters")
    exchange_encoder(clusters, other_encoder)
    message = refused("pretrain", *moce_words(tiny_shards, clusters, tmp_path / "out"))
    assert re.match(
        rf"{clusters}/encoder/\S+ is another encoder .* than the one that {clusters} was made with", message
    )
    assert not (tmp_path / "out").exists()


def test_features_whose_encoder_was_exchanged(
    tiny_encoder: Path, other_encoder: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    features = tmp_path / "features"
    assert run_here("features", tiny_encoder, tiny_shards, features).status == 0
    exchange_encoder(features, other_encoder)
    message = refused("cluster", features, tmp_path / "out", "num_clusters=4")
    assert re.match(
        rf"{features}/encoder/\S+ is another encoder .*: restore that one, or write {features} again", message
    )
    assert not (tmp_path / "out").exists()
    said = run_here("inspect", features, "--verify")
    assert said.status == 1 and "encoder/model.safetensors: is damaged or was exchanged" in said.out


def test_a_task_of_a_run_whose_encoder_was_exchanged(begun: Path, other_encoder: Path, tiny_images: Path) -> None:
    exchange_encoder(begun / "clusters", other_encoder)
    for words in (
        ("select", begun, "--data", tiny_images / "digits"),
        ("export", begun, begun.parent / "out", "--data", tiny_images / "digits"),
        ("evaluate", begun, "--data", tiny_images / "digits"),
    ):
        assert "is another encoder" in refused(*words)
    assert not (begun.parent / "out").exists()


# Going on


def test_other_images_in_the_place_of_a_run_s(begun: Path, other_shards: Path) -> None:
    """As many clusters as before and a path as before: only the fingerprint tells."""
    config = yaml.safe_load((begun / "config.yaml").read_text())
    shards = Path(config["data"]["shards"])
    shutil.rmtree(shards)
    shutil.copytree(other_shards, shards)
    before = contents(begun)
    assert "labels another shard set" in refused("pretrain", begun / "config.yaml")
    config["model"]["arch"], config["experts"]["clusters"] = "mae", None  # clusters would have told
    (begun / "config.yaml").write_text(yaml.safe_dump(config))
    message = refused("pretrain", begun / "config.yaml")
    told = rf"data.shards: {shards} is not what the run was trained with \(\w{{12}} now, \w{{12}} at step 5\): put back"
    assert re.match(told, message), message
    assert message.strip().endswith(f"or start another run: run.init_from={begun}.")
    assert contents(begun).keys() == before.keys()


def test_clusters_made_anew_in_the_place_of_a_run_s(
    begun: Path, tiny_shards: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    write_features(
        load_encoder(tiny_encoder), ShardSet.open(tiny_shards), tmp_path / "f", FeatureSettings(threads=1), ALONE
    )
    clusters = Path(yaml.safe_load((begun / "config.yaml").read_text())["experts"]["clusters"])
    shutil.rmtree(clusters)
    assert run_here("cluster", tmp_path / "f", clusters, "num_clusters=6", "seed=1").status == 0
    before = contents(begun)
    message = refused("pretrain", begun / "config.yaml")
    assert re.match(rf"experts.clusters: {clusters} is not what the run was trained with \(\w+ now, \w+ at", message)
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("model: [", "is not valid YAML"),
        ("- model", "holds a list; expected `key: value` lines"),
        ("optim: !!python/object/apply:os.mkdir [witness]", "line 1: optim has the tag tag:yaml"),
        ("", "data.shards: required, and not given"),
    ],
)
def test_a_run_whose_settings_are_damaged(begun: Path, tmp_path: Path, content: str, told: str) -> None:
    shutil.move(begun / "config.yaml", tmp_path / "mine.yaml")
    (begun / "config.yaml").write_text(content)
    message = refused("pretrain", tmp_path / "mine.yaml")
    assert str(begun / "config.yaml") in message and told in message
    assert (begun / "config.yaml").read_text() == content


def test_a_run_of_another_version(begun: Path, tmp_path: Path) -> None:
    mine = shutil.copy(begun / "config.yaml", tmp_path / "mine.yaml")
    tree = yaml.safe_load((begun / "config.yaml").read_text())
    tree["experts"]["router"] = tree["experts"].pop("gate")
    tree["optim"]["lamb"] = True
    (begun / "config.yaml").write_text(yaml.safe_dump(tree))
    before = contents(begun)
    for given in (mine, begun / "config.yaml"):  # with settings of this version, or with the run's own
        message = refused("pretrain", given)
        assert "experts.router: no such setting." in message and "optim.lamb: no such setting." in message
    assert "Go on with that version" in refused("pretrain", mine)
    assert contents(begun) == before


# A set from somebody else


def test_a_hostile_set_is_not_verified(tiny_shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "set")
    member = tarfile.TarInfo("../../evil.so")
    member.size = int(ShardSet.open(copy).samples["size"][25])
    with open(copy / "shard-000001.tar", "r+b") as tar:  # in the place of its first member's header
        tar.write(member.tobuf(tarfile.USTAR_FORMAT))
    said = run_here("inspect", copy, "--verify")
    assert said.status == 1 and "Traceback" not in said.err
    assert "shard-000001.tar: '../../evil.so' of type" in said.out and "do not unpack it" in said.out
    manifest = json.loads((copy / "shards.json").read_text())
    manifest["shards"][0]["name"] = "../../../etc/passwd"
    (copy / "shards.json").write_text(json.dumps(manifest))
    assert "Do not trust this set" in refused("inspect", copy)


def test_a_message_cannot_command_the_terminal(tiny_shards: Path, tmp_path: Path) -> None:
    save_file({"\x1b]0;owned\x07": torch.ones(1)}, tmp_path / "w.safetensors")
    words = (f"data.shards={tiny_shards}", f"run.out={tmp_path}/out", f"run.init_from={tmp_path}/w.safetensors")
    message = refused("pretrain", TINY, *words)
    assert "unexpected \ufffd]0;owned\ufffd (1,)" in message
