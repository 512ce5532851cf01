"""The parts of a shard set: whoever writes them, in whatever order, the set has the same bytes."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from moce_ds.common.errors import DataError, LostPeerError
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.storage.text_lines import TextLines
from moce_ds.data import shard_team
from moce_ds.data.shard_parts import Part, UnfinishedSet
from moce_ds.data.shard_writer import ShardSettings, share_shards, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.image_folder import FolderSource, walk
from moce_ds.data.sources.source import listing_line
from tests.examples.images import contents, crop, save

SETTINGS = ShardSettings(images_per_shard=4, workers=1)
BAD = (0, 3, 9, 10, 11, 12, 13, 14, 15, 18)
"""Files that are no images: in the first part, a whole part, and others."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 files in two folders, of which 12 are images."""
    root = tmp_path_factory.mktemp("images")
    for number in range(22):
        path = root / ("a" if number < 11 else "b") / f"{number:02d}.png"
        if number in BAD:
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"bad {number}")
        else:
            save(crop(number), path, "PNG")
    return root


@pytest.fixture(scope="module")
def written(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "set"
    write_shards(images, out, SETTINGS)
    return out


def unfinished(images: Path, out: Path) -> UnfinishedSet:
    """A set that was begun, without a part."""
    (out / ".progress").mkdir(parents=True)
    (out / ".progress/files.jsonl").write_text("".join(map(listing_line, walk(images))))
    return UnfinishedSet(FolderSource(images), out, TextLines(out / ".progress/files.jsonl"), 4, 10**6)


def test_rejected_files_leave_smaller_shards(images: Path, written: Path) -> None:
    shards = ShardSet.open(written)
    assert {shard.name: shard.count for shard in shards.shards} == {
        "shard-000000.tar": 2, "shard-000001.tar": 4, "shard-000002.tar": 1, "shard-000004.tar": 3,
        "shard-000005.tar": 2,
    }  # fmt: skip
    assert [shards.source(i) for i in range(12)] == [
        f"{'a' if number < 11 else 'b'}/{number:02d}.png" for number in range(22) if number not in BAD
    ]
    assert shards.labels.tolist() == [0] * 7 + [1] * 5 and shards.verify().faults == []
    rejected = [json.loads(line)["path"] for line in (written / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [f"{'a' if number < 11 else 'b'}/{number:02d}.png" for number in BAD]


def test_ids_that_were_assumed_are_corrected(images: Path, written: Path, tmp_path: Path) -> None:
    """Parts in the reverse order, none of which knows those before it; and one whose correction was interrupted."""
    begun = unfinished(images, tmp_path / "set")
    plan = json.loads((written / "shards.json").read_text())["made_from"] | {"parts": 1}
    (begun.out / ".progress/plan.json").write_text(json.dumps(plan))
    for number in reversed(range(begun.parts)):
        parts = [part for part in begun.write(number, 4 * number) if isinstance(part, Part)]
        assert parts == [begun.record_of(number)] and parts[0].first_id == 4 * number
    record = (begun.out / ".progress/000004.json").read_bytes()
    list(begun.renumber(4, 7))
    (begun.out / ".progress/000004.json").write_bytes(record)  # killed before the new record
    write_shards(images, begun.out, SETTINGS)
    assert contents(begun.out) == contents(written)


def test_two_processes_write_the_same_bytes(images: Path, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    other = threading.Thread(target=share_shards, args=(images, out, SETTINGS, ProcessRank(1, 2, 1)))
    other.start()  # before there is anything to share
    report = write_shards(images, out, SETTINGS, here=ProcessRank(0, 2, 0))
    other.join()
    assert (report.count, report.shards) == (12, 5) and contents(out) == contents(written)
    share_shards(images, out, SETTINGS, ProcessRank(1, 2, 1))  # finds nothing to do


def test_a_process_does_not_wait_for_ever(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_team, "_SILENCE_SECONDS", 0.0)
    told = f"The other processes have written nothing to {tmp_path / 'set'} for"
    with pytest.raises(LostPeerError, match=told):
        share_shards(images, tmp_path / "set", SETTINGS, ProcessRank(1, 2, 1))
    with pytest.raises(LostPeerError, match=told):
        write_shards(images, tmp_path / "set", SETTINGS, here=ProcessRank(0, 2, 0))
    assert write_shards(images, tmp_path / "set", SETTINGS).count == 12  # a lone process resumes


def test_what_an_earlier_version_began_is_refused(images: Path, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    (out / ".progress").mkdir(parents=True)
    plan = json.loads((written / "shards.json").read_text())["made_from"]
    (out / ".progress/plan.json").write_text(json.dumps(plan))
    (out / ".progress/000000.json").write_text('{"next_file": 4, "shard": null, "rows": []}')
    before = contents(out)
    with pytest.raises(DataError, match=f"{out} was begun by an earlier version of moce.* delete {out} to start over"):
        write_shards(images, out, SETTINGS)
    assert contents(out) == before


def test_a_damaged_record_is_named(images: Path, written: Path, tmp_path: Path) -> None:
    begun = unfinished(images, tmp_path / "set")
    list(begun.write(1, 4))
    rows = begun.rows_of(1)
    assert (
        rows["label"].tolist() == [0] * 4
        and np.load(written / "samples.npy")["crc32"][2:6].tolist() == rows["crc32"].tolist()
    )
    (begun.out / ".progress/000001.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(Exception, match=r"000001\.npy is damaged .* write it again with `moce shards`"):
        list(begun.renumber(1, 5))
    shutil.rmtree(begun.out)
