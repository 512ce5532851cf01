"""A folder of results that can be computed again: bounded in size, shared by processes, never trusted.

        FOLDER/KIND-KEY/          an entry: files, and their checksums in entry.json; its mtime is its last use
        FOLDER/.locks/            one process at a time makes an entry
        FOLDER/moce-MACHINE-PID-  the own copies of a process, and what it is making

An entry gets its name when it is complete. Who takes an entry gets a copy of it, by hard links, and compares the copy
with the checksums: another process may remove the entry at any time, and damage is found before anything is used.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.host.identity import program_identity
from moce_ds.common.host.program import warn
from moce_ds.common.storage.checksums import Files, file_findings, names_below, read_checked, records_of, write_checked
from moce_ds.common.storage.drafts import draft_of, scratch_folder
from moce_ds.common.storage.files import atomic_folder, check_writable, copy_tree, writes_to
from moce_ds.common.storage.locks import locked

FOLDER, GIB = "MOCE_CACHE", "MOCE_CACHE_GIB"
"""Environment variables: the folder of the cache or `OFF`, and its bound."""
OFF = "off"

_DEFAULT_GIB = 10.0
_ENTRY = "entry.json"
_LOCKS = ".locks"
_LONGEST_USE = 30 * 24 * 3600.0  # seconds; a process of another machine uses its copies without changing them
_PATIENCE = 600.0  # seconds to wait for the process that makes an entry
_FORMAT = "moce cache 1"
_NOT_USED = f"The cache is not used; {FOLDER} names another folder."

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """A cache in a folder.

    Attributes:
        folder: exists, and can be written to.
        bound: bytes of all entries together; one entry may have half of them.
    """

    folder: Path
    bound: int

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Cache | None":
        """The cache that the environment names, by default in the user's cache folder; None if it is off, or if its
        folder cannot be written to, with a warning.

        Raises:
            ConfigError: the bound is not a positive number.
        """
        named = environment.get(FOLDER) or str(Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "moce_ds")
        if named == OFF:
            return None
        try:
            folder = Path(named).expanduser().absolute()
            check_writable(folder / _ENTRY)
            with writes_to(folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (ArtefactError, RuntimeError) as error:  # RuntimeError: this user has no home folder
            _warn_once(f"{error} {_NOT_USED}")
            return None
        return cls(folder, int(_gib(environment) * 2**30))

    def fits(self, size: int) -> bool:
        """Whether an entry of this size in bytes may be kept."""
        return size <= self.bound // 2

    @contextmanager
    def own_folder(self) -> Iterator[Path | None]:
        """A folder of this process on the disk of the cache, for the length of the block; None, with a warning, if the
        disk refuses it."""
        with ExitStack() as stack:
            folder = None
            try:
                folder = stack.enter_context(scratch_folder(self.folder, _LONGEST_USE))
            except ArtefactError as error:
                _warn_once(f"{error} {_NOT_USED}")
            yield folder

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A block that one process at a time enters for the same entry: others wait, and find it.

        Raises:
            ArtefactError: the lock cannot be written, or another process holds it for too long, or has left it behind.
        """
        lock = self.folder / _LOCKS / f"{name[-2:]}.lock"  # so there are 256 of them at most
        busy = f"{lock} has been held for {_PATIENCE / 60:.0f} minutes. Delete it if no other process of moce runs."
        with locked(lock, busy, seconds=_PATIENCE):
            yield

    def take(self, name: str, to: Path) -> bool:
        """Copy an entry to the new folder `to`, as it was kept. False if there is none; a damaged one is removed."""
        entry = self.folder / name
        if not entry.exists():
            return False
        try:
            copy_tree(entry, to)
        except OSError as error:
            _logger.debug(f"{entry} cannot be copied: {error}")  # another process has removed it
            shutil.rmtree(to, ignore_errors=True)  # a part of it
            return False
        if faults := _faults(to):
            _logger.warning(f"{entry} is damaged and not used: {faults[0]}")
            self._remove(entry)
            shutil.rmtree(to, ignore_errors=True)
            return False
        (to / _ENTRY).unlink()
        with suppress(OSError):
            os.utime(entry)
        return True

    def keep(self, name: str, folder: Path) -> None:
        """Keep the files of a folder as an entry, by hard links, and remove the entries that were not used for longest.
        Failures are logged: the result exists without the cache.
        """
        names, entry = names_below(folder), self.folder / name
        if not self.fits(sum((folder / one).stat().st_size for one in names)):
            return
        try:
            with writes_to(entry), atomic_folder(entry) as draft:
                copy_tree(folder, draft)
                write_checked(draft / _ENTRY, {"format": _FORMAT, "files": records_of(draft, names)})
        except ArtefactError as error:
            warn(f"{error} The result is not kept in the cache.")
        self._shrink()

    def _shrink(self) -> None:
        """Remove entries that were not used for longest until the others are within the bound."""
        found = []
        for entry in self.folder.iterdir():
            with suppress(OSError):  # another process has removed it
                if not entry.name.startswith(".") and (entry / _ENTRY).exists():
                    size = sum((entry / name).stat().st_size for name in names_below(entry))
                    found.append((entry.stat().st_mtime_ns, entry, size))
        excess = sum(size for _, _, size in found) - self.bound
        for _, entry, size in sorted(found):
            if excess <= 0:
                return
            self._remove(entry)
            excess -= size

    def _remove(self, entry: Path) -> None:
        """Remove an entry; it loses its name first, so that no process finds a part of it."""
        with suppress(OSError):
            aside = draft_of(entry)
            entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class _Record:
    """`entry.json`."""

    files: Files


def entry_name(kind: str, *made_from: object) -> str:
    """The name of the entry that this program makes from `made_from`, as plain data: another program, or other
    libraries, may compute other bits."""
    text = json.dumps([program_identity(), *made_from], sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}"


def _faults(folder: Path) -> list[str]:
    """How a copy of an entry differs from what was kept."""
    try:
        return file_findings(folder, read_checked(folder / _ENTRY, _Record, "it", "moce", format=_FORMAT).files).faults
    except ArtefactError as error:
        return [str(error)]


def _gib(environment: Mapping[str, str]) -> float:
    text = environment.get(GIB) or str(_DEFAULT_GIB)
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not 0 < bound < math.inf:
        raise ConfigError(f"{GIB} is {text!r}, expected a number of GiB above 0; {FOLDER}={OFF} uses no cache.")
    return bound


@cache
def _warn_once(text: str) -> None:
    warn(text)
