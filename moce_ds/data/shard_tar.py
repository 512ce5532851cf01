"""The members of a shard's tar file, and its index for DALI (docs/data-format.md).

Legend: n images of a shard. Their ids are consecutive and begin with `first_id`.
"""

import tarfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

_TAR_BLOCK = 512
_ID_BYTES = 8


def key_of(image_id: int) -> str:
    """Name of a sample in its tar, without the extension."""
    return f"{image_id:09d}"


def members_of(rows: np.ndarray, first_id: int) -> Iterator[tuple[str, int, int]]:
    """Name, content offset and size of each tar member, for `rows` [n] of the table."""
    for image_id, (offset, size) in enumerate(
        zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True), first_id
    ):
        key = key_of(image_id)
        yield f"{key}.jpg", offset, size
        yield f"{key}.idx", offset + -(-size // _TAR_BLOCK) * _TAR_BLOCK + _TAR_BLOCK, _ID_BYTES


def index_text(rows: np.ndarray, first_id: int) -> str:
    """DALI's index (v1.2, as `wds2idx` writes it) of a shard with `rows` [n] of the table."""
    entries = [f"{name[-3:]} {offset} {size} {name}" for name, offset, size in members_of(rows, first_id)]
    lines = [f"v1.2 {len(rows)}", *(" ".join(pair) for pair in zip(entries[::2], entries[1::2], strict=True))]
    return "\n".join(lines) + "\n"


def foreign_member(tar: Path, rows: np.ndarray, first_id: int) -> str | None:
    """A message about the first unexpected member of a tar file; None if all are as expected.

    This program reads by offset and ignores names, but unpacking the tar would follow them.
    """
    try:
        with tarfile.open(tar, "r:") as opened:
            members = opened.getmembers()
    except (tarfile.TarError, OSError, ValueError) as error:
        return f"not a tar file ({error})"
    for member, expected in zip_longest(members, members_of(rows, first_id)):
        if member is None or not member.isreg() or (member.name, member.offset_data, member.size) != expected:
            named = f"{member.name!r} of type {member.type!r}" if member else "no member"
            return f"{named} where {expected[0] if expected else 'nothing'} is expected: do not unpack it"
    return None
