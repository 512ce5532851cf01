"""Which files are accepted, what is stored of them, and why the others are refused."""

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from moce_ds.data.image_file import Accepted, Rejected, examine, open_image, to_rgb
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from tests.examples.images import crop, exif, photo, png_chunk, png_of, rejections, save


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
    (root / "good/trailing.png").write_bytes(whole_png.getvalue() + b"appended")
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


def test_dali_decodes_what_is_stored_as_pillow_does(odd: tuple[Path, Path]) -> None:
    from nvidia.dali import fn, pipeline_def, types

    shards = ShardSet.open(odd[1])

    @pipeline_def(num_threads=1, device_id=None, batch_size=shards.count, prefetch_queue_depth=1)
    def pipeline() -> Any:
        stored = fn.external_source(name="stored", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(stored, device="cpu"), fn.peek_image_shape(stored)

    built = pipeline()
    built.build()
    built.feed_input("stored", [np.frombuffer(shards.read(image_id), np.uint8) for image_id in range(shards.count)])
    decoded, shapes = built.run()
    for image_id, row in enumerate(shards.samples):
        assert tuple(shapes.at(image_id)[:2]) == decoded.at(image_id).shape[:2] == (row["height"], row["width"])
        difference = np.abs(decoded.at(image_id).astype(int) - np.asarray(shards.decode(image_id)))
        assert difference.mean() < 1, shards.source(image_id)


def png(width: int, height: int, before: bytes = b"", pixels: bytes | None = None, after: bytes = b"") -> bytes:
    """A PNG that says to be so large, 32 x 32 gray pixels being in it, with chunks before and after them."""
    pixels = zlib.compress(bytes(33 * 32)) if pixels is None else pixels
    return png_of((width, height, 8, 0, 0), pixels, before, after)


def jpeg(height: int, width: int) -> bytes:
    """A small JPEG whose frame header says to be so large."""
    encoded = io.BytesIO()
    photo().resize((32, 32)).save(encoded, "JPEG")
    data = encoded.getvalue()
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


def gif(width: int, height: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("P", (32, 32)).save(encoded, "GIF")
    data = encoded.getvalue()
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


ZIPPED = zlib.compress(bytes(64 << 20), 9)  # 64 MiB in 64 KiB
BOMBS = {
    "huge.png": (png(60_000, 60_000), "too large"),
    "most.png": (png(2**31 - 1, 2**31 - 1), "too large"),
    "none.png": (png(0, 5), "not an image"),
    "text.png": (png(32, 32, before=png_chunk(b"zTXt", b"k\0\0" + ZIPPED)), "stored"),
    "late text.png": (png(32, 32, after=png_chunk(b"zTXt", b"k\0\0" + ZIPPED)), "stored"),
    "utf-8 text.png": (png(32, 32, before=png_chunk(b"iTXt", b"k\0\1\0\0\0" + ZIPPED)), "stored"),
    "much text.png": (png(32, 32, before=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20))) * 70), "stored"),
    "profile.png": (png(32, 32, before=png_chunk(b"iCCP", b"k\0\0" + ZIPPED)), "stored"),
    "pixels.png": (png(32, 32, pixels=zlib.compress(bytes(33 * 32)) + ZIPPED), "stored"),  # none of the rest is read
    "huge.jpg": (jpeg(65_535, 65_535), "too large"),
    "long.jpg": (jpeg(65_535, 1_000), "damaged"),  # within the limit, and not there
    "huge.gif": (gif(65_535, 65_535), "too large"),
    "huge.ppm": (b"P6 60000 60000 255\n", "too large"),
    "huge.ico": (struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, 200, 22) + png(30_000, 30_000), "too large"),
}  # fmt: skip


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    for name, (data, _) in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "small.png").write_bytes(png(32, 32))
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE, tmp_path], capture_output=True, text=True, timeout=300, check=True
    )
    *verdicts, kibibytes = done.stdout.splitlines()
    expected = {name: reason for name, (_, reason) in BOMBS.items()} | {"small.png": "stored"}
    assert dict(line.split("|") for line in verdicts) == expected
    assert int(kibibytes) < 300 * 1024


EXAMINE = """
import resource, sys
from pathlib import Path
from moce_ds.data.image_file import examine

had = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, getattr(examine(path), "reason", "stored"), sep="|")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - had)
"""
"""A worker's look at images, in a process of its own whose memory can be told."""


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
