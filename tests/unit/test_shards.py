"""Shard sets: what is written, what is refused, resuming after a kill, and reading back (also by DALI)."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from moce_ds.config import load
from moce_ds.data.image_file import Accepted, Rejected, examine, open_image, to_rgb
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import SAMPLE, ShardSet, fingerprint_of
from moce_ds.errors import ArtefactError, ConfigError, DataError

SMALL = ShardSettings(images_per_shard=10, workers=2)


def photo(name: str = "china") -> Image.Image:
    spec = find_spec("sklearn")
    assert spec is not None and spec.submodule_search_locations
    image = Image.open(Path(spec.submodule_search_locations[0]) / f"datasets/images/{name}.jpg")
    image.load()
    image.info.clear()
    return image


def crop(number: int) -> Image.Image:
    left, top = 7 * number, 5 * number
    return photo("flower").crop((left, top, left + 60 + number, top + 40))


def save(image: Image.Image, path: Path, kind: str = "JPEG", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rejections(out: Path) -> dict[str, tuple[str, str]]:
    entries = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return {entry["path"]: (entry["reason"], entry["detail"]) for entry in entries}


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
    assert shards.verify() == []
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


def many_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    save(photo(), folder / "0/000.jpg")
    for number in range(1, count):
        path = folder / f"{number % 7}/{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        os.link(folder / "0/000.jpg", path)
        if number % 9 == 0:
            path.with_suffix(".txt").write_text("no image")


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
    assert ShardSet.open(out).verify() == []


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
    with pytest.raises(DataError, match=r"other files or file sizes then \(166 files then, 167 now\)"):
        write_shards(source, out, SMALL)


def test_dead_worker_is_reported_and_the_rest_can_follow(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    many_photos(source, 150)
    process = start_writing(source, out)
    wait_until((out / ".progress/000000.json").exists)
    os.kill(max(living_members(process.pid)), signal.SIGKILL)  # the youngest is a worker
    assert process.stderr is not None and process.wait(timeout=20) == 1
    message = process.stderr.read().decode()
    assert "DataError: A worker process died between" in message and "Run the same command again" in message
    assert write_shards(source, out, SMALL).count == 150


def test_complete_set_is_left_alone(images: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    (copy / ".progress").mkdir()  # as after a kill just behind the last file
    report = write_shards(images, copy, SMALL)
    assert report.already_complete and report.count == 23 and report.rejected == {"not an image": 1}
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    with pytest.raises(DataError, match="images_per_shard was 10, now 5"):
        write_shards(images, copy, ShardSettings(images_per_shard=5))
    with pytest.raises(DataError, match="24 files then, 8 now"):
        write_shards(images / "birds/small", copy, SMALL)


def test_impossible_tasks_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lies in the source folder"):
        write_shards(images, images / "shards", SMALL)
    with pytest.raises(DataError, match="is not a folder"):
        write_shards(tmp_path / "missing", tmp_path / "out", SMALL)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").touch()
    with pytest.raises(DataError, match="not an empty folder"):
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


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of everything that goes wrong or needs care, and the set written from it."""
    root = tmp_path_factory.mktemp("odd") / "source"
    base = photo().resize((90, 60))
    jpeg = io.BytesIO()
    base.save(jpeg, "JPEG")
    save(base, root / "good/plain.jpg")
    save(base.convert("L"), root / "good/gray.jpg")
    save(base, root / "good/progressive.jpg", progressive=True)
    save(base, root / "good/several.jpg", "MPO", save_all=True, append_images=[base])
    (root / "good/trailing.jpg").write_bytes(jpeg.getvalue() + b"appended by a camera")
    (root / "good" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(jpeg.getvalue())
    for orientation in range(9):
        save(base, root / f"good/turned{orientation}.jpg", exif=exif(orientation), quality=95)
    save(base, root / "good/turned.png", "PNG", exif=exif(6))
    save(base, root / "good/xmp.jpg", xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    save(base, root / "recoded/animation.gif", "GIF", save_all=True, append_images=[base.rotate(90)])
    save(base, root / "recoded/webp.jpg", "WEBP")
    save(base, root / "recoded/bmp.bmp", "BMP")
    save(base, root / "recoded/tiff.tif", "TIFF")
    save(base.convert("CMYK"), root / "recoded/cmyk.jpg")
    save(base.quantize(16), root / "recoded/palette.png", "PNG")
    ramp = np.linspace(0, 65535, 90 * 60).reshape(60, 90)
    save(Image.fromarray(ramp.astype(np.uint16)), root / "recoded/gray16.png", "PNG")
    save(Image.fromarray((ramp / 65535).astype(np.float32)), root / "recoded/float.tif", "TIFF")
    clear = base.convert("RGBA")
    clear.putalpha(Image.new("L", base.size, 0))
    save(clear, root / "recoded/alpha.png", "PNG")
    whole_png = io.BytesIO()
    base.save(whole_png, "PNG")
    (root / "recoded/endless.png").write_bytes(whole_png.getvalue()[:-12])
    (root / "recoded/stray.jpg").write_bytes(jpeg.getvalue()[:20] + b"stray" + jpeg.getvalue()[20:])
    bad = root / "bad"
    bad.mkdir()
    (bad / "truncated.jpg").write_bytes(jpeg.getvalue()[:-200])
    (bad / "truncated.png").write_bytes(whole_png.getvalue()[:-2000])
    (bad / "empty.jpg").touch()
    (bad / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (bad / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (bad / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (bad / ".hidden.jpg").write_bytes(jpeg.getvalue())
    save(Image.new("1", (1001, 1000)), bad / "bomb.png", "PNG")
    save(Image.new("1", (3000, 1000)), bad / "larger bomb.png", "PNG")
    (bad / "dangling.jpg").symlink_to("nowhere.jpg")
    (bad / "loop").symlink_to("..")
    os.mkfifo(bad / "pipe.jpg")
    out = root.parent / "out"
    write_shards(root, out, ShardSettings(images_per_shard=10, max_pixels=1_000_000, workers=2))
    return root, out


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = "a description"
    return block


def test_every_bad_file_is_listed_with_its_reason(odd: tuple[Path, Path]) -> None:
    root, out = odd
    listed = rejections(out)
    assert {path: reason for path, (reason, _) in listed.items()} == {
        "bad/truncated.jpg": "damaged",
        "bad/truncated.png": "damaged",
        "bad/empty.jpg": "empty",
        "bad/page.jpg": "not an image",
        "bad/.DS_Store": "not an image",
        "bad/Thumbs.db": "not an image",
        "bad/.hidden.jpg": "not an image",
        "bad/bomb.png": "too large",
        "bad/larger bomb.png": "too large",
        "bad/dangling.jpg": "not a regular file",
        "bad/loop": "not a regular file",
        "bad/pipe.jpg": "not a regular file",
    }
    assert "truncated" in listed["bad/truncated.jpg"][1]
    assert "<!DOCTYPE html>" in listed["bad/page.jpg"][1]
    assert "1001000 pixels" in listed["bad/bomb.png"][1]
    manifest = json.loads((out / "shards.json").read_text())
    assert manifest["rejected"] == {
        "damaged": 2,
        "empty": 1,
        "not a regular file": 3,
        "not an image": 4,
        "too large": 2,
    }
    files = sum(1 for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    assert manifest["count"] + len(listed) == files == manifest["made_from"]["files"]


def test_odd_images_are_stored_as_they_look(odd: tuple[Path, Path]) -> None:
    root, out = odd
    shards = ShardSet.open(out)
    ids = {shards.source(image_id): image_id for image_id in range(shards.count)}
    assert shards.classes == ["good", "recoded"]
    changed = {path for path, image_id in ids.items() if shards.read(image_id) != (root / path).read_bytes()}
    assert changed == {path for path in ids if path.startswith("recoded")} | {"good/turned.png"}
    for path in changed:
        stored = Image.open(io.BytesIO(shards.read(ids[path])))
        assert (stored.format, stored.mode) == ("PNG", "RGB") and not stored.getexif()

    def pixels(path: str) -> np.ndarray:
        return np.asarray(shards.decode(ids[path])).astype(int)

    assert pixels("good/turned6.jpg").shape == pixels("good/turned.png").shape == (90, 60, 3)
    assert pixels("good/xmp.jpg").shape == pixels("good/turned0.jpg").shape == (60, 90, 3)
    upright = pixels("good/turned1.jpg")
    sideways = upright.transpose(1, 0, 2)
    for orientation, expected in {
        0: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: sideways,
        6: sideways[:, ::-1],
        7: sideways[::-1, ::-1],
        8: sideways[::-1],
    }.items():
        assert np.array_equal(pixels(f"good/turned{orientation}.jpg"), expected), orientation
    assert (pixels("recoded/alpha.png") == 255).all()  # wholly transparent: white, whatever colour lies under it
    ramp = np.linspace(0, 255, 90 * 60).reshape(60, 90, 1)
    assert np.abs(pixels("recoded/gray16.png") - ramp).max() <= 0.51
    assert np.abs(pixels("recoded/float.tif") - ramp).max() <= 0.51
    for name in ("animation.gif", "webp.jpg", "cmyk.jpg", "tiff.tif", "stray.jpg", "endless.png"):
        assert np.abs(pixels(f"recoded/{name}") - pixels("good/plain.jpg")).mean() < 12, name


def test_dali_reads_and_decodes_the_same(odd: tuple[Path, Path], written: Path) -> None:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline(folder: Path) -> tuple[Any, ...]:
        jpg, idx = fn.readers.webdataset(
            paths=[str(path) for path in sorted(folder.glob("*.tar"))],
            index_paths=[str(path) for path in sorted(folder.glob("*.idx"))],
            ext=["jpg", "idx"],
            dtypes=[types.UINT8, types.INT64],
        )
        return jpg, idx, fn.decoders.image(jpg, device="cpu"), fn.peek_image_shape(jpg)

    for folder in (written, odd[1]):
        shards = ShardSet.open(folder)
        built = pipeline(folder, batch_size=shards.count)
        built.build()
        stored, ids, decoded, shapes = built.run()
        for image_id in range(shards.count):
            assert int(ids.at(image_id)[0]) == image_id
            assert stored.at(image_id).tobytes() == shards.read(image_id)
            row = shards.samples[image_id]
            assert tuple(shapes.at(image_id)[:2]) == decoded.at(image_id).shape[:2] == (row["height"], row["width"])
            difference = np.abs(decoded.at(image_id).astype(int) - np.asarray(shards.decode(image_id)))
            assert difference.mean() < 1, shards.source(image_id)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_damage_never_escapes(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    encoded = io.BytesIO()
    crop(1).save(encoded, kind, exif=exif(6))
    original = encoded.getvalue()
    path = tmp_path_factory.mktemp("damage") / "file"

    @hypothesis_settings(max_examples=40, deadline=None, database=None)
    @given(st.integers(1, len(original)), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
    def check(length: int, changes: list[tuple[int, int]]) -> None:
        data = bytearray(original[:length] if length % 2 else original)
        for position, value in changes:
            data[position % len(data)] = value
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = examine(path)
            if isinstance(verdict, Accepted):
                assert to_rgb(open_image(io.BytesIO(verdict.data))).size == (verdict.width, verdict.height)
            else:
                assert isinstance(verdict, Rejected) and verdict.detail

    check()


def test_damaged_shards_are_named(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    whole = shard.read_bytes()
    opened = ShardSet.open(copy)
    altered = bytearray(whole)
    altered[int(opened.samples["offset"][13]) + 200] ^= 1
    shard.write_bytes(altered)
    opened = ShardSet.open(copy)
    assert opened.damaged(range(23)) == [13]
    assert opened.verify() == ["shard-000001.tar: altered; 1 of 10 images damaged, ids 13 ..."]
    with pytest.raises(DataError, match=r"Image 13 in .*shard-000001\.tar was altered.* Restore it"):
        opened.decode(13)
    (copy / "shard-000000.idx").write_text("v1.2 0\n")
    assert "shard-000000.idx: missing or altered" in opened.verify()
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
    assert any(fault.startswith("samples.npy: altered") for fault in ShardSet.open(copy).verify())
    np.save(copy / "samples.npy", samples[:-1])
    with pytest.raises(DataError, match=r"samples\.npy holds \(22,\)"):
        ShardSet.open(copy)
    (copy / "samples.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"samples\.npy cannot be read"):
        ShardSet.open(copy)
    manifest = json.loads((copy / "shards.json").read_text())
    for name in ("../shard-000000.tar", "/etc/passwd", "shard-000000.tar/../x"):
        manifest["shards"][0]["name"] = name
        (copy / "shards.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="Do not trust this set"):
            ShardSet.open(copy)
    (copy / "shards.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(DataError, match="version 2, this program reads version 1"):
        ShardSet.open(copy)


def test_pickled_set_holds_no_handles_and_reads_elsewhere(written: Path) -> None:
    shards = ShardSet.open(written)
    expected = shards.read(12)
    assert len(pickle.dumps(shards)) < 500
    for method in ("fork", "forkserver"):
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            assert pool.submit(shards.read, 12).result() == expected
