"""An opened run: metrics with and without pandas, routes, images, reconstructions; and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moce_ds
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.metrics_file import flat_record, read_metrics
from moce_ds.data.clusters import load_ids
from moce_ds.data.shards import ShardSet
from tests.examples.artefacts import STEPS


def test_metrics_are_the_records_of_the_run(artefacts: dict[str, Path]) -> None:
    run = moce_ds.open_run(artefacts["dense run"])
    records, frame = read_metrics(run.path / "metrics.jsonl"), run.metrics()
    assert run.records() == records and len(records) == STEPS
    assert frame.index.tolist() == [1, 2, 3, 4] and frame["loss"].tolist() == [record["loss"] for record in records]
    steps_R, loss_R = run.column("loss")
    assert steps_R.dtype == np.int64 and loss_R.tolist() == frame["loss"].tolist()
    with pytest.raises(ConfigError, match=r"metrics.jsonl has no column 'losss'; its columns: attempt, .*loss"):
        run.column("losss")
    assert repr(run).endswith("dense: step 4 of 8>") and not run.complete


def test_records_flatten_to_names() -> None:
    record = {"step": 3, "loss": None, "layers": {"1": {"load": [0.25, 0.75], "live": 2}}}
    named = {"loss": None, "layers.1.load.0": 0.25, "layers.1.load.1": 0.75, "layers.1.live": 2}
    assert dict(flat_record(record)) == named
    assert set(dict(flat_record(record, "/"))) == {name.replace(".", "/") for name in named}


def test_without_pandas_the_plain_forms_work(artefacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = moce_ds.open_run(artefacts["dense run"])
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"needs pandas: pip install 'moce-ds\[notebook\]'"):
        run.metrics()
    assert len(run.records()) == len(run.column("loss")[0]) == STEPS


def test_routes_clusters_and_images(moce_run: moce_ds.Run, tiny_clusters: Path, tiny_shards: Path) -> None:
    run, shards = moce_run, ShardSet.open(tiny_shards)
    ids_N = load_ids(tiny_clusters, shards.fingerprint, shards.count)
    assert np.array_equal(run.cluster_ids(), ids_N) and run.routes.expert_ML.shape == (6, 2)
    drawn = [run.images(cluster=c, count=60) for c in range(6)]
    assert [len(images) for images in drawn] == np.bincount(ids_N, minlength=6).tolist()
    assert [i.tobytes() for i in drawn[2]] == [shards.decode(int(i)).tobytes() for i in np.flatnonzero(ids_N == 2)]
    of_route = [c for c, route in enumerate(run.routes.routes) if route == run.routes.routes[0]]
    assert len(run.images(route=run.routes.routes[0], count=60)) == sum(len(drawn[c]) for c in of_route)
    assert len(run.images()) == 8
    with pytest.raises(ConfigError, match=r"cluster: got 6; .* has clusters 0 to 5"):
        run.images(cluster=6)


def test_reconstructions_follow_the_route(moce_run: moce_ds.Run, tiny_shards: Path) -> None:
    """With all images in one batch, on their own routes, the loss is nearly that of `moce evaluate`."""
    run, shards = moce_run, ShardSet.open(tiny_shards)
    images = [shards.decode(i) for i in range(shards.count)]
    found = run.reconstruct(images, seed=20_230_207)
    expected = moce_ds.evaluate(run, tiny_shards)
    assert found.loss == pytest.approx(expected.own, rel=0.02), "Pillow's pixels are not DALI's to the last bit"
    assert found.picture.size == (3 * 20, 60 * 20)
    few, route = images[:4], run.routes.routes[0]
    others = [c for c, taken in enumerate(run.routes.routes) if taken != route]
    assert run.reconstruct(few, cluster=0).loss != run.reconstruct(few, cluster=others[0]).loss
    assert (
        run.reconstruct(few, cluster=0).loss
        == run.reconstruct(few, cluster=0).loss
        != run.reconstruct(few, cluster=0, seed=1).loss
    )


def test_a_dense_run_has_no_routes(artefacts: dict[str, Path], tmp_path: Path) -> None:
    run = moce_ds.open_run(str(artefacts["dense run"]))
    image = Image.new("RGB", (20, 20), "red")
    assert run.reconstruct([image]).picture.size == (60, 20)
    assert list(run.reconstructions()) == [STEPS] and run.reconstructions()[STEPS].size == (8, 8)
    with pytest.raises(ArtefactError, match="has no routes"):
        _ = run.routes
    with pytest.raises(ConfigError, match=r"cluster: got 0; .* is a dense run"):
        run.reconstruct([image], cluster=0)
    with pytest.raises(ArtefactError, match=r"is a dense run: it has no routes"):
        run.images(cluster=0)
    with pytest.raises(ArtefactError, match=r"is not a run: expected the folder that `moce pretrain` wrote"):
        moce_ds.open_run(tmp_path)
