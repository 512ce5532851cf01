"""A small file system in memory that tests fill up, or make read-only."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """A mounted file system; see `mounted_disk`."""

    path: Path

    @property
    def _filler(self) -> Path:
        return self.path / ".filler"

    def fill(self, left: int) -> None:
        """Write a file that leaves only `left` bytes free."""
        self._filler.write_bytes(bytes(shutil.disk_usage(self.path).free - left))

    def free(self) -> None:
        """Remove that file."""
        self._filler.unlink()

    def remount(self, how: str) -> None:
        """Make it read-only ("ro") or writable ("rw")."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)

    def files(self) -> set[str]:
        """Relative paths of its files, except empty lock files: removing them would race with processes that wait."""
        files = {path for path in self.path.rglob("*") if path.is_file()}
        locks = {path for path in files if path.suffix == ".lock" and path.stat().st_size == 0}
        return {str(path.relative_to(self.path)) for path in files - locks - {self._filler}}

    def clear(self) -> None:
        """Make it writable, and remove everything from it."""
        self.remount("rw")
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Disk]:
    """A file system of `size` ("512k", "24m") at `folder`; skips the test where this user may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a small tmpfs: {done.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
