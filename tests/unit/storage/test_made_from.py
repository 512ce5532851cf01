"""Records of what an artefact was made from: absent, the same, or different, with the differences named."""

import pytest

from moce_ds.clustering.settings import ClusterSettings
from moce_ds.config.settings import to_tree
from moce_ds.errors import ArtefactError, DataError
from moce_ds.storage.made_from import MadeFrom

SETTINGS = ClusterSettings(num_clusters=5)
NOW = MadeFrom({"settings": to_tree(SETTINGS), "shards": "abc", "crop": (0.5, 1)}, {"settings": ClusterSettings})


def test_absent() -> None:
    compared = NOW.compare(None)
    assert compared.absent and not compared.same
    compared.refuse_different("out holds clusters")  # nothing to refuse


def test_the_same_whatever_else_is_on_record() -> None:
    recorded = {"settings": to_tree(SETTINGS), "shards": "abc", "crop": [0.5, 1], "solver": {"iterations": 7}}
    compared = NOW.compare(recorded)
    assert compared.same and not compared.absent
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
    assert not compared.same and not compared.absent
    with pytest.raises(ArtefactError) as refusal:
        compared.refuse_different("out holds clusters")
    assert str(refusal.value) == (
        "out holds clusters made from something else; choose another folder or delete it:"
        "\n  settings.num_clusters: 6 there, 5 now\n  shards: None there, 'abc' now"
    )
    with pytest.raises(DataError):
        compared.refuse_different("out holds clusters", DataError)
