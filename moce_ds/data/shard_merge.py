"""The tables and the manifest of a shard set, made of its parts one after the other."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.checksums import FileRecord
from moce_ds.common.storage.files import atomic_file
from moce_ds.data.sample_table import SAMPLE, SAMPLES, TARGETS, Fingerprint, rows_checksum
from moce_ds.data.shard_manifest import FORMAT_VERSION, Manifest, ShardFile, shard_name
from moce_ds.data.shard_parts import Part, UnfinishedSet
from moce_ds.data.shards import REJECTED, SOURCES
from moce_ds.data.sources.listing import Listing


def write_tables(
    unfinished: UnfinishedSet, parts: Sequence[Part], listing: Listing | None, origin: Path, made_from: dict[str, Any]
) -> Manifest:
    """Merge the parts, all finished, into the tables of the set; returns its manifest without writing it.

    Only one part is in memory.

    Args:
        listing: the classes of the images; None: those that the source gave.
        origin, made_from: as in the manifest.

    Raises:
        OSError: the folder cannot be written. ArtefactError: a record is damaged.
    """
    out, count = unfinished.out, sum(part.count for part in parts)
    found = set(chain.from_iterable(part.classes for part in parts))
    classes = listing.classes if listing else unfinished.source.class_order(found)
    multi_label = listing is not None and listing.multi_label
    names = [SAMPLES, SOURCES, REJECTED, *([TARGETS] if multi_label else [])]
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(stack.enter_context(atomic_file(out / name)), "wb")) for name in names}
        _write_header(files[SAMPLES], SAMPLE, (count,))
        if multi_label:
            _write_header(files[TARGETS], np.dtype(np.int8), (count, len(classes)))
        shards, fingerprint = _merge(unfinished, parts, listing, classes, files)
    if multi_label:
        fingerprint.add_targets(np.lib.format.open_memmap(out / TARGETS, mode="r"))
    reasons: Counter[str] = sum((Counter(part.rejected) for part in parts), Counter())
    return Manifest(
        version=FORMAT_VERSION,
        count=count,
        fingerprint=fingerprint.text,
        rejected=dict(sorted(reasons.items())),
        classes=classes,
        shards=shards,
        source=str(origin),
        made_from=made_from,
        multi_label=multi_label,
        files={name: FileRecord.of(out / name) for name in names},
    )


def _merge(
    unfinished: UnfinishedSet,
    parts: Sequence[Part],
    listing: Listing | None,
    classes: list[str],
    files: Mapping[str, BinaryIO],
) -> tuple[list[ShardFile], Fingerprint]:
    """Append the parts to the tables; returns the shards, and the fingerprint of all rows."""
    shards, fingerprint = list[ShardFile](), Fingerprint()
    label_of = {name: label for label, name in enumerate(classes)}
    for number, part in enumerate(progress_bar(parts, "tables", unit="shard", disable=None, delay=2)):
        if part.rejected:
            files[REJECTED].write(unfinished.rejected_of(number))
        if not part.count:
            continue
        sources, rows = unfinished.sources_of(number), unfinished.rows_of(number)
        rows["shard"] = len(shards)
        if listing is None:  # a label is a position in the part's own classes; -1, of no class, is the last position
            rows["label"] = np.array([*(label_of[name] for name in part.classes), -1])[rows["label"]]
        else:
            paths = [json.loads(line) for line in sources.splitlines()]
            rows["label"] = listing.labels(paths)
            if listing.multi_label:
                files[TARGETS].write(listing.targets(paths).tobytes())
        files[SAMPLES].write(rows.tobytes())
        files[SOURCES].write(sources)
        fingerprint.add_rows(rows)
        checksum = rows_checksum(rows)
        shards.append(ShardFile(shard_name(number), part.bytes, part.sha256, part.count, checksum))
    return shards, fingerprint


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The header of a `.npy` file, as numpy writes it before an array."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
