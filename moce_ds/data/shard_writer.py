"""`moce shards`: turns a folder of images into a shard set (docs/data-format.md).

Worker processes read, decode and, if needed, re-encode the files. One process takes their results in the order of the
sorted paths, assigns ids and writes. So the bytes on disk depend neither on the number of workers nor on interruptions:
a finished shard leaves a record of the file where the next one begins.
"""

import dataclasses
import io
import json
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import Positive, option, settings
from moce_ds.common.errors import DataError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.checksums import FileRecord, write_checked
from moce_ds.common.storage.files import (
    atomic_file,
    read_json,
    read_record,
    save_array,
    sha256_of,
    write_json,
    writes_to,
)
from moce_ds.common.storage.locks import LOCK, alone_in
from moce_ds.common.text import in_line, listed
from moce_ds.data.image_file import MAX_PIXELS, Accepted, Rejected
from moce_ds.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    PROGRESS,
    REJECTED,
    SAMPLE,
    SAMPLES,
    SOURCES,
    TARGETS,
    Manifest,
    ShardFile,
    ShardSet,
    fingerprint_of,
    index_name,
    index_text,
    key_of,
    shard_name,
)
from moce_ds.data.sources.image_folder import SourceFile, examined, list_files, listing_digest
from moce_ds.data.sources.listing import Listing


@settings
class ShardSettings:
    """Division of a folder of images into shards."""

    images_per_shard: Positive = option(10_000, help="images per tar file; the last may have fewer")
    max_pixels: Positive = option(
        MAX_PIXELS, help="maximum pixels of an image; a larger one may be a decompression bomb"
    )
    workers: Positive | None = option(None, help="decoding processes; null: one per available core")


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """The counts of a new or existing (`already_complete`) set; `rejected` counts files by reason (rejected.jsonl)."""

    path: Path
    count: int
    shards: int
    bytes: int
    classes: int
    rejected: dict[str, int]
    fingerprint: str
    already_complete: bool


@dataclasses.dataclass
class _Record:
    """The contribution of a shard to the set, stored in a file until the set is complete. No images, no shard."""

    next_file: int  # the first file of the source that is not processed yet
    shard: ShardFile | None = None
    rows: list[tuple[int, ...]] = dataclasses.field(default_factory=list)  # of SAMPLE, without the label
    sources: list[str] = dataclasses.field(default_factory=list)
    rejected: list[dict[str, str]] = dataclasses.field(default_factory=list)


def write_shards(source: Path, out: Path, config: ShardSettings, listing: Listing | None = None) -> ShardReport:
    """Write the images below `source` as a shard set in `out`; resume an interrupted attempt.

    With a `listing`, only its images are written, with its classes. A complete set stays unchanged. Files that are not
    images, damaged, empty or too large are counted, and listed with their reason in rejected.jsonl.

    Raises:
        ArtefactError: `out` cannot be written to, or another process is writing it.
        DataError: no image can be decoded; `out` is inside `source`, holds other files, or was started with other files
            or settings; or a worker process died.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out} is inside the source folder {source}: choose a folder outside of it.")
    files = list_files(source) if listing is None else listing.files(source)
    plan = _plan(files, config) | ({} if listing is None else {"labels_sha256": listing.digest, "seed": listing.seed})
    if (out / MANIFEST).exists():
        return _complete(out, source, plan)
    _refuse_foreign(out)
    busy = f"{out} is being written by another process: wait for it, or choose another folder."
    try:
        with alone_in(out, busy):
            if (out / MANIFEST).exists():  # another process completed it first
                return _complete(out, source, plan)
            return _write(source, out, files, plan, config, listing)
    except DataError:
        with suppress(OSError):  # not empty: the same command may resume
            out.rmdir()
        raise


def _write(
    source: Path,
    out: Path,
    files: Sequence[SourceFile],
    plan: dict[str, Any],
    config: ShardSettings,
    listing: Listing | None,
) -> ShardReport:
    _begin(out, source, plan)
    records = _finished_records(out)
    with writes_to(out):
        _write_missing(source, out, files, records, config)
        manifest = _write_tables(out, records, source, plan, listing)
        write_checked(out / MANIFEST, dataclasses.asdict(manifest))
        shutil.rmtree(out / PROGRESS, ignore_errors=True)
    return _report(out, manifest, already_complete=False)


def _plan(files: Sequence[SourceFile], config: ShardSettings) -> dict[str, Any]:
    """Everything that determines what is written."""
    return {
        "files": len(files),
        "listing_sha256": listing_digest(files),
        "images_per_shard": config.images_per_shard,
        "max_pixels": config.max_pixels,
    }


def _complete(out: Path, source: Path, plan: dict[str, Any]) -> ShardReport:
    ShardSet.open(out)
    manifest = Manifest.read(out)
    _refuse_other_plan(out, source, manifest.made_from, plan)
    shutil.rmtree(out / PROGRESS, ignore_errors=True)  # left over if killed just after the manifest was written
    return _report(out, manifest, already_complete=True)


def _begin(out: Path, source: Path, plan: dict[str, Any]) -> None:
    plan_file = out / PROGRESS / "plan.json"
    if plan_file.exists():
        _refuse_other_plan(out, source, read_json(plan_file, "the plan of a shard set", "moce shards"), plan)
        # Also drafts of other machines, which `drafts` keeps for a day: this process is the only writer of the folder.
        for unfinished in [*out.glob(".*.tmp"), *(out / PROGRESS).glob(".*.tmp")]:
            unfinished.unlink()
        return
    with writes_to(out):
        write_json(plan_file, plan)


def _refuse_foreign(out: Path) -> None:
    """Raise DataError if a folder holds something other than an unfinished set, or cannot be made."""
    begun = (out / PROGRESS / "plan.json").exists()
    if out.exists() and not begun and (not out.is_dir() or any(e.name not in (PROGRESS, LOCK) for e in out.iterdir())):
        raise DataError(f"{out} is neither empty nor a shard set: choose another folder, or empty it.")
    if not (above := next(parent for parent in out.parents if parent.exists())).is_dir():
        raise DataError(f"{above} is a file; expected a folder for {out}: choose another place.")


def _refuse_other_plan(out: Path, source: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    listing = {"labels_sha256": None, "seed": None}  # of a set whose images a listing names
    changed = dict(MadeFrom(listing | new).compare(old).differences or {})
    seed_before, seed_now = changed.pop("seed", (None, None))  # it matters only if it drew other images
    if "listing_sha256" in changed:
        before, now = changed.get("files", (new["files"],) * 2)
        what = f"{source} had other files or file sizes before ({before} files before, {now} now)"
        if seed_before is not None:
            what = f"seed was {seed_before}, now {seed_now}, which may draw other images; or {what}"
    elif changed:
        what = ", ".join(f"{key} was {before}, now {now}" for key, (before, now) in changed.items())
    else:
        return
    raise DataError(
        f"{out} was begun with other inputs: {what}. Use the same files and settings, choose another folder, "
        f"or delete {out} to start over."
    )


def _finished_records(out: Path) -> list[_Record]:
    records: list[_Record] = []
    while (path := _record_path(out, len(records))).exists():
        records.append(read_record(path, _Record, "the record of a shard", "moce shards"))
    return records


def _record_path(out: Path, number: int) -> Path:
    return out / PROGRESS / f"{number:06d}.json"


def _write_missing(
    source: Path, out: Path, files: Sequence[SourceFile], records: list[_Record], config: ShardSettings
) -> None:
    """Write the shards without a record, and append theirs to `records`."""
    next_file = records[-1].next_file if records else 0
    first_id = sum(len(record.rows) for record in records)
    bar = progress_bar(total=len(files), initial=next_file, desc="shards", unit="file", disable=None)
    with bar, closing(examined(source, files[next_file:], config.max_pixels, config.workers)) as results:
        while next_file < len(files):
            record = _write_shard(out, len(records), first_id, next_file, results, config.images_per_shard, bar)
            write_json(_record_path(out, len(records)), dataclasses.asdict(record))
            records.append(record)
            next_file, first_id = record.next_file, first_id + len(record.rows)


def _write_shard(
    out: Path,
    number: int,
    first_id: int,
    next_file: int,
    results: Iterable[tuple[SourceFile, Accepted | Rejected]],
    capacity: int,
    bar: "tqdm[Any]",
) -> _Record:
    record = _Record(next_file)
    path = out / shard_name(number)
    with atomic_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for file, result in results:
                bar.update()
                record.next_file += 1
                if isinstance(result, Rejected):
                    record.rejected.append({"path": file.path, **result._asdict()})
                    continue
                offset = _add_sample(tar, first_id + len(record.rows), result.data)
                size = len(result.data), result.height, result.width
                record.rows.append((number, offset, *size, zlib.crc32(result.data)))
                record.sources.append(file.path)
                if len(record.rows) == capacity:
                    break
        digest, count = sha256_of(temporary), len(record.rows)
        record.shard = ShardFile(path.name, temporary.stat().st_size, digest, count)
    if not record.rows:  # all remaining files of the source were rejected
        path.unlink()
        record.shard = None
        return record
    with atomic_file(out / index_name(path.name)) as temporary:
        temporary.write_text(index_text(_samples(record.rows), first_id), encoding="ascii")
    return record


def _add_sample(tar: tarfile.TarFile, image_id: int, data: bytes) -> int:
    """Append an image and its id; returns the offset of the image's bytes."""
    offset = tar.offset + tarfile.BLOCKSIZE
    for extension, content in (("jpg", data), ("idx", image_id.to_bytes(8, "little", signed=True))):
        member = tarfile.TarInfo(f"{key_of(image_id)}.{extension}")  # mtime, uid and gid are 0
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return offset


def _samples(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """`rows` as an array [n] of SAMPLE with labels -1."""
    samples = np.empty(len(rows), SAMPLE)
    columns = ("shard", "offset", "size", "height", "width", "crc32")
    for name, column in zip(columns, zip(*rows, strict=True), strict=True):
        samples[name] = column
    samples["label"] = -1
    return samples


def _write_tables(
    out: Path, records: Sequence[_Record], source: Path, plan: dict[str, Any], listing: Listing | None
) -> Manifest:
    """Merge the records of the shards into the tables of the set; returns the manifest without writing it."""
    rejected = [entry for record in records for entry in record.rejected]
    if not any(record.rows for record in records):
        _refuse_empty(out, (listing and listing.origin) or source, rejected)
    sources = [path for record in records for path in record.sources]
    listing = listing or Listing.of_folders(sources)
    samples = np.concatenate([_samples(record.rows) for record in records if record.rows])
    samples["label"] = listing.labels(sources)
    targets = listing.targets(sources) if listing.multi_label else None
    tables = [SAMPLES, SOURCES, REJECTED, *([] if targets is None else [TARGETS])]
    for name, array in ((SAMPLES, samples), (TARGETS, targets)):
        if array is not None:
            save_array(out / name, array)
    for name, entries in ((SOURCES, sources), (REJECTED, rejected)):
        with atomic_file(out / name) as temporary, open(temporary, "w", encoding="ascii") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    return Manifest(
        version=FORMAT_VERSION,
        count=len(samples),
        fingerprint=fingerprint_of(samples, targets),
        rejected=dict(sorted(Counter(entry["reason"] for entry in rejected).items())),
        classes=listing.classes,
        shards=[record.shard for record in records if record.shard],
        source=str(listing.origin or source),
        made_from=plan,
        multi_label=listing.multi_label,
        files={name: FileRecord.of(out / name) for name in tables},
    )


def _refuse_empty(out: Path, source: Path, rejected: Sequence[dict[str, str]]) -> None:
    shutil.rmtree(out / PROGRESS)
    if not rejected:
        raise DataError(f"{source}: No image to write: the folder holds no files; expected images, at any depth.")
    examples = [in_line(f"{entry['path']}: {entry['reason']} ({entry['detail']})") for entry in rejected[:5]]
    raise DataError(
        f"{source}: No image to write: of {len(rejected)} files none could be decoded.{listed(examples, len(rejected))}"
    )


def _report(out: Path, manifest: Manifest, already_complete: bool) -> ShardReport:
    return ShardReport(
        path=out,
        count=manifest.count,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        classes=len(manifest.classes),
        rejected=manifest.rejected,
        fingerprint=manifest.fingerprint,
        already_complete=already_complete,
    )
