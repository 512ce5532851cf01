"""The table of a set that is too large to be checked when it is opened: its rows are checked when they are used."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moce_ds.common.errors import DataError
from moce_ds.data import sample_table, shard_verification
from moce_ds.data.sample_table import SAMPLE, fingerprint_of
from moce_ds.data.shards import ShardSet
from tests.examples.shard_tables import as_earlier, exchange_samples


@pytest.fixture
def large(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny set, with shards of 25, 25 and 10 images; every set counts as large."""
    monkeypatch.setattr(sample_table, "CHECKED_AT_OPENING", 0)
    return shutil.copytree(tiny_shards, tmp_path / "set")


def alter(folder: Path, field: str, row: int, value: int) -> np.ndarray:
    samples = np.load(folder / "samples.npy")
    samples[field][row] = value
    np.save(folder / "samples.npy", samples)
    return samples


USES: dict[str, Callable[[ShardSet], object]] = {
    "read": lambda opened: opened.read(30),
    "decode": lambda opened: opened.decode(49),
    "row of another image": lambda opened: opened.rows(np.array([0, 26])),
    "labels": lambda opened: opened.labels,
    "description": lambda opened: opened.describe(),
    "source": lambda opened: opened.source(25),
}


@pytest.mark.parametrize("use", USES)
def test_damaged_rows_are_found_when_one_of_their_shard_is_used(large: Path, use: str) -> None:
    alter(large, "label", 30, 0)  # a valid label, but not that of the image
    opened = ShardSet.open(large)
    assert opened.read(24) and opened.read(50) and len(opened.rows([0, 59])) == 2
    for _ in range(2):  # not only the first time
        with pytest.raises(DataError, match=r"samples\.npy is damaged .* rows of shard-000001\.tar .* Restore it"):
            USES[use](opened)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [("shard", 0, "disagree on the number of images in a shard"), ("shard", 2**31 - 1, "disagree"),
     ("offset", -1, "row 30 refers to a place outside its shard"), ("offset", 2**62, "row 30 refers"),
     ("size", 0, "row 30 refers"), ("height", 0, "row 30 refers"), ("label", 2**31 - 1, "row 30 refers")],
)  # fmt: skip
def test_a_row_never_leads_outside_its_shard(large: Path, field: str, value: int, told: str) -> None:
    """Even if all checksums fit, as somebody can make them who wants to be believed."""
    exchange_samples(large, alter(large, field, 30, value))
    opened = ShardSet.open(large)
    with pytest.raises(DataError, match=rf"samples\.npy.* {told}"):
        opened.read(26)


def test_what_is_checked_at_opening_whatever_the_size(large: Path) -> None:
    with open(large / "samples.npy", "ab") as table:
        table.write(b"\0")
    with pytest.raises(DataError, match=r"samples\.npy is damaged: it has \d+ bytes, expected \d+.* Restore it"):
        ShardSet.open(large)
    alter(large, "crc32", 30, 0)
    as_earlier(large)
    ShardSet.open(large)  # nothing can tell
    alter(large, "size", 30, 2**62)
    with pytest.raises(DataError, match="row 30 refers to a place outside"):
        ShardSet.open(large)


def damage_tar(folder: Path, number: int) -> None:
    """Flip a bit of the first image of a shard."""
    path = folder / f"shard-{number:06d}.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


def test_verification_of_damaged_rows(large: Path) -> None:
    alter(large, "width", 30, 7)
    damage_tar(large, 0)
    faults = ShardSet.open(large).verify().faults
    assert faults[0].startswith("samples.npy: is damaged or was exchanged")
    assert faults[1:] == [
        "shard-000000.tar: altered; 1 of 25 images damaged, ids 0 ...",
        "samples.npy: damaged in the rows of shard-000001.tar",
    ]


def test_verification_by_several_processes(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "set")
    damage_tar(folder, 2)
    damage_tar(folder, 0)
    monkeypatch.setattr(shard_verification, "_ALONE_BYTES", 0)
    assert ShardSet.open(folder).verify().faults == [
        "shard-000000.tar: altered; 1 of 25 images damaged, ids 0 ...",
        "shard-000002.tar: altered; 1 of 10 images damaged, ids 50 ...",
    ]


def test_the_fingerprint_of_parts_is_that_of_the_whole(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.load(tiny_shards / "samples.npy")
    targets = np.arange(60 * 3, dtype=np.int8).reshape(60, 3)
    table = np.empty(60, [(name, SAMPLE[name]) for name in ("crc32", "size", "label")])
    for name in table.dtype.names or ():
        table[name] = rows[name]
    monkeypatch.setattr(sample_table, "_CHUNK_BYTES", 100)
    assert fingerprint_of(rows, targets) == hashlib.sha256(table.tobytes() + targets.tobytes()).hexdigest()
    assert fingerprint_of(rows) == json.loads((tiny_shards / "shards.json").read_text())["fingerprint"]
