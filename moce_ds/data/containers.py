"""Strict readers of JPEG and PNG containers: they find what Pillow and DALI would read differently.

Pillow accepts faults of a JPEG that end a DALI pipeline, or that make DALI rotate the image differently. Fuzzing found
the relevant ones: stray bytes between the segments, and faults in the first table of the EXIF.

Pillow accepts a PNG without its last rows and refuses one with a large text or colour profile; libpng, which DALI
decodes with, does the reverse. So the chunks are checked here, and Pillow only sees those that pixels depend on.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE = 0, 2, 3
"""Colour types of a PNG."""

_CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and column and row steps, of the passes of an interlaced image."""

# Chunks that pixels, orientation or the number of frames depend on. Text and profiles may be large, or may decompress
# to gigabytes, and are excluded.
_NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND")
_CHUNK_BYTES = 1 << 18  # bytes decompressed at a time
_MAX_METADATA = 1 << 20  # maximum total of decompressed text and profiles in bytes; Pillow's limit for one of them

# Bytes of a value of each TIFF type, 1 to 12.
_TIFF_SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8), start=1))
_ORIENTATION = 0x0112
_JPEG_FRAMES = range(0xFFC0, 0xFFD0)
_JPEG_TABLES = (0xFFC4, 0xFFC8, 0xFFCC)  # Huffman tables, a reserved marker, arithmetic conditioning
_COMMON_JPEG_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)
"""Baseline, extended and progressive with Huffman codes; few decoders support arithmetic codes or lossless."""


def jpeg_orientation(data: bytes) -> int | None:
    """EXIF orientation of a JPEG, 1 if it has none; None if its header or EXIF is faulty, or its coding is
    unusual."""
    exif: list[int | None] = []
    position = 2
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFFDA:  # start of scan: the header is over
            return (exif or [1])[0] if len(exif) <= 1 else None
        if not 0xFFC0 <= marker <= 0xFFFE or length < 2:
            return None
        if marker in _JPEG_FRAMES and marker not in (*_COMMON_JPEG_FRAMES, *_JPEG_TABLES):
            return None
        segment = data[position + 4 : position + 2 + length]
        if marker == 0xFFE1 and segment.startswith(b"Exif"):
            exif.append(_tiff_orientation(segment[6:]) if segment[4:6] == b"\0\0" else None)
        position += 2 + length
    return None


def known_orientation(value: int) -> int:
    """`value`, or 1 if it is not 1 to 8: some cameras write 0 for no rotation."""
    return value if value in range(1, 9) else 1


class _Chunk(NamedTuple):
    kind: bytes
    data: memoryview
    raw: memoryview  # with length, kind and checksum

    @property
    def intact(self) -> bool:
        """Whether the checksum matches the content."""
        return zlib.crc32(self.raw[4:-4]).to_bytes(4, "big") == self.raw[-4:]


@dataclass(frozen=True)
class Png:
    """A PNG, up to the point where its chunks can be followed.

    Attributes:
        width, height: pixels.
        depth: bits of a sample.
        colour: colour type.
        interlaced: whether the pixels are stored in seven passes.
        chunks: all chunks up to the end, or up to the first truncated one.
        rest: bytes behind those chunks.
    """

    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool
    chunks: Sequence[_Chunk]
    rest: memoryview

    @classmethod
    def of(cls, data: bytes) -> "Png | None":
        """The PNG in `data`; None if it is not a PNG or its header is invalid."""
        chunks, rest = _chunks(memoryview(data)[len(PNG_SIGNATURE) :])
        if not data.startswith(PNG_SIGNATURE) or not chunks or chunks[0].kind != b"IHDR" or len(chunks[0].data) != 13:
            return None
        width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", chunks[0].data)
        if not width or not height or colour not in _CHANNELS or depth not in (1, 2, 4, 8, 16):
            return None
        return cls(width, height, depth, colour, bool(interlaced), chunks, rest)

    @property
    def is_flawless(self) -> bool:
        """Whether all chunks up to the end are present with valid checksums."""
        return self.chunks[-1].kind == b"IEND" and all(chunk.intact for chunk in self.chunks)

    @property
    def is_animated(self) -> bool:
        """Whether there are several frames."""
        return any(chunk.kind == b"acTL" and bytes(chunk.data[:4]) > b"\0\0\0\1" for chunk in self.chunks)

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """The colours of the palette; empty without one."""
        data = next((bytes(chunk.data) for chunk in self.chunks if chunk.kind == b"PLTE"), b"")
        return [(data[k], data[k + 1], data[k + 2]) for k in range(0, len(data) - 2, 3)]

    @property
    def bare(self) -> bytes:
        """The same image with only the chunks that pixels depend on, without text and profiles."""
        needed = [chunk.raw for chunk in self.chunks if chunk.kind in _NEEDED_CHUNKS]
        return b"".join([PNG_SIGNATURE, *needed, b"" if self.chunks[-1].kind == b"IEND" else self.rest])

    @property
    def pixel_bytes(self) -> int:
        """Size of the decompressed pixels in bytes: rows of packed samples, each preceded by its filter number."""
        passes = _ADAM7 if self.interlaced else ((0, 0, 1, 1),)
        bits = _CHANNELS[self.colour] * self.depth
        total = 0
        for left, top, across, down in passes:
            columns, rows = -(-(self.width - left) // across), -(-(self.height - top) // down)
            if columns > 0 and rows > 0:
                total += rows * (1 + -(-columns * bits // 8))
        return total

    @property
    def pixel_fault(self) -> str | None:
        """A text about missing pixels; None if they are complete."""
        count, _ = self.inflated
        return None if count == self.pixel_bytes else f"its pixels end after {count} of {self.pixel_bytes} bytes"

    @property
    def is_wide_enough(self) -> bool:
        """Whether the compressed stream declares a window that the pixels fit in.

        Some encoders declare one that is too narrow, and libpng enforces it.
        """
        first = next((chunk.data[0] for chunk in self.chunks if chunk.kind == b"IDAT" and len(chunk.data)), 0)
        return min(self.pixel_bytes, 1 << 15) <= 1 << (8 + (first >> 4))

    @property
    def has_small_metadata(self) -> bool:
        """Whether text, profiles and other metadata are small enough for every reader."""
        room = _MAX_METADATA
        for chunk in self.chunks:
            if chunk.kind not in _NEEDED_CHUNKS:
                room -= len(chunk.raw) + _inflated_text(chunk, max(1, room))
        return room >= 0

    @cached_property
    def inflated(self) -> tuple[int, bool]:
        """Number of bytes of pixels, at most `pixel_bytes`, and whether their stream is valid.

        A valid stream ends there, with the right checksum. At most `_CHUNK_BYTES` are in memory at a time.
        """
        stream, count, limit = zlib.decompressobj(), 0, self.pixel_bytes
        parts = [chunk.data for chunk in self.chunks if chunk.kind == b"IDAT"]
        try:
            for part in parts:
                waiting: bytes | memoryview = part
                while len(waiting) and not stream.eof:
                    if count > limit:
                        return limit, False
                    count += len(stream.decompress(waiting, _CHUNK_BYTES))
                    waiting = stream.unconsumed_tail
            while not stream.eof and count <= limit and (more := len(stream.decompress(b"", _CHUNK_BYTES))):
                count += more
        except zlib.error:
            return min(count, limit), False
        return min(count, limit), stream.eof and count == limit and not stream.unused_data


def _tiff_orientation(tiff: bytes) -> int | None:
    """Orientation in the first table of a TIFF: byte order, 42, offset of the table, 12 bytes per entry."""
    order = {b"II\x2a\0": "<", b"MM\0\x2a": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (table,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, table)
        fields = struct.unpack_from(order + count * "HHI4s", tiff, table + 2)
    except struct.error:
        return None
    orientation = 1
    for tag, kind, length, value in zip(*[iter(fields)] * 4, strict=True):
        size = length * _TIFF_SIZES.get(kind, len(tiff))
        (offset,) = struct.unpack(order + "I", value)
        if (size > 4 and offset + size > len(tiff)) or (tag == _ORIENTATION and (kind, length) != (3, 1)):
            return None
        if tag == _ORIENTATION:
            orientation = known_orientation(struct.unpack_from(order + "H", value)[0])
    return orientation


def _chunks(data: memoryview) -> tuple[list[_Chunk], memoryview]:
    """The chunks up to the end, and the bytes behind them."""
    chunks: list[_Chunk] = []
    position = 0
    while position + 12 <= len(data) and not (chunks and chunks[-1].kind == b"IEND"):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        kind, content = bytes(data[position + 4 : position + 8]), data[position + 8 : end - 4]
        chunks.append(_Chunk(kind, content, data[position:end]))
        position = end
    return chunks, data[position:]


def _inflated_text(chunk: _Chunk, limit: int) -> int:
    """Decompressed size of the text or profile in a chunk, up to a little over `limit`; 0 for other chunks."""
    if chunk.kind not in (b"zTXt", b"iTXt", b"iCCP"):
        return 0
    text = bytes(chunk.data).partition(b"\0")[2][1:]  # behind the keyword and the method
    if chunk.kind == b"iTXt":
        text = text[1:].split(b"\0", 2)[-1]  # behind the method, the language and the translated keyword
    try:
        return len(zlib.decompressobj().decompress(text, limit + 1))
    except zlib.error:
        return 0
