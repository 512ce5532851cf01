"""Real pictures for tests, out of scikit-learn, and what a folder holds."""

import json
import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

from PIL import Image


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


def many_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    save(photo(), folder / "0/000.jpg")
    for number in range(1, count):
        path = folder / f"{number % 7}/{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        os.link(folder / "0/000.jpg", path)
        if number % 9 == 0:
            path.with_suffix(".txt").write_text("no image")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rejections(out: Path) -> dict[str, tuple[str, str]]:
    entries = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return {entry["path"]: (entry["reason"], entry["detail"]) for entry in entries}


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = "a description"
    return block


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(header: tuple[int, int, int, int, int], stream: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of (width, height, depth, colour type, interlace), the compressed pixels, and chunks around them."""
    width, height, depth, colour, interlace = header
    first = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    pixels = png_chunk(b"IDAT", stream)
    return b"\x89PNG\r\n\x1a\n" + first + before + pixels + after + png_chunk(b"IEND", b"")
