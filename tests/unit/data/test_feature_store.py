"""Features on disk: whole, resumable, and refused when they are not what they should be."""

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from moce_ds.bench.synthetic_features import write_synthetic_features
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.data.feature_store import FeatureSet, FeatureWriter, Identity

IDENTITY = Identity(
    shards_fingerprint="shards-a",
    encoder_fingerprint="encoder-a",
    encoder_input={"size": 8, "mean": (0.5,), "std": (0.2,), "interpolation": "bicubic", "crop": 1.0},
)
DIGITS_ND = load_digits().data.astype(np.float32)[:100] / 3  # Thirds, so that float16 rounds.


def write(path: Path, features_ND: np.ndarray, block_rows: int = 32) -> FeatureWriter:
    writer = FeatureWriter(path, *features_ND.shape, IDENTITY, block_rows)
    for k in writer.missing_blocks():
        writer.write_block(k, features_ND[writer.block_ids(k)])
    return writer


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 100), block_rows=st.integers(1, 130), data=st.data())
def test_what_is_written_in_any_order_is_read_in_image_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, block_rows: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("features")
    writers = [FeatureWriter(path, count, 64, IDENTITY, block_rows) for _ in range(2)]
    for k in data.draw(st.permutations(writers[0].missing_blocks())):
        writers[k % 2].write_block(k, DIGITS_ND[writers[0].block_ids(k)])
    assert writers[1].missing_blocks() == []
    writers[0].finish()

    features = FeatureSet.open(path)
    expected_ND = DIGITS_ND[:count].astype(np.float16).astype(np.float32)
    assert (features.count, features.dim) == (count, 64)
    assert features.all().dtype == np.float32
    np.testing.assert_array_equal(features.all(), expected_ND)
    np.testing.assert_array_equal(np.concatenate(list(features.blocks())), expected_ND)
    ids = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), dtype=np.int64)
    np.testing.assert_array_equal(features.rows(ids), expected_ND[ids])


def test_an_interrupted_writer_is_taken_up(tmp_path: Path) -> None:
    FeatureWriter(tmp_path, 100, 64, IDENTITY, 32).write_block(1, DIGITS_ND[32:64])
    with pytest.raises(ArtefactError, match="unfinished: rerun the same `moce features`"):
        FeatureSet.open(tmp_path)
    writer = FeatureWriter(tmp_path, 100, 64, IDENTITY, 32)
    assert writer.missing_blocks() == [0, 2, 3]
    with pytest.raises(ArtefactError, match=r"block-000000\.npy is missing"):
        writer.finish()
    write(tmp_path, DIGITS_ND).finish()
    assert FeatureSet.open(tmp_path).identity.encoder_input["mean"] == [0.5]
    assert FeatureWriter(tmp_path, 100, 64, IDENTITY, 32).missing_blocks() == []
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *(f"block-00000{k}.npy" for k in range(4)),
        "features.json",
    ]


@pytest.mark.parametrize("finished", [False, True])
def test_features_of_another_identity_are_refused_with_the_difference(tmp_path: Path, finished: bool) -> None:
    writer = write(tmp_path, DIGITS_ND)
    if finished:
        writer.finish()
    other = replace(IDENTITY, encoder_fingerprint="encoder-b")
    with pytest.raises(ArtefactError, match=r"identity\.encoder_fingerprint: 'encoder-a' there, 'encoder-b' now"):
        FeatureWriter(tmp_path, 100, 64, other, 32)
    with pytest.raises(ArtefactError, match="block_rows: 32 there, 64 now"):
        FeatureWriter(tmp_path, 100, 64, IDENTITY, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_a_feature_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    features_ND = DIGITS_ND.copy()
    features_ND[[77, 91], 5] = value
    with pytest.raises(DataError, match="features of image 77 are NaN or beyond float16"):
        write(tmp_path, features_ND)
    assert FeatureWriter(tmp_path, 100, 64, IDENTITY, 32).missing_blocks() == [2, 3]


def test_a_block_of_an_earlier_process_is_checked_too(tmp_path: Path) -> None:
    features_ND = DIGITS_ND.copy()
    features_ND[[77, 91], 5] = np.nan
    write(tmp_path, DIGITS_ND)
    np.save(tmp_path / "block-000002.npy", features_ND[64:96].astype(np.float16))
    with pytest.raises(DataError, match="features of image 77 are NaN or beyond float16"):
        FeatureWriter(tmp_path, 100, 64, IDENTITY, 32).finish()
    assert not (tmp_path / "features.json").exists()


def test_checksums_of_all_processes_make_the_record_of_one(tmp_path: Path) -> None:
    """Of four blocks, a killed process left two; two others write one each, and read one each."""
    earlier = FeatureWriter(tmp_path / "shared", 100, 64, IDENTITY, 32)
    for k in (0, 3):
        earlier.write_block(k, DIGITS_ND[earlier.block_ids(k)])
    writers = [FeatureWriter(tmp_path / "shared", 100, 64, IDENTITY, 32) for _ in range(2)]
    for k, found, writer in zip((1, 2), (3, 0), writers, strict=True):
        writer.write_block(k, DIGITS_ND[writer.block_ids(k)])
        assert len(writer.checksums([found])) == 2
    writers[0].finish(writers[0].checksums([3]) | writers[1].checksums([0]))
    write(tmp_path / "alone", DIGITS_ND)
    FeatureWriter(tmp_path / "alone", 100, 64, IDENTITY, 32).finish()  # reads all blocks
    records = [(tmp_path / name / "features.json").read_bytes() for name in ("shared", "alone")]
    assert records[0] == records[1]


def test_a_block_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Block 3 .* shape \(32, 64\), expected \(4, 64\)"):
        FeatureWriter(tmp_path, 100, 64, IDENTITY, 32).write_block(3, DIGITS_ND[:32])


def truncate(path: Path) -> None:
    block = path / "block-000002.npy"
    block.write_bytes(block.read_bytes()[:-100])


def replace_by_float32(path: Path) -> None:
    np.save(path / "block-000002.npy", DIGITS_ND[64:96])


def empty(path: Path) -> None:
    (path / "block-000002.npy").write_bytes(b"")


def remove(path: Path) -> None:
    (path / "block-000002.npy").unlink()


@pytest.mark.parametrize("damage", [truncate, replace_by_float32, empty, remove])
def test_a_damaged_block_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    write(tmp_path, DIGITS_ND).finish()
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=r"block-000002\.npy .* rerun the same `moce features`"):
        FeatureSet.open(tmp_path)


def test_damaged_and_foreign_records_are_refused(tmp_path: Path) -> None:
    write(tmp_path, DIGITS_ND).finish()
    record = json.loads((tmp_path / "features.json").read_text())
    (tmp_path / "features.json").write_text(json.dumps(record | {"version": 9}))
    with pytest.raises(ArtefactError, match="version 9; this program reads format 'moce features' version 1"):
        FeatureSet.open(tmp_path)
    del record["dim"], record["identity"]["encoder_input"]
    (tmp_path / "features.json").write_text(json.dumps(record))
    with pytest.raises(
        ArtefactError, match=r"damaged \(dim: .*; identity.encoder_input: .*write a record of features again"
    ):
        FeatureSet.open(tmp_path)
    with pytest.raises(ArtefactError, match="expected a record of features, which `moce features` writes"):
        FeatureSet.open(tmp_path / "nowhere")


@pytest.mark.parametrize("image", [-1, 100])
def test_an_image_outside_the_set_is_refused(tmp_path: Path, image: int) -> None:
    write(tmp_path, DIGITS_ND).finish()
    with pytest.raises(DataError, match=f"has images 0 to 99, not {image}"):
        FeatureSet.open(tmp_path).rows(np.array([3, image]))


@pytest.mark.parametrize(
    "lost", [["features.json"], ["features.json", "encoder"], ["features.json", "block-000000.npy"]]
)
def test_blocks_of_which_nothing_is_recorded_are_not_taken_over(tmp_path: Path, lost: list[str]) -> None:
    """Of a folder that somebody has half deleted: they may be another encoder's."""
    write(tmp_path, DIGITS_ND).finish()
    (tmp_path / "encoder").mkdir()
    for name in lost:
        (tmp_path / name).rmdir() if name == "encoder" else (tmp_path / name).unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtefactError, match=r"holds block-00000\d\.npy and .* neither features.json nor begun.json"):
        FeatureWriter(tmp_path, *DIGITS_ND.shape, IDENTITY, 32)
    assert sorted(tmp_path.iterdir()) == before


def test_a_block_that_was_exchanged_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, DIGITS_ND).finish()
    np.save(tmp_path / "block-000001.npy", DIGITS_ND[:32].astype(np.float16))
    features = FeatureSet.open(tmp_path)
    features.rows(np.array([0, 70]))
    for read in (features.all, lambda: features.rows(np.array([40]))):
        with pytest.raises(ArtefactError, match=r"block-000001\.npy is damaged: its checksum differs"):
            read()


def test_blocks_are_more_than_a_process_may_have_open(tmp_path: Path) -> None:
    write(tmp_path, DIGITS_ND, block_rows=1).finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        allowed = lowest.fileno() + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        features = FeatureSet.open(tmp_path)
        read_ND, kept = features.all(), [features.rows(np.array([image])) for image in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(read_ND, np.concatenate(kept))


def test_synthetic_features_are_a_function_of_their_seed(tmp_path: Path) -> None:
    first, again, other = (
        write_synthetic_features(tmp_path / name, 70, 8, seed, block_rows=32)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    np.testing.assert_array_equal(first.all(), again.all())
    assert not np.array_equal(first.all(), other.all())


def test_synthetic_blocks_without_data_are_read_as_zeros(tmp_path: Path) -> None:
    features = write_synthetic_features(tmp_path / "sparse", 700, 64, block_rows=320, sparse=True)
    assert not features.all().any() and features.num_blocks == 3
