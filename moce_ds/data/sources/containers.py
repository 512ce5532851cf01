"""A strict reader of JPEG containers; `png_file` reads those of PNG.

Pillow accepts faults that end a DALI pipeline, or that make DALI rotate an image differently. Fuzzing found the
relevant ones: stray bytes between the segments of a JPEG, and faults in the first table of its EXIF.
"""

import struct

# Bytes of a value of each TIFF type, 1 to 12.
_TIFF_SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8), start=1))
_ORIENTATION = 0x0112
_FRAMES = range(0xFFC0, 0xFFD0)
_OTHER_TABLES = (0xFFC4, 0xFFC8, 0xFFCC)  # Huffman tables, a reserved marker, arithmetic conditioning
_COMMON_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)
"""Baseline, extended and progressive with Huffman codes; few decoders support arithmetic codes or lossless."""


def jpeg_orientation(data: bytes) -> int | None:
    """EXIF orientation of a JPEG, 1 if it has none; None if its header or its EXIF has a fault, or its coding is
    unusual."""
    exif: list[int | None] = []
    position = 2
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFFDA:  # start of scan: the header is over
            return (exif or [1])[0] if len(exif) <= 1 else None
        if not 0xFFC0 <= marker <= 0xFFFE or length < 2:
            return None
        if marker in _FRAMES and marker not in (*_COMMON_FRAMES, *_OTHER_TABLES):
            return None
        segment = data[position + 4 : position + 2 + length]
        if marker == 0xFFE1 and segment.startswith(b"Exif"):
            exif.append(_tiff_orientation(segment[6:]) if segment[4:6] == b"\0\0" else None)
        position += 2 + length
    return None


def known_orientation(value: int) -> int:
    """`value`, or 1 if it is not 1 to 8: some cameras write 0 for no rotation."""
    return value if value in range(1, 9) else 1


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
