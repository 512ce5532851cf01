"""What a job was: the resolved settings and the version of the code, kept in the run folder before it is queued."""

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from moce_ds import __version__
from moce_ds.files import writes_to

LAUNCH = "launch.json"
_PACKAGES = ("torch", "deepspeed", "timm", "numpy", "submitit")


def new_launch_folder(parent: Path) -> Path:
    """The next free folder 0001, 0002, ... in `parent`: two launches at once get two.

    Raises:
        ArtefactError: it cannot be made.
    """
    with writes_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = parent / f"{number:04d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    raise AssertionError("count() does not end")


def write_snapshot(folder: Path, words: Sequence[str], launcher: dict[str, Any]) -> None:
    """Write `launch.json` (command, launcher's settings, versions), and changes.patch where the code has some that are
    not committed."""
    commit, patch = _code()
    record = {
        "command": ["moce", *words],
        "launcher": launcher,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "moce_ds": __version__,
        "commit": commit,
        "changed": bool(patch),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in _PACKAGES},
    }
    with writes_to(folder):
        (folder / LAUNCH).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if patch:
            (folder / "changes.patch").write_bytes(patch)


def _code() -> tuple[str | None, bytes]:
    """The commit that this program's files are of, and what was changed since; (None, b"") outside of git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, check=True).stdout

    try:
        tracked = git("ls-files", "--", Path(__file__).name)
        return (git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")) if tracked else (None, b"")
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return None, b""
