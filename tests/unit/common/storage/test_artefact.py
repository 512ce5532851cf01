"""Every kind of artefact is recognised, verifies and describes itself; what it was made from is compared."""

import json
from pathlib import Path

import pytest

from moce_ds.checkpoint.format import Checkpoint, step_folder
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.storage.artefact import recognised, some_of
from moce_ds.common.storage.checksums import Findings
from moce_ds.common.storage.encoder_folder import EncoderFolder, ExportFolder
from moce_ds.data.clusters import Clusters
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.evaluation.results_file import ResultsFile
from moce_ds.inspection.inspection import KINDS
from moce_ds.inspection.pipeline_folder import PipelineFolder
from moce_ds.inspection.study_folder import StudyFolder
from tests.examples.artefacts import KINDS as NAMES
from tests.examples.artefacts import STEPS

CLASSES = {
    "shards": ShardSet, "labelled shards": ShardSet, "features": FeatureSet, "clusters": Clusters,
    "dense run": RunFolder, "moce run": RunFolder, "tuning run": RunFolder, "checkpoint": Checkpoint,
    "encoder": EncoderFolder, "results": ResultsFile, "study": StudyFolder, "pipeline": PipelineFolder,
    "timm full": ExportFolder, "hf-vit": ExportFolder, "mmseg": ExportFolder,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_artefact_is_recognised_and_speaks_for_itself(artefacts: dict[str, Path], name: str) -> None:
    kind = recognised(artefacts[name], KINDS)
    assert kind is CLASSES[name]
    opened = kind.open(artefacts[name])
    assert opened.verify() == Findings()
    assert all(isinstance(value, str) for value in opened.describe().values())
    made_from = opened.made_from
    assert made_from and json.loads(json.dumps(made_from)) == made_from, "plain data"


def test_what_was_made_from_what(artefacts: dict[str, Path]) -> None:
    shards, clusters = ShardSet.open(artefacts["shards"]), Clusters.open(artefacts["clusters"])
    assert shards.made_from["images_per_shard"] == 25 and Path(shards.made_from["source"]).is_dir()
    features = FeatureSet.open(artefacts["features"])
    for made_from in (features.made_from, clusters.made_from):
        assert made_from["shards_fingerprint"] == shards.fingerprint
        assert made_from["encoder_fingerprint"] == features.identity.encoder_fingerprint
    run = RunFolder.open(artefacts["moce run"])
    assert run.made_from["clusters_hash"] == clusters.hash
    assert run.made_from == Checkpoint.open(step_folder(run.path, STEPS)).made_from
    assert run.made_from["config"] == run.config
    assert EncoderFolder.open(artefacts["encoder"]).made_from["step"] == STEPS
    assert ExportFolder.open(artefacts["mmseg"]).made_from["format"] == "mmseg"
    (cell,) = StudyFolder.open(artefacts["study"]).made_from["cells"].values()
    assert cell["evaluations"] == {"birds": "birds"}
    stages = PipelineFolder.open(artefacts["pipeline"]).made_from
    assert stages["mae"]["commands"] == [["pretrain"]]
    assert ResultsFile.open(artefacts["results"]).made_from == {"knn birds dense": None, "knn birds expert": None}


def test_what_is_no_artefact_is_refused_with_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"was not written by moce\. Artefacts .*: shard set \(shards\.json\), "):
        recognised(tmp_path, KINDS)
    with pytest.raises(ArtefactError, match="gone not found"):
        recognised(tmp_path / "gone", KINDS)


def test_long_lists_are_shortened() -> None:
    assert some_of(["a", "b"]) == "a, b"
    assert some_of([str(number) for number in range(15)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more"


SETTINGS = ClusterSettings(num_clusters=5)
NOW = MadeFrom({"settings": to_tree(SETTINGS), "shards": "abc", "crop": (0.5, 1)}, {"settings": ClusterSettings})


def test_absent() -> None:
    compared = NOW.compare(None)
    assert compared.differences is None and not compared.same
    compared.refuse_different("out holds clusters")  # nothing to refuse


def test_the_same_whatever_else_is_on_record() -> None:
    recorded = {"settings": to_tree(SETTINGS), "shards": "abc", "crop": [0.5, 1], "solver": {"iterations": 7}}
    compared = NOW.compare(recorded)
    assert compared.same
    compared.refuse_different("out holds clusters")


def test_a_setting_that_is_not_on_record_had_its_default() -> None:
    old = to_tree(SETTINGS)
    del old["seed"]
    recorded = {"settings": old, "shards": "abc", "crop": [0.5, 1]}
    assert NOW.compare(recorded).same
    other = {"settings": to_tree(ClusterSettings(num_clusters=5, seed=3)), "shards": "abc", "crop": [0.5, 1]}
    compared = MadeFrom(other, {"settings": ClusterSettings}).compare(recorded)
    assert compared.differences == {"settings.seed": (SETTINGS.seed, 3)}


def test_differences_are_named() -> None:
    recorded = {"settings": to_tree(ClusterSettings(num_clusters=6)), "crop": [0.5, 1]}
    compared = NOW.compare(recorded)
    assert not compared.same and compared.differences
    with pytest.raises(ArtefactError) as refusal:
        compared.refuse_different("out holds clusters")
    assert str(refusal.value) == (
        "out holds clusters made from something else; choose another folder or delete it:"
        "\n  settings.num_clusters: 6 there, 5 now\n  shards: None there, 'abc' now"
    )
    with pytest.raises(DataError):
        compared.refuse_different("out holds clusters", DataError)
