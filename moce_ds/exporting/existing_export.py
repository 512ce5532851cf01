"""What the folder of a requested export already holds: the same export is kept, anything else is refused.

`--replace` allows that an earlier export of another request is replaced.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.drafts import restore
from moce_ds.common.storage.encoder_folder import PROVENANCE, EncoderFolder, ExportFolder
from moce_ds.common.storage.files import check_writable

ROUTE = "route-"
"""Prefix of the folder names that `--all` writes."""

_logger = logging.getLogger(__name__)


def check_free(out: Path, replace: bool) -> None:
    """Check that `out` can be written, and does not exist or holds an earlier export.

    Called before any image is read. Whether an earlier export is the requested one is known later: `earlier_export`.

    Raises:
        ConfigError: `out` holds something else.
        ArtefactError: `out` cannot be written.
    """
    check_writable(out)
    restore(out)
    if out.exists() and not (_is_export(out) or names_of_all(out)):
        raise _refusal(out)


def earlier_export(out: Path, made_from: Mapping[str, Any], replace: bool) -> dict[str, Any] | None:
    """The provenance of the export in `out` if it is the requested one, complete and undamaged; None if `out` is free.

    Args:
        made_from: the entries of its provenance that the request determines.
        replace: an earlier export gives way.

    Raises:
        ConfigError: `out` holds something else, another export, or a damaged one.
        ArtefactError: `out` cannot be written, or the records of the export are damaged.
    """
    check_free(out, replace)
    if replace or not out.exists():
        return None
    if not _is_export(out):
        raise _refusal(out)
    found = (ExportFolder if ExportFolder.recognises(out) else EncoderFolder).open(out)
    recorded = found.made_from
    if differences := MadeFrom(dict(made_from)).compare(recorded).listed:
        raise _refusal(out, f" It holds another export:{differences}")
    if faults := found.verify().faults:
        raise _refusal(out, "\n  ".join([" It holds this export, but it is damaged:", *faults]))
    _logger.info(f"{out}: this export is complete; nothing was written.")
    return recorded


def names_of_all(folder: Path) -> set[str]:
    """The names of the exports in a folder that `--all` wrote; none if the folder contains anything else."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    whole = all(path.name.startswith(ROUTE) and _is_export(path) for path in entries)
    return {path.name for path in entries} if whole else set()


def refuse_other_routes(out: Path, requested: set[str]) -> None:
    """Raise ConfigError if a folder of `--all` does not hold exactly the requested routes."""
    if names_of_all(out) != requested:
        raise _refusal(out)


def _refusal(out: Path, why: str = "") -> ConfigError:
    return ConfigError(f"{out} exists: export into another folder, or remove it (--replace: an earlier export).{why}")


def _is_export(folder: Path) -> bool:
    return (folder / PROVENANCE).is_file()
