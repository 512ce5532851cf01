"""Shard sets of any number of images for measurements, in the finished format: tables with rows that are valid, and
tar files that are sparse. The images themselves are zeros and cannot be decoded.

A set of 100 million images takes 3.6 GB for its rows and 3.5 GB for its sources; its tar files take no space.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from moce_ds.common.storage.checksums import FileRecord, write_checked
from moce_ds.common.storage.files import atomic_file
from moce_ds.data.sample_table import SAMPLE, SAMPLES, Fingerprint, rows_checksum
from moce_ds.data.shard_manifest import FORMAT_VERSION, MANIFEST, Manifest, ShardFile, shard_name
from moce_ds.data.shards import REJECTED, SOURCES, ShardSet

_MEMBER_BYTES = 1536  # of a tar beside an image's own bytes: two headers, and the id in a block
_TAR_END = 10240  # a tar is padded to a multiple of it


def write_synthetic_set(
    out: Path, count: int, images_per_shard: int = 10_000, image_bytes: int = 110_000, classes: int = 1000
) -> ShardSet:
    """Write a set of `count` images of 224 x 224 pixels and open it. Its shards do not have their SHA-256.

    Args:
        out: a new folder.
        image_bytes: size of every image; a row says so, and the size of a tar fits.
        classes: number of classes; the labels follow a fixed pseudo-random order.
    """
    out.mkdir(parents=True)
    stride = _MEMBER_BYTES + -(-image_bytes // 512) * 512
    shards, fingerprint = [], Fingerprint()
    with atomic_file(out / SAMPLES) as table, open(table, "wb") as opened:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(opened, header)
        for number, first_id in enumerate(range(0, count, images_per_shard)):
            rows = _rows(number, first_id, min(images_per_shard, count - first_id), stride, image_bytes, classes)
            size = -(-(stride * len(rows) + 1024) // _TAR_END) * _TAR_END
            with open(out / shard_name(number), "wb") as tar:
                tar.truncate(size)
            opened.write(rows.tobytes())
            fingerprint.add_rows(rows)
            shards.append(ShardFile(shard_name(number), size, "0" * 64, len(rows), rows_checksum(rows)))
    _write_lines(out / SOURCES, count)
    (out / REJECTED).touch()
    manifest = Manifest(
        version=FORMAT_VERSION,
        count=count,
        fingerprint=fingerprint.text,
        rejected={},
        classes=[f"class-{number:06d}" for number in range(classes)],
        shards=shards,
        source="synthetic",
        made_from={"files": count, "listing_sha256": hashlib.sha256(b"synthetic").hexdigest()},
        files={name: FileRecord.of(out / name) for name in (SAMPLES, SOURCES, REJECTED)},
    )
    write_checked(out / MANIFEST, asdict(manifest))
    return ShardSet.open(out)


def _rows(number: int, first_id: int, count: int, stride: int, image_bytes: int, classes: int) -> np.ndarray:
    rows = np.empty(count, SAMPLE)
    ids = np.arange(first_id, first_id + count, dtype=np.uint64)
    scrambled = (ids * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)  # wraps: the same on every machine
    rows["shard"], rows["size"], rows["height"], rows["width"] = number, image_bytes, 224, 224
    rows["offset"] = np.arange(count) * stride + 512
    rows["label"], rows["crc32"] = scrambled % np.uint64(classes), scrambled
    return rows


def _write_lines(path: Path, count: int) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for part in _parts(count):
            file.write("".join(f'"{number // 1000:06d}/{number:09d}.jpg"\n' for number in part))


def _parts(count: int, step: int = 10_000) -> Iterator[range]:
    return (range(start, min(start + step, count)) for start in range(0, count, step))
