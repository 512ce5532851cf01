"""What `moce shards` accepts can be read by all that read it later: DALI, as for features, and Pillow, as for tuning.

Axes: B images.
"""

import io
import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from moce_ds.common.errors import DataError
from moce_ds.data.image_file import MAX_SIDE, pixel_limit, read_rgb
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import SequentialSampler
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop, ImageInput
from tests.examples.images import crop, photo, png_chunk, png_of, rejections

SIDE = 40
RAMP_HW = np.add.outer(3 * np.arange(SIDE), 2 * np.arange(SIDE)).astype(np.uint8)
RAMP = Image.fromarray(RAMP_HW)
ROWS = b"".join(b"\0" + row.tobytes() for row in RAMP_HW)
STREAM = zlib.compress(ROWS)
HEADER = (SIDE, SIDE, 8, 0, 0)
BOMB = zlib.compress(bytes(64 << 20), 9)
WIDE = 400  # pixels of a row, so that there are more bytes than the narrowest window holds


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def narrow(stream: bytes) -> bytes:
    """A stream that tells a window of 256 bytes and needs more, as some optimisers wrote."""
    return bytes([0x08, 31 - 0x0800 % 31]) + stream[2:]


def one_segment_less(data: bytes) -> bytes:
    """A JPEG whose last pixels are missing, with an end nevertheless."""
    return data[: len(data) * 2 // 3] + b"\xff\xd9"


KINDS = {
    "plain": png_of(HEADER, STREAM),
    "large text": png_of(HEADER, STREAM, png_chunk(b"tEXt", b"k\0" + b"t" * (3 << 20))),
    "text that inflates": png_of(HEADER, STREAM, png_chunk(b"zTXt", b"k\0\0" + BOMB)),
    "text behind the pixels": png_of(HEADER, STREAM, after=png_chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)),
    "profile that inflates": png_of(HEADER, STREAM, png_chunk(b"iCCP", b"k\0\0" + BOMB)),
    "many texts": png_of(HEADER, STREAM, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20))) * 70),
    "no checksum of the pixels": png_of(HEADER, STREAM[:-4]),
    "more pixels than told": png_of(HEADER, zlib.compress(ROWS + b"x" * 5000)),
    "an empty chunk of pixels": png_of(HEADER, b"", after=png_chunk(b"IDAT", STREAM)),
    "narrow window": png_of((WIDE, 40, 8, 0, 0), narrow(zlib.compress((b"\0" + bytes(range(200)) * 2) * 40, 9))),
    "jpeg that ends too early": one_segment_less(saved(photo(), "JPEG")),
    "progressive jpeg that ends too early": one_segment_less(saved(photo(), "JPEG", progressive=True)),
    "gif": saved(RAMP, "GIF"),
    "gif without its end": saved(RAMP, "GIF")[:-1],
    "lossless webp": saved(RAMP.convert("RGB"), "WEBP", lossless=True),
    "tiff of strips": saved(RAMP, "TIFF", compression="tiff_deflate"),
    "gray with transparency": saved(RAMP.convert("LA"), "PNG"),
    "animated": saved(RAMP, "PNG", save_all=True, append_images=[RAMP.rotate(90)]),
    "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
    "longest row": saved(Image.new("L", (MAX_SIDE, 1), 90), "PNG"),
}
DAMAGED = {
    "a row is missing": png_of(HEADER, zlib.compress(ROWS[: -SIDE - 1])),
    "half is missing": png_of(HEADER, STREAM[: len(STREAM) // 2]),
    "no pixels": png_of(HEADER, b""),
    "a wrong checksum": png_of(HEADER, STREAM[:-4] + b"none"),
    "an unknown filter": png_of(HEADER, zlib.compress(b"\7" + ROWS[1:])),
    "passes are missing": png_of((SIDE, SIDE, 8, 0, 1), zlib.compress(ROWS[: SIDE * SIDE // 2])),
    "bmp": saved(crop(1), "BMP")[:-100],
    "tiff": saved(crop(1), "TIFF")[:-100],
    "webp": saved(crop(1), "WEBP")[:-100],
    "gif": saved(crop(1), "GIF")[:-100],
    "jpeg": saved(crop(1), "JPEG")[:-100],
    "jpeg 2000": saved(crop(1), "JPEG2000")[:-100],
}
LARGE = {"too long a row": saved(Image.new("L", (MAX_SIDE + 1, 1)), "PNG")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("kinds")
    for folder, files in (("whole", KINDS), ("damaged", DAMAGED), ("large", LARGE)):
        (root / "source" / folder).mkdir(parents=True)
        for name, data in files.items():
            (root / "source" / folder / name).write_bytes(data)
    write_shards(root / "source", root / "set", ShardSettings(workers=1))
    return ShardSet.open(root / "set")


def test_the_content_decides(written: ShardSet) -> None:
    assert {written.source(number) for number in range(written.count)} == {f"whole/{name}" for name in KINDS}
    reasons = {f"damaged/{name}": "damaged" for name in DAMAGED} | {f"large/{name}": "too large" for name in LARGE}
    reasons["damaged/tiff"] = rejections(written.path)["damaged/tiff"][0]  # its table may be what is cut off
    assert {path: reason for path, (reason, _) in rejections(written.path).items()} == reasons
    assert "its pixels end after 1599 of 1640 bytes" in rejections(written.path)["damaged/a row is missing"][1]


def test_dali_and_pillow_read_the_same(written: ShardSet) -> None:
    """As features are read: nothing is replaced, and nothing had to be read by Pillow in DALI's place."""
    input = ImageInput(16, mean=(0.0,) * 3, std=(1.0,) * 3, center_crop=1.0)
    batches = Loader(
        written,
        SequentialSampler(0, written.count, 8).batch,
        CenterCrop(1.0),
        input,
        first=0,
        last=-(-written.count // 8),
        batch_size=8,
        threads=1,
        device=torch.device("cpu"),
        replace_damaged=False,
    )
    read = [image for batch in batches for image in 255 * batch.images_BCHW.numpy()]
    assert batches.refused == {}
    for number, pixels in enumerate(read):
        image = written.decode(number)
        row = written.samples[number]
        assert image.size == (row["width"], row["height"])
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        seen = image.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(seen, float).transpose(2, 0, 1) - pixels.clip(0, 255)).mean()
        assert difference < 2, written.source(number)


def test_others_programs_open_what_is_stored(written: ShardSet) -> None:
    """With Pillow's own limits of text, and no forgiveness."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for number in range(written.count):
        Image.open(io.BytesIO(written.read(number))).load()


def test_a_set_may_hold_larger_images_than_pillow_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_pixels` of the set decides, wherever its images are read; Pillow's own limit stays as it was."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "source").mkdir()
    RAMP.save(tmp_path / "source" / "large.png")
    RAMP.resize((SIDE, SIDE + 1)).save(tmp_path / "source" / "larger.png")
    write_shards(tmp_path / "source", tmp_path / "set", ShardSettings(workers=1, max_pixels=SIDE**2))
    assert rejections(tmp_path / "set") == {"larger.png": ("too large", "1640 pixels; max_pixels=1600 were allowed")}
    assert ShardSet.open(tmp_path / "set").decode(0).size == RAMP.size
    with pytest.raises(DataError, match=r"larger.png: 1640 pixels; max_pixels=1600 were .* data.max_pixels"):
        read_rgb(tmp_path / "source" / "larger.png", SIDE**2)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_thread_waits_until_another_has_put_pillows_limit_back() -> None:
    before, holding, leave = Image.MAX_IMAGE_PIXELS, threading.Event(), threading.Event()
    entered: list[bool] = []

    def hold() -> None:
        with pixel_limit(10):
            holding.set()
            leave.wait()

    def enter() -> None:
        with pixel_limit(20):
            entered.append(leave.is_set())

    threads = [threading.Thread(target=hold), threading.Thread(target=enter)]
    threads[0].start()
    holding.wait()
    threads[1].start()
    threads[1].join(0.1)  # long enough to enter, if nothing holds it back
    leave.set()
    for thread in threads:
        thread.join()
    assert entered == [True] and before == Image.MAX_IMAGE_PIXELS


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_rgb(tmp_path / "pipe.png")
