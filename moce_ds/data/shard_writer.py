"""`moce shards`: turns a folder of images into a shard set (docs/data-format.md).

Worker processes write the parts of the set, each a shard with its images (`shard_parts`). Several processes with ranks,
as `moce launch` starts them, also on several nodes, share the parts. Then the first one merges them into the tables.
The bytes on disk depend neither on the number of processes nor on interruptions.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import Positive, option, settings
from moce_ds.common.errors import DataError, MoceError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.host.threads import allowed_cpus
from moce_ds.common.storage.checksums import write_checked
from moce_ds.common.storage.files import atomic_file, read_json, write_json, writes_to
from moce_ds.common.storage.locks import LOCK, alone_in
from moce_ds.common.storage.text_lines import TextLines
from moce_ds.common.text import in_line, listed
from moce_ds.data.image_file import MAX_PIXELS
from moce_ds.data.shard_manifest import MANIFEST, Manifest
from moce_ds.data.shard_merge import write_tables
from moce_ds.data.shard_parts import LISTING, PLAN, Part, UnfinishedSet
from moce_ds.data.shard_team import ShardTeam, wait_for_begin
from moce_ds.data.shards import PROGRESS, ShardSet
from moce_ds.data.sources.image_folder import FolderSource
from moce_ds.data.sources.listing import Listing
from moce_ds.data.sources.source import Entry, Source, listing_line

_PARTS = {"parts": 1}
"""In a plan: the version of the files in `.progress/`. Earlier versions of moce wrote no number."""

_ALONE = ProcessRank(0, 1, 0)


@settings
class ShardSettings:
    """Division of a folder of images into shards."""

    images_per_shard: Positive = option(10_000, help="files of the source per tar file; rejected ones leave it smaller")
    max_pixels: Positive = option(
        MAX_PIXELS, help="maximum pixels of an image; a larger one may be a decompression bomb"
    )
    workers: Positive | None = option(None, help="processes that read and write; null: one per available core")


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


def write_shards(
    source: Path | Source,
    out: Path,
    config: ShardSettings,
    listing: Listing | None = None,
    here: ProcessRank = _ALONE,
) -> ShardReport:
    """Write the images of `source`, a folder or another source, as a shard set in `out`; resume an interrupted attempt.

    With a `listing` of images in a folder, only these are written, with its classes. A complete set stays unchanged.
    Files that are not images, damaged, empty or too large are counted, and listed with their reason in rejected.jsonl.
    With several processes, the first one calls this and the others `share_shards`.

    Raises:
        ArtefactError: `out` cannot be written to, or another process is writing it.
        DataError: no image can be decoded; `out` is inside `source`, holds other files, or was started with other files
            or settings; or a worker process died.
        LostPeerError: the other processes write nothing any more.
    """
    inputs = _Inputs(_as_source(source), Path(out).absolute(), config, listing)
    out, origin = inputs.out, inputs.source.origin
    if out.resolve().is_relative_to(origin.resolve()):
        raise DataError(f"{out} is inside the source folder {origin}: choose a folder outside of it.")
    if (out / MANIFEST).exists():
        return _complete(out, origin, inputs.plan())
    _refuse_foreign(out)
    busy = f"{out} is being written by another process: wait for it, or choose another folder."
    try:
        with alone_in(out, busy):
            if (out / MANIFEST).exists():  # another process completed it first
                return _complete(out, origin, inputs.plan())
            return _write(inputs, here)
    except DataError:
        with suppress(OSError):  # not empty: the same command may resume
            out.rmdir()
        raise


def share_shards(source: Path | Source, out: Path, config: ShardSettings, here: ProcessRank) -> None:
    """Write the parts of a process other than the first, which calls `write_shards`. Raises as `write_shards`."""
    source, out = _as_source(source), Path(out).absolute()
    wait_for_begin(out)
    if (out / MANIFEST).exists():
        return
    plan = read_json(out / PROGRESS / PLAN, *_PLAN)
    _refuse_other_plan(out, source.origin, plan, plan | _settings(config))
    try:
        ShardTeam(_unfinished(source, out, config), here, _workers(config, here)).write()
    except MoceError as error:
        error.every_process = True  # the first process knows nothing of it
        raise


def _as_source(source: Path | Source) -> Source:
    return FolderSource(source.absolute()) if isinstance(source, Path) else source


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Everything that determines what is written, and where."""

    source: Source
    out: Path
    config: ShardSettings
    listing: Listing | None

    def entries(self) -> Iterable[Entry]:
        """The entries to examine, in order. Raises DataError."""
        return self.source.entries() if self.listing is None else self.listing.files(self.source.origin)

    def plan(self, path: Path | None = None) -> dict[str, Any]:
        """What determines the content of the set; the listing goes to the file `path`. Raises DataError, OSError."""
        count, digest = 0, sha256()
        with open(path or os.devnull, "wb") as file:
            for entry in progress_bar(self.entries(), "listing", unit="file", disable=None, delay=2):
                line = listing_line(entry).encode("ascii")
                digest.update(line)
                file.write(line)
                count += 1
        plan = {"files": count, "listing_sha256": digest.hexdigest(), **_settings(self.config)}
        given = self.listing
        return plan | ({} if given is None else {"labels_sha256": given.digest, "seed": given.seed})


def _write(inputs: _Inputs, here: ProcessRank) -> ShardReport:
    out = inputs.out
    plan = _begin(inputs)
    unfinished = _unfinished(inputs.source, out, inputs.config)
    parts = ShardTeam(unfinished, here, _workers(inputs.config, here)).write()
    with writes_to(out):
        # Drafts of dead processes, also of other machines, which `drafts` keeps for a day: nobody writes any more.
        for draft in chain(out.glob(".*.tmp"), (out / PROGRESS).glob(".*.tmp")):
            draft.unlink()
        origin = (inputs.listing and inputs.listing.origin) or inputs.source.origin
        if not any(part.count for part in parts):
            _refuse_empty(unfinished, origin, parts)
        manifest = write_tables(unfinished, parts, inputs.listing, origin, plan)
        write_checked(out / MANIFEST, dataclasses.asdict(manifest))
        shutil.rmtree(out / PROGRESS, ignore_errors=True)
    return _report(out, manifest, already_complete=False)


def _begin(inputs: _Inputs) -> dict[str, Any]:
    """Write the listing and the plan, or compare them with those of an interrupted attempt; returns the plan."""
    out, progress = inputs.out, inputs.out / PROGRESS
    begun = (progress / PLAN).exists()
    try:
        with writes_to(out):
            progress.mkdir(exist_ok=True)
            with atomic_file(progress / LISTING) as temporary:
                plan = inputs.plan(temporary)
                if begun:
                    _refuse_other_plan(out, inputs.source.origin, read_json(progress / PLAN, *_PLAN), plan)
            if not begun:
                write_json(progress / PLAN, plan | _PARTS)
    except DataError:
        if not begun:
            shutil.rmtree(progress, ignore_errors=True)
        raise
    return plan


_PLAN = ("the plan of a shard set", "moce shards")


def _settings(config: ShardSettings) -> dict[str, Any]:
    """The settings that determine the content of a set."""
    return {"images_per_shard": config.images_per_shard, "max_pixels": config.max_pixels}


def _unfinished(source: Source, out: Path, config: ShardSettings) -> UnfinishedSet:
    return UnfinishedSet(source, out, TextLines(out / PROGRESS / LISTING), config.images_per_shard, config.max_pixels)


def _workers(config: ShardSettings, here: ProcessRank) -> int:
    """The number of worker processes of this process."""
    if config.workers or here.world_size == 1:
        return config.workers or allowed_cpus()
    share = os.environ.get("OMP_NUM_THREADS", "")  # as the launcher divides the cores of a node
    return int(share) if share.isdecimal() and int(share) else 1


def _complete(out: Path, source: Path, plan: dict[str, Any]) -> ShardReport:
    ShardSet.open(out)
    manifest = Manifest.read(out)
    _refuse_other_plan(out, source, manifest.made_from, plan)
    shutil.rmtree(out / PROGRESS, ignore_errors=True)  # left over if killed just after the manifest was written
    return _report(out, manifest, already_complete=True)


def _refuse_foreign(out: Path) -> None:
    """Raise DataError if a folder holds something other than an unfinished set, or cannot be made."""
    begun = (out / PROGRESS / "plan.json").exists()
    if out.exists() and not begun and (not out.is_dir() or any(e.name not in (PROGRESS, LOCK) for e in out.iterdir())):
        raise DataError(f"{out} is neither empty nor a shard set: choose another folder, or empty it.")
    if not (above := next(parent for parent in out.parents if parent.exists())).is_dir():
        raise DataError(f"{above} is a file; expected a folder for {out}: choose another place.")


def _refuse_other_plan(out: Path, source: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if not (out / MANIFEST).exists() and old.get("parts") != _PARTS["parts"]:
        raise DataError(
            f"{out} was begun by an earlier version of moce, and this version cannot resume it: finish it with that "
            f"version, choose another folder, or delete {out} to start over."
        )
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


def _refuse_empty(unfinished: UnfinishedSet, source: Path, parts: list[Part]) -> None:
    lines = (unfinished.rejected_of(number).splitlines() for number, part in enumerate(parts) if part.rejected)
    entries = map(json.loads, islice(chain.from_iterable(lines), 5))
    examples = [in_line(f"{entry['path']}: {entry['reason']} ({entry['detail']})") for entry in entries]
    count = sum(sum(part.rejected.values()) for part in parts)
    shutil.rmtree(unfinished.out / PROGRESS)
    if not count:
        raise DataError(f"{source}: No image to write: the folder holds no files; expected images, at any depth.")
    raise DataError(f"{source}: No image to write: of {count} files none could be decoded.{listed(examples, count)}")


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
