"""The Python API: experts as modules, clusters that label images."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moce_ds
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.data.clusters import load_ids
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.features import encode_all
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.exporting.formats.registry import find_format
from moce_ds.exporting.write import export_route
from moce_ds.models.vit import load_encoder
from moce_ds.selection.routes import choose_cluster
from moce_ds.selection.run_clusters import run_clusters
from tests.examples.alone import ALONE

MakeRun = Callable[..., Path]


@pytest.fixture
def expert(tiny_moce_run: MakeRun, tmp_path: Path) -> Path:
    checkpoint, clusters = run_clusters(tiny_moce_run())
    export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), tmp_path / "expert", {})
    return tmp_path / "expert"


def test_the_package_alone_loads_no_torch() -> None:
    code = """
import sys, moce_ds
assert "torch" not in sys.modules
moce_ds.load_expert
assert "torch" in sys.modules and not {"deepspeed", "sklearn", "faiss"} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
    assert {"Clusters", "load_expert", "pretrain", "__version__"} <= set(dir(moce_ds))
    with pytest.raises(AttributeError, match="has no attribute 'load_experts'"):
        _ = moce_ds.load_experts


def test_an_expert_is_a_module(expert: Path) -> None:
    from timm.data import resolve_model_data_config

    model = moce_ds.load_expert(str(expert))
    images = torch.randn(2, 3, 16, 16)
    assert not model.training and torch.equal(
        model.forward_features(images), load_encoder(expert).model.forward_features(images)
    )
    config = resolve_model_data_config(model)
    seen = load_encoder(expert).input
    assert (
        config["input_size"] == (3, 16, 16) and config["crop_pct"] == seen.center_crop and config["mean"] == seen.mean
    )


def test_what_is_no_expert(expert: Path, tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    checkpoint, clusters = run_clusters(tmp_path / "run")
    export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), tmp_path / "hf", {}, find_format("hf-vit"))
    with pytest.raises(ArtefactError, match="was exported for another library: export it again with --format timm"):
        moce_ds.load_expert(tmp_path / "hf")
    with pytest.raises(ArtefactError, match=r"config.json not found"):
        moce_ds.load_expert(tmp_path)
    whole = (expert / "model.safetensors").read_bytes()
    (expert / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match=r"model.safetensors is damaged \(.*\): export it again"):
        moce_ds.load_expert(expert)
    config = (expert / "config.json").read_text()
    (expert / "config.json").write_text(config.replace("moce_ds encoder 1", "moce_ds encoder 0"))
    with pytest.raises(
        ArtefactError, match="format 'moce_ds encoder 0'; this program reads format 'moce_ds encoder 1'"
    ):
        moce_ds.load_expert(expert)


def test_images_get_the_labels_of_the_shard_set(tiny_clusters: Path, tiny_images: Path, tiny_shards: Path) -> None:
    """Pillow's pixels are not DALI's to the last bit: nearly all labels, and features of cosine 1."""
    shards = ShardSet.open(tiny_shards)
    ids_N = load_ids(tiny_clusters, shards.fingerprint, shards.count)
    clusters = moce_ds.Clusters.load(tiny_clusters)
    paths = [tiny_images / shards.source(i) for i in range(shards.count)]
    found = clusters.assign(paths)
    assert found.dtype == np.int64 and (found == ids_N).mean() >= 0.95
    expected = encode_all(clusters.encoder, shards, EncodeSettings(), ALONE).numpy()
    features = clusters.features(paths)
    cosine = (features * expected).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999
    assert np.array_equal(clusters.assign([Image.open(path) for path in paths]), found)
    assert np.array_equal(clusters.assign(FeatureSet.open(tiny_clusters.parent / "features").all()), ids_N)
    assert clusters.assign([]).shape == (0,)


def test_images_in_whatever_holds_them(tiny_clusters: Path, tiny_images: Path) -> None:
    clusters = moce_ds.Clusters.load(tiny_clusters)
    paths = sorted((tiny_images / "digits").iterdir())[:3]
    expected = clusters.assign(paths).tolist()
    assert clusters.assign(path for path in paths).tolist() == expected
    assert clusters.assign(torch.from_numpy(clusters.features(paths)).requires_grad_()).tolist() == expected
    for alone in (str(paths[0]), paths[0], Image.open(paths[0])):
        with pytest.raises(DataError, match=r"Got the single image .*: expected a list of images, such as \["):
            clusters.assign(alone)  # type: ignore[arg-type]  # a text is a sequence of texts
    with pytest.raises(DataError, match="Got an image of type int: expected a path or a Pillow image"):
        clusters.assign([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"Features have shape \(2, 3, 16, 16\)"):
        clusters.assign(torch.zeros(2, 3, 16, 16))


def test_a_run_has_its_clusters(tiny_moce_run: MakeRun, tiny_images: Path) -> None:
    clusters = moce_ds.Clusters.load(tiny_moce_run())
    assert 0 <= clusters.assign([str(tiny_images / "digits" / "00.png")])[0] < 6


def test_images_that_are_none(tiny_clusters: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    clusters = moce_ds.Clusters.load(tiny_clusters)
    with pytest.raises(DataError, match=r"note.txt is not a readable image: not an image"):
        clusters.assign([tmp_path / "note.txt"])
    with pytest.raises(DataError, match=r"absent.png is not a readable image: unreadable"):
        clusters.assign([tmp_path / "absent.png"])
    with pytest.raises(ArtefactError, match=r"clusters.json not found"):
        moce_ds.Clusters.load(tmp_path)
