"""The clusters artefact on real digits: built from features, labelled, saved, refused when damaged, reported."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits

from moce_ds.clustering import build, label, points
from moce_ds.clustering.build import ClusterSettings, build_clusters
from moce_ds.clustering.quality import cluster_report, report_table
from moce_ds.common.config import settings as config
from moce_ds.common.errors import ArtefactError, ConfigError, DataError
from moce_ds.common.storage.checksums import FileRecord
from moce_ds.data import kept_encoder
from moce_ds.data.clusters import LOW, Clusters, load_ids, normalised
from moce_ds.data.feature_store import FeatureSet, FeatureWriter, Identity
from moce_ds.data.kept_encoder import check_encoder, fingerprint
from tests.examples.alone import ALONE

CONFIG = ClusterSettings(num_clusters=16, fit_images_per_cluster=60, max_iterations=3000)
CLASSES = [f"{'round' if digit in (0, 6, 8, 9) else 'other'}/{digit}" for digit in range(10)]


def write_features(path: Path, features_ND: np.ndarray, encoder: float = 1.0) -> Path:
    weights = {"norm.weight": np.full(3, encoder, np.float32)}
    identity = Identity("shards-a", fingerprint(weights), {"size": 8})
    writer = FeatureWriter(path, *features_ND.shape, identity, block_rows=500)
    for k in writer.missing_blocks():
        writer.write_block(k, features_ND[writer.block_ids(k)])
    writer.finish()
    (path / "encoder").mkdir()
    save_file(weights, path / "encoder" / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("digits") / "features", load_digits().data)


@pytest.fixture(scope="module")
def built(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "clusters"
    build_clusters(features, folder, CONFIG, load_digits().target, CLASSES)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of the clusters to damage."""
    for name in ("clusters.json", "clusters.safetensors", "ids.npy"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    return tmp_path


def test_building_labels_every_image_by_the_rule(features: Path, built: Path) -> None:
    clusters = Clusters.open(built)
    features_ND = FeatureSet.open(features).all()
    ids_N = load_ids(built, "shards-a", 1797)
    centred_ND = features_ND.astype(np.float64) - load_digits().data.mean(axis=0)
    centred_ND /= np.linalg.norm(centred_ND, axis=1, keepdims=True)
    cosine_NM = centred_ND @ clusters.embeddings_MD.T
    expected_N = (cosine_NM / 0.025 + clusters.duals_M).argmax(axis=1)
    assert ids_N.dtype == np.int32 and (ids_N != expected_N).mean() < 0.002  # float32 may turn a near tie.
    np.testing.assert_array_equal(clusters.assign(features_ND), ids_N)
    np.testing.assert_array_equal(clusters.assign(features_ND[40:50]), ids_N[40:50])
    np.testing.assert_array_equal(clusters.sizes_M, np.bincount(ids_N, minlength=16))
    assert clusters.share_M.sum() == pytest.approx(1)
    mean_2 = cosine_NM[ids_N == 2, 2].mean()
    assert clusters.cosine_M[2] == pytest.approx(mean_2, abs=1e-5)
    assert (built / "encoder" / "model.safetensors").is_file()
    solver = clusters.provenance["solver"]
    assert solver["converged"] and solver["fit_images"] == 960 and solver["merged_clusters"] == 0


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_sizes_and_cosines_are_those_of_all_images(
    features: Path, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scale: float
) -> None:
    """Bit for bit those of all cosines in memory, although they pass in blocks; with `scale` 0 all cosines equal."""
    unlabelled, feature_set = Clusters.open(built), FeatureSet.open(features)
    if not scale:
        monkeypatch.setattr(
            Clusters, "assign_with_cosine", lambda self, f: (np.arange(len(f)) % 7, np.full(len(f), 1 / 3, np.float32))
        )
    monkeypatch.setattr(label, "_ROWS", 333)
    with label.Labels.written(tmp_path, feature_set, 16) as labels:
        label.label_all(feature_set, unlabelled, labels.take, ALONE, lambda images: None)
        found = labels.measured(unlabelled)
    ids_N, cosine_N = map(np.concatenate, zip(*map(unlabelled.assign_with_cosine, feature_set.blocks()), strict=True))
    sizes_M = np.bincount(ids_N, minlength=16)
    sums_M = np.bincount(ids_N, weights=cosine_N, minlength=16)
    of_cluster = [cosine_N[ids_N == cluster] for cluster in range(16)]
    low_M = [np.quantile(part, LOW, method="weibull") if len(part) else 1 for part in of_cluster]
    np.testing.assert_array_equal(np.load(tmp_path / "ids.npy"), ids_N)
    np.testing.assert_array_equal(found.sizes_M, sizes_M)
    np.testing.assert_array_equal(found.cosine_M, (sums_M / np.maximum(sizes_M, 1)).astype(np.float32))
    np.testing.assert_array_equal(found.low_cosine_M, np.array(low_M, dtype=np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["ids.npy"]


def test_labels_of_a_device_are_those_of_the_host(features: Path, built: Path) -> None:
    clusters, features_ND = Clusters.open(built), FeatureSet.open(features).all()
    ids_N, cosine_N = label.on_device(clusters, torch.device("cpu"))(features_ND)
    expected_N, expected_cosine_N = clusters.assign_with_cosine(features_ND)
    assert (ids_N != expected_N).mean() < 0.002 and ids_N.dtype == np.int64  # float32 may turn a near tie
    np.testing.assert_allclose(cosine_N[ids_N == expected_N], expected_cosine_N[ids_N == expected_N], atol=1e-5)
    features_ND[3, 4] = np.nan
    with pytest.raises(DataError, match="not finite"):
        label.on_device(clusters, torch.device("cpu"))(features_ND)


@pytest.mark.parametrize("per_cluster", [None, 100])
def test_points_that_do_not_fit_into_memory_pass_from_the_disk(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_cluster: int | None
) -> None:
    settings = replace(CONFIG, fit_images_per_cluster=per_cluster)
    kept, expected = build_clusters(features, tmp_path / "kept", settings)
    monkeypatch.setattr(build, "_MOST_KEPT", 4 * 64 * 800)
    monkeypatch.setattr(points, "ROWS", 128)  # four units of a block of 500
    streamed, report = build_clusters(features, tmp_path / "streamed", settings)
    assert streamed.provenance["solver"]["converged"] and streamed.hash != kept.hash
    assert streamed.provenance["solver"]["fit_images"] == (1600 if per_cluster else 1797)
    assert report.cosine > expected.cosine - 0.02
    assert report.largest - report.smallest < 1.5 * (expected.largest - expected.smallest)


def test_balance_costs_less_in_sizes_than_k_means(features: Path, built: Path, tmp_path: Path) -> None:
    plain, report = build_clusters(features, tmp_path / "plain", replace(CONFIG, method="kmeans"))
    assert plain.method == "kmeans" and not plain.duals_M.any() and plain.provenance["solver"] is None
    _, balanced = build_clusters(features, built, CONFIG)
    assert balanced.largest - balanced.smallest < 0.6 * (report.largest - report.smallest)
    assert report.cosine >= balanced.cosine - 0.01
    features_ND = FeatureSet.open(features).all()
    nearest_N = (normalised(features_ND, plain.mean_D) @ plain.embeddings_MD.T).argmax(axis=1)
    np.testing.assert_array_equal(plain.assign(features_ND), nearest_N)


def test_save_and_load_are_bit_exact(built: Path, tmp_path: Path) -> None:
    clusters = Clusters.open(built)
    clusters.write(tmp_path / "copy")
    again = Clusters.open(tmp_path / "copy")
    for name in ("embeddings_MD", "duals_M", "mean_D", "sizes_M", "cosine_M", "low_cosine_M"):
        assert getattr(again, name).tobytes() == getattr(clusters, name).tobytes()
        assert getattr(again, name).dtype == getattr(clusters, name).dtype
    assert (again.eps, again.method, again.encoder_input) == (clusters.eps, "sinkhorn", {"size": 8})
    assert again.provenance == clusters.provenance and again.hash == clusters.hash


def test_the_hash_is_of_what_decides_labels(built: Path) -> None:
    clusters = Clusters.open(built)
    for name in ("embeddings_MD", "duals_M", "mean_D"):
        changed = getattr(clusters, name).copy()
        changed.flat[0] = np.nextafter(changed.flat[0], np.float32(9))
        assert replace(clusters, **{name: changed}).hash != clusters.hash
    assert replace(clusters, eps=0.03).hash != clusters.hash
    assert replace(clusters, sizes_M=clusters.sizes_M + 1, method="other").hash == clusters.hash


def test_the_same_again_is_left_alone_and_another_is_refused(
    features: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in built.iterdir()}
    clusters, report = build_clusters(features, built, CONFIG, load_digits().target, CLASSES)
    assert "same settings and features: nothing to do" in capsys.readouterr().err
    assert before == {file.name: file.stat().st_mtime_ns for file in built.iterdir()}
    assert report.classes is not None and clusters.num_clusters == 16
    with pytest.raises(ArtefactError, match=r"settings\.eps: 0\.025 there, 0\.05 now"):
        build_clusters(features, built, replace(CONFIG, eps=0.05))
    other = write_features(tmp_path / "other", load_digits().data, encoder=2.0)
    with pytest.raises(ArtefactError, match=r"features\.encoder_fingerprint: '\w{64}' there, '\w{64}' now"):
        build_clusters(other, built, CONFIG)
    with pytest.raises(ArtefactError, match="exists and does not hold clusters"):
        build_clusters(features, other, CONFIG)


def test_the_same_seed_gives_the_same_clusters(features: Path, built: Path, tmp_path: Path) -> None:
    again, _ = build_clusters(features, tmp_path / "again", CONFIG)
    other, _ = build_clusters(features, tmp_path / "other", replace(CONFIG, seed=1))
    assert again.hash == Clusters.open(built).hash != other.hash


def test_not_converging_is_said_loudly(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hasty = replace(CONFIG, max_iterations=2)
    clusters, _ = build_clusters(features, tmp_path / "hasty", hasty)
    assert "did NOT converge: after max_iterations=2" in capsys.readouterr().err
    assert not clusters.provenance["solver"]["converged"]


def test_merged_clusters_are_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One tight group of half the images: with a large eps, Q spreads it over several clusters at the same place.
    generator = np.random.default_rng(0)
    centres_MD = generator.normal(size=(9, 16))
    group_N = np.repeat(np.arange(9), [400, *[50] * 8])
    features_ND = centres_MD[group_N] + 0.05 * generator.normal(size=(800, 16))
    path = write_features(tmp_path / "features", features_ND)
    clusters, _ = build_clusters(path, tmp_path / "merged", replace(CONFIG, eps=0.1, rounds=3))
    assert "almost coincide with another one" in capsys.readouterr().err
    cosine_MM = clusters.embeddings_MD @ clusters.embeddings_MD.T - 2 * np.eye(16)
    assert clusters.provenance["solver"]["merged_clusters"] == (cosine_MM.max(axis=1) > 0.99).sum() > 1
    assert clusters.provenance["solver"]["converged"], "the soft sizes alone do not show it"


def test_impossible_settings_and_features_are_refused_before_anything_is_written(
    features: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="num_clusters=1798 is more than the 1797 images"):
        build_clusters(features, tmp_path / "out", replace(CONFIG, num_clusters=1798))
    with pytest.raises(ConfigError, match=r"eps: got -1(.0)?; expected a number greater than 0"):
        config.load(ClusterSettings, overrides=["eps=-1"])
    alike = write_features(tmp_path / "alike", np.full((30, 4), 1 / 3))
    with pytest.raises(DataError, match=r"All features in .* are alike"):
        build_clusters(alike, tmp_path / "out", replace(CONFIG, num_clusters=2))
    another = write_features(tmp_path / "another", np.full((30, 4), 1 / 3), encoder=2.0) / "encoder/model.safetensors"
    another.replace(alike / "encoder/model.safetensors")
    with pytest.raises(
        ArtefactError, match=r"model.safetensors is another encoder \(\w{12}\) than the one that .*alike"
    ):
        build_clusters(alike, tmp_path / "out", replace(CONFIG, num_clusters=2))
    (alike / "encoder/model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"encoder/model.safetensors is missing: restore it, or write .* again"):
        build_clusters(alike, tmp_path / "out", replace(CONFIG, num_clusters=2))
    assert not (tmp_path / "out").exists()


def test_an_encoder_with_a_checksum_is_read_but_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = write_features(tmp_path / "features", load_digits().data)
    encoder, expected = features / "encoder", FeatureSet.open(features).identity.encoder_fingerprint
    weights, content = encoder / "model.safetensors", (encoder / "model.safetensors").read_bytes()
    files = {"encoder/model.safetensors": FileRecord.of(weights)}
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"model.safetensors is another encoder"):
        check_encoder(features, expected, files)
    weights.write_bytes(content)
    monkeypatch.setattr(kept_encoder, "load_file", None)
    check_encoder(features, expected, files)


def test_features_are_not_finished_beside_another_encoder(tmp_path: Path) -> None:
    identity = Identity("shards-a", fingerprint({"norm.weight": np.ones(3, np.float32)}), {"size": 8})
    writer = FeatureWriter(tmp_path, 2, 4, identity)
    writer.write_block(0, np.eye(2, 4))
    (tmp_path / "encoder").mkdir()
    save_file({"norm.weight": np.zeros(3, np.float32)}, tmp_path / "encoder" / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"model.safetensors is another encoder"):
        writer.finish()


def edit_json(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "clusters.json").read_text()) | changes
        kept = {key: value for key, value in record.items() if value != "absent"}
        (folder / "clusters.json").write_text(json.dumps(kept))

    return damage


def edit_tensor(name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "clusters.safetensors")
        tensor = tensors.pop(name)
        if change:
            tensors[name] = np.ascontiguousarray(change(tensor))
        save_file(tensors, folder / "clusters.safetensors")

    return damage


def truncate(folder: Path) -> None:
    path = folder / "clusters.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"clusters\.safetensors is damaged"),
        (lambda folder: (folder / "clusters.safetensors").unlink(), r"clusters\.safetensors is missing"),
        (
            lambda folder: (folder / "clusters.json").unlink(),
            "expected a record of clusters, which `moce cluster` writes",
        ),
        (edit_json(version=2), "'moce clusters' version 2; this program reads format 'moce clusters' version 1"),
        (edit_json(format="moce features"), "says format 'moce features'"),
        (edit_json(encoder_fingerprint="absent"), "encoder_fingerprint: is missing"),
        (edit_json(eps=0.5), r"clusters\.json is damaged or was edited"),
        (edit_tensor("cosine_M", lambda t: t / 2), r"clusters\.safetensors is damaged or was exchanged"),
        (edit_tensor("duals_M", None), "it lacks duals_M"),
        (edit_tensor("duals_M", lambda t: t[:-1]), r"duals_M has shape \(15,\), expected \(16,\)"),
        (edit_tensor("duals_M", lambda t: t + 1), "belong to different clusters"),
        (edit_tensor("low_cosine_M", lambda t: t[:-1]), r"low_cosine_M has shape \(15,\), expected \(16,\)"),
        (edit_tensor("mean_D", lambda t: t * np.nan), "mean_D holds values that are not finite"),
        (edit_tensor("embeddings_MD", lambda t: t[0]), r"embeddings_MD has shape \(64,\), expected 2 axes"),
        (edit_tensor("embeddings_MD", lambda t: 2 * t), "whose norm is not 1"),
    ],
)
def test_damaged_clusters_are_refused_by_name(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    Clusters.open(folder)
    damage(folder)
    with pytest.raises(ArtefactError, match=message):
        Clusters.open(folder)


def test_clusters_of_an_earlier_version_are_read(folder: Path) -> None:
    whole = Clusters.open(folder)
    edit_tensor("low_cosine_M", None)(folder)
    record = json.loads((folder / "clusters.json").read_text())
    del record["files"], record["content_sha256"]
    (folder / "clusters.json").write_text(json.dumps(record))
    earlier = Clusters.open(folder)
    assert earlier.low_cosine_M is None and earlier.hash == whole.hash
    earlier.write(folder / "again")
    assert Clusters.open(folder / "again").low_cosine_M is None


def test_ids_belong_to_their_shard_set(folder: Path) -> None:
    with pytest.raises(
        ArtefactError, match=r"another shard set \(shards-a, 1797 images\) than .* in use \(shards-b, 9 images\)"
    ):
        load_ids(folder, "shards-b", 9)
    with pytest.raises(ArtefactError, match=r"holds \(1797,\) of int32, expected \(1796,\) of int32"):
        load_ids(folder, "shards-a", 1796)
    ids_N = np.load(folder / "ids.npy")
    ids_N[0] = (ids_N[0] + 1) % 16
    np.save(folder / "ids.npy", ids_N)
    with pytest.raises(ArtefactError, match="does not have the cluster sizes"):
        load_ids(folder, "shards-a", 1797)
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:50])
    with pytest.raises(ArtefactError, match=r"ids\.npy is damaged"):
        load_ids(folder, "shards-a", 1797)
    (folder / "ids.npy").unlink()
    with pytest.raises(ArtefactError, match=r"ids\.npy is missing"):
        load_ids(folder, "shards-a", 1797)


def test_features_that_do_not_fit_the_clusters_are_refused(built: Path) -> None:
    clusters = Clusters.open(built)
    with pytest.raises(DataError, match=r"shape \(3, 32\), these clusters need \[N, 64\]"):
        clusters.assign(np.zeros((3, 32), dtype=np.float32))
    with pytest.raises(DataError, match=r"Feature 1 .* not finite"):
        clusters.assign(np.array([[1.0] * 64, [np.nan] * 64], dtype=np.float32))
    assert clusters.assign(clusters.mean_D[None]).tolist() == [int(clusters.duals_M.argmax())]


def entropy(*counts: int) -> float:
    shares = np.array(counts) / sum(counts)
    return float(-(shares * np.log(shares)).sum())


def test_the_report_counts_what_it_says() -> None:
    ids_N = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    labels_N = np.array([0, 0, 0, 1, 1, 1, 2, 2, 0, -1])
    cosine_M = np.array([0.2, 0.3, 0.8, 0.9])
    report = cluster_report(ids_N, 4, cosine_M, labels_N, ["a/x", "a/y", "b", "c/none"])
    assert (report.smallest, report.median, report.largest) == pytest.approx((0, 1.2, 1.6))
    assert (report.num_clusters, report.empty_clusters) == (4, 1)
    assert report.cosine == pytest.approx(0.46) and report.classes is not None and report.domains is not None
    assert report.classes.purity == pytest.approx((3 + 2 + 2) / 9)
    assert report.classes.majority_share == {"a/x": 3 / 4, "a/y": 2 / 3, "b": 1}
    assert report.domains.majority_share == {"a": 6 / 7, "b": 1}
    of_labels, of_clusters = entropy(7, 2), entropy(4, 2, 3)
    shared = of_labels - 3 / 9 * entropy(2, 1)  # Only cluster 2 is of both domains.
    assert report.domains.nmi == pytest.approx(2 * shared / (of_labels + of_clusters))
    half = cluster_report(np.zeros(4, dtype=int), 1, np.ones(1), np.array([0, 0, 1, 1]), ["p", "q"])
    assert half.classes is not None and half.classes.majority_share == {"p": 0, "q": 0}, "half is no majority"
    assert half.classes.purity == 0.5 and half.classes.nmi == 0


def test_the_table_of_real_clusters_fits_100_columns(features: Path, built: Path) -> None:
    _, report = build_clusters(features, built, CONFIG, load_digits().target, CLASSES)
    assert report.classes is not None and report.classes.purity > 0.7 and report.classes.nmi > 0.6
    console = Console(width=100, record=True, file=StringIO())
    console.print(report_table(report))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "1,797 images in 16 clusters",
        "hard sizes min / median / max",
        "NMI with classes",
        "round",
        "2 more classes",
    ):
        assert words in text
    unlabelled = cluster_report(np.zeros(3, dtype=int), 2, np.ones(2), np.full(3, -1), ["p"])
    assert unlabelled.classes is None and report_table(unlabelled).row_count == 4
