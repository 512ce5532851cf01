"""Shard sets: what is written, what is refused, resuming after a kill, reading back (also by DALI)."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moce_ds.common.config.settings import load
from moce_ds.common.errors import ArtefactError, ConfigError, DataError
from moce_ds.common.storage.checksums import with_checksum
from moce_ds.common.storage.files import sha256_of
from moce_ds.common.storage.locks import alone_in
from moce_ds.data.sample_table import SAMPLE, fingerprint_of
from moce_ds.data.shard_manifest import index_name
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from tests.examples.images import contents, crop, many_photos, photo, rejections, save
from tests.examples.shard_tables import as_earlier

SMALL = ShardSettings(images_per_shard=10, workers=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 good images in nested classes and one in the root, with a file that is none in between."""
    root = tmp_path_factory.mktemp("source")
    for number in range(22):
        label = ("birds/small", "birds/large", "fish")[number % 3]
        kind, extension = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
        save(crop(number), root / label / f"{number:02d}.{extension}", kind)
    save(photo(), root / "in the root.jpg")
    (root / "fish/notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def written(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "set"
    write_shards(images, out, SMALL)
    return out


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def test_round_trip(images: Path, written: Path) -> None:
    shards = ShardSet.open(written)
    paths = sorted(str(path.relative_to(images)) for path in images.rglob("*") if path.suffix in (".jpg", ".png"))
    assert shards.count == len(paths) == 23
    assert [shard.count for shard in shards.shards] == [10, 10, 3]
    assert shards.classes == ["birds/large", "birds/small", "fish"]
    assert shards.samples.dtype == SAMPLE and isinstance(shards.samples, np.memmap)
    for image_id, path in enumerate(paths):
        data = shards.read(image_id)
        assert data == (images / path).read_bytes()
        assert shards.is_intact(image_id, data) and not shards.is_intact(image_id, data[:-1])
        assert shards.source(image_id) == path
        folder = path.rpartition("/")[0]
        assert shards.labels[image_id] == (shards.classes.index(folder) if folder else -1)
        row = shards.samples[image_id]
        assert (row["width"], row["height"]) == shards.decode(image_id).size == Image.open(images / path).size
    assert shards.verify().faults == []
    assert rejections(written) == {"fish/notes.txt": ("not an image", "begins with b'not an image'")}
    for image_id in (-1, 23):
        with pytest.raises(IndexError):
            shards.read(image_id)


def test_tar_is_plain_and_deterministic(written: Path) -> None:
    with tarfile.open(written / "shard-000001.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:4]] == [
            "000000010.jpg",
            "000000010.idx",
            "000000011.jpg",
            "000000011.idx",
        ]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
        id_file = tar.extractfile("000000011.idx")
        assert id_file is not None and id_file.read() == (11).to_bytes(8, "little")
    assert (written / "shard-000001.tar").read_bytes()[257:263] == b"ustar\0"
    assert sorted(path.name for path in written.iterdir()) == [
        "rejected.jsonl",
        "samples.npy",
        *(f"shard-00000{number}.{extension}" for number in range(3) for extension in ("idx", "tar")),
        "shards.json",
        "sources.jsonl",
    ]


def test_same_bytes_whatever_the_number_of_workers(images: Path, written: Path, tmp_path: Path) -> None:
    write_shards(images, tmp_path / "one", ShardSettings(images_per_shard=10, workers=1))
    assert contents(tmp_path / "one") == contents(written)


def test_fingerprint_is_that_of_the_images_not_of_the_shards(images: Path, written: Path, tmp_path: Path) -> None:
    other = write_shards(images, tmp_path / "other", ShardSettings(images_per_shard=4, workers=1))
    shards = ShardSet.open(written)
    assert other.fingerprint == shards.fingerprint and other.shards == 6
    relabelled = np.array(shards.samples)
    relabelled["label"][0] += 1
    assert fingerprint_of(relabelled) != shards.fingerprint


def start_writing(source: Path, out: Path) -> "subprocess.Popen[bytes]":
    program = (
        "import sys; from pathlib import Path; from moce_ds.data.shard_writer import *; "
        "write_shards(Path(sys.argv[1]), Path(sys.argv[2]), ShardSettings(images_per_shard=10, workers=2))"
    )
    command = [sys.executable, "-c", program, str(source), str(out)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def wait_until(happened: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def living_members(group: int) -> list[int]:
    """Processes of a group, without those that are dead and only wait to be collected."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                members.append(int(path.parent.name))
    return members


def nobody_lives(group: int) -> bool:
    return not living_members(group)


def test_killed_twice_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    many_photos(source, 200)
    records = out / ".progress"
    for finished, whole_group in ((2, True), (6, False)):
        process = start_writing(source, out)
        wait_until((records / f"{finished:06d}.json").exists)
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its workers notice by themselves
        process.wait()
        wait_until(partial(nobody_lives, process.pid))
        assert not (out / "shards.json").exists()
        with pytest.raises(DataError, match="unfinished"):
            ShardSet.open(out)
    first_shard = (out / "shard-000000.tar").stat()
    (out / ".shard-000009.tar.1.tmp").write_bytes(b"left by a kill")
    write_shards(source, out, SMALL)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first_shard.st_mtime_ns  # kept, not written again
    write_shards(source, tmp_path / "at once", SMALL)
    assert contents(out) == contents(tmp_path / "at once")
    assert ShardSet.open(out).verify().faults == []


def test_resuming_from_something_else_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    many_photos(source, 150)
    process = start_writing(source, out)
    wait_until((out / ".progress/000000.json").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match=r"images_per_shard was 10, now 11\. Use the same .* or delete"):
        write_shards(source, out, ShardSettings(images_per_shard=11, workers=1))
    (source / "one more.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"other files or file sizes before \(166 files before, 167 now\)"):
        write_shards(source, out, SMALL)


def test_dead_worker_is_reported_and_the_rest_can_follow(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    many_photos(source, 150)
    process = start_writing(source, out)
    wait_until((out / ".progress/000000.json").exists)
    os.kill(max(living_members(process.pid)), signal.SIGKILL)  # the youngest is a worker
    assert process.stderr is not None and process.wait(timeout=300) == 1
    message = process.stderr.read().decode()
    assert "DataError: A worker process died between" in message and "Rerun the same command" in message
    assert write_shards(source, out, SMALL).count == 150


def test_complete_set_is_left_alone(images: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    (copy / ".progress").mkdir()  # as after a kill just behind the last file
    report = write_shards(images, copy, SMALL)
    assert report.already_complete and report.count == 23 and report.rejected == {"not an image": 1}
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    with pytest.raises(DataError, match="images_per_shard was 10, now 5"):
        write_shards(images, copy, ShardSettings(images_per_shard=5))
    with pytest.raises(DataError, match="24 files before, 8 now"):
        write_shards(images / "birds/small", copy, SMALL)


def test_impossible_tasks_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is inside the source folder"):
        write_shards(images, images / "shards", SMALL)
    with pytest.raises(DataError, match="is not a folder"):
        write_shards(tmp_path / "missing", tmp_path / "out", SMALL)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").touch()
    with pytest.raises(DataError, match="is neither empty nor a shard set"):
        write_shards(images, occupied, SMALL)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "a.jpg").write_text("<html>")
    for _ in range(2):  # leaves nothing behind that would stand in the way of the next attempt
        with pytest.raises(DataError, match=r"of 1 files none could be decoded\.\n  a\.jpg: not an image"):
            write_shards(nothing, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="images_per_shard"):
        load(ShardSettings, overrides=["images_per_shard=0"])


def test_two_at_once_into_one_folder(images: Path, tmp_path: Path) -> None:
    """The second is refused in words and harms nothing; afterwards it finds the set complete."""
    out = tmp_path / "out"
    with alone_in(out, "busy"), pytest.raises(ArtefactError, match=f"{out} is being written by another process"):
        write_shards(images, out, SMALL)
    assert list(out.iterdir()) == []
    assert not write_shards(images, out, SMALL).already_complete
    assert write_shards(images, out, SMALL).already_complete and not (out / ".lock").exists()


def test_dali_reads_the_same_through_the_index(written: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    shards = ShardSet.open(written)

    @pipeline_def(num_threads=1, device_id=None, batch_size=shards.count, prefetch_queue_depth=1)
    def pipeline() -> Any:
        jpg, idx = fn.readers.webdataset(
            paths=[str(written / shard.name) for shard in shards.shards],
            index_paths=[str(written / index_name(shard.name)) for shard in shards.shards],
            ext=["jpg", "idx"],
            dtypes=[types.UINT8, types.INT64],
        )
        return jpg, idx

    built = pipeline()
    built.build()
    stored, ids = built.run()
    for image_id in range(shards.count):
        assert int(ids.at(image_id)[0]) == image_id
        assert stored.at(image_id).tobytes() == shards.read(image_id)


def test_damaged_shards_are_named(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    whole = shard.read_bytes()
    opened = ShardSet.open(copy)
    altered = bytearray(whole)
    altered[int(opened.samples["offset"][13]) + 200] ^= 1
    shard.write_bytes(altered)
    opened = ShardSet.open(copy)
    assert opened.damaged(range(23)) == [13]
    assert opened.verify().faults == ["shard-000001.tar: altered; 1 of 10 images damaged, ids 13 ..."]
    with pytest.raises(DataError, match=r"Image 13 in .*shard-000001\.tar was altered.* Restore it"):
        opened.decode(13)
    (copy / "shard-000000.idx").write_text("v1.2 0\n")
    assert "shard-000000.idx: missing or altered" in opened.verify().faults
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=rf"shard-000001\.tar has {len(whole) - 512} bytes, expected {len(whole)}"):
        ShardSet.open(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing: expected \d+ bytes.* `moce shards`"):
        ShardSet.open(copy)


def test_damaged_tables_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="expected a shard set, which `moce shards` writes"):
        ShardSet.open(tmp_path)
    samples = np.load(copy / "samples.npy")
    samples["crc32"][5] ^= 1
    np.save(copy / "samples.npy", samples)
    with pytest.raises(DataError, match=r"samples\.npy is damaged or was exchanged.* Restore it"):
        ShardSet.open(copy)
    as_earlier(copy)
    assert any(fault.startswith("samples.npy: altered") for fault in ShardSet.open(copy).verify().faults)
    np.save(copy / "samples.npy", samples[:-1])
    with pytest.raises(DataError, match=r"samples\.npy holds \(22,\)"):
        ShardSet.open(copy)
    (copy / "samples.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"samples\.npy is damaged"):
        ShardSet.open(copy)
    manifest = json.loads((copy / "shards.json").read_text())
    for name in ("../shard-000000.tar", "/etc/passwd", "shard-000000.tar/../x"):
        manifest["shards"][0]["name"] = name
        (copy / "shards.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="Do not trust this set"):
            ShardSet.open(copy)
    (copy / "shards.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ArtefactError, match="says version 2; this program reads version 1: write a shard set again"):
        ShardSet.open(copy)


def rewrite(copy: Path, **changes: object) -> None:
    """Change `shards.json`, as somebody would who wants to be believed."""
    path = copy / "shards.json"
    path.write_text(json.dumps(with_checksum(json.loads(path.read_text()) | changes)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard", 3), ("shard", -1), ("shard", 2**31 - 1), ("offset", -1), ("offset", 2**62), ("size", 0), ("size", -5),
     ("size", 2**62), ("height", 0), ("width", -1), ("label", -2), ("label", 2**31 - 1)],
)  # fmt: skip
def test_a_table_that_points_elsewhere_is_refused(copy: Path, field: str, value: int) -> None:
    samples = np.load(copy / "samples.npy")
    samples[field][7] = value
    np.save(copy / "samples.npy", samples)
    told = (
        "disagree on the number of images in a shard"
        if field == "shard"
        else "row 7 refers to a place outside its shard"
    )
    with pytest.raises(DataError, match=rf"samples\.npy.* {told}.* Restore it"):
        ShardSet.open(copy)


def test_a_manifest_that_lies_is_refused(copy: Path) -> None:
    shards = json.loads((copy / "shards.json").read_text())["shards"]
    rewrite(copy, count=24)
    with pytest.raises(DataError, match=r"samples\.npy holds \(23,\) .* expected \(24,\)"):
        ShardSet.open(copy)
    rewrite(copy, count=23, shards=[shards[0] | {"count": 9}, shards[1] | {"count": 11}, shards[2]])
    with pytest.raises(DataError, match=r"samples\.npy and shards\.json disagree on the number of images in a shard"):
        ShardSet.open(copy)
    rewrite(copy, shards=[{"name": "shard-000000.tar"}], classes={"a": 1}, count="all")
    with pytest.raises(
        ArtefactError, match=r"damaged \(count: .*classes: .*shards\.0\.bytes: .*write a shard set again"
    ):
        ShardSet.open(copy)


def test_tables_that_are_archives_are_refused(copy: Path) -> None:
    """Numpy opens a zip by another name too, and what is in it may be of any size."""
    np.savez_compressed(copy / "samples.npz", samples=np.zeros(23, SAMPLE))
    (copy / "samples.npz").replace(copy / "samples.npy")
    with pytest.raises(DataError, match=r"samples\.npy is damaged"):
        ShardSet.open(copy)


def hostile(kind: bytes = tarfile.REGTYPE, **fields: object) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type = kind
        for name, value in fields.items():
            setattr(member, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (hostile(name="../../evil.jpg"), r"'\.\./\.\./evil\.jpg' of type b'0'"),
        (hostile(name="/etc/cron.d/evil"), "'/etc/cron.d/evil' of type b'0'"),
        (hostile(tarfile.SYMTYPE, linkname="/etc/passwd"), "'000000012.jpg' of type b'2'"),
        (hostile(tarfile.LNKTYPE, linkname="/etc/passwd"), "'000000012.jpg' of type b'1'"),
        (hostile(tarfile.BLKTYPE, devmajor=8), "'000000012.jpg' of type b'4'"),
        (hostile(tarfile.DIRTYPE), "'000000012.*' of type b'5'"),
        (hostile(name="000000011.jpg"), "'000000011.jpg' of type b'0'"),  # a key that is there already
    ],
)
def test_members_that_would_harm_who_unpacks_them_are_found(
    copy: Path, tmp_path: Path, change: Callable[[tarfile.TarInfo], None], told: str
) -> None:
    """Checksums and all are made to fit; only the header of one member is not what it should be."""
    shards = ShardSet.open(copy)
    before = [shards.read(image_id) for image_id in range(23)]
    member, shard = tarfile.TarInfo("000000012.jpg"), copy / "shard-000001.tar"
    member.size = int(shards.samples["size"][12])
    change(member)
    with open(shard, "r+b") as tar:
        tar.seek(int(shards.samples["offset"][12]) - 512)
        tar.write(member.tobuf(tarfile.USTAR_FORMAT))
    entries = json.loads((copy / "shards.json").read_text())["shards"]
    entries[1]["sha256"] = sha256_of(shard)
    rewrite(copy, shards=entries)
    opened = ShardSet.open(copy)
    (fault,) = opened.verify().faults
    assert re.search(rf"^shard-000001\.tar: {told} where 000000012\.jpg is expected: do not unpack it$", fault), fault
    assert [opened.read(image_id) for image_id in range(23)] == before, "names are never followed"
    assert not (tmp_path / "evil.jpg").exists()


def test_a_tar_that_says_more_than_its_index_is_found(copy: Path) -> None:
    shard = copy / "shard-000002.tar"
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo("evil.py"))
    entries = json.loads((copy / "shards.json").read_text())["shards"]
    entries[2] |= {"sha256": sha256_of(shard), "bytes": shard.stat().st_size}
    rewrite(copy, shards=entries)
    assert ShardSet.open(copy).verify().faults == [
        "shard-000002.tar: 'evil.py' of type b'0' where nothing is expected: do not unpack it"
    ]


def test_pickled_set_holds_no_handles_and_reads_elsewhere(written: Path) -> None:
    shards = ShardSet.open(written)
    expected = shards.read(12)
    assert len(pickle.dumps(shards)) < 500
    for method in ("fork", "forkserver"):
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            assert pool.submit(shards.read, 12).result() == expected
