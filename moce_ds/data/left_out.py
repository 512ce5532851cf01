"""Files of a source folder that a shard set left out, in words."""

import json
from pathlib import Path

from moce_ds.data.shards import REJECTED, Manifest
from moce_ds.text import in_line, printable

_NAMED = 3


def left_out(folder: Path, named: Path) -> str | None:
    """What the shard set in `folder` left out, called by the name that the user knows; None where it took all files.

    Raises:
        ArtefactError, DataError: the set's manifest is missing or damaged.
    """
    manifest = Manifest.read(folder)
    count = sum(manifest.rejected.values())
    if not count:
        return None
    reasons = ", ".join(f"{number} {reason}" for reason, number in manifest.rejected.items())
    examples = _examples(folder / REJECTED)
    listed = "".join(f"\n  {example}" for example in examples)
    more = f"\n  and {count - len(examples)} more" if examples and count > len(examples) else ""
    return printable(
        f"WARNING: {in_line(named)}: {count} of {count + manifest.count} files were left out, since they are no whole "
        f"images: {reasons}{listed}{more}"
    )


def _examples(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()[:_NAMED]
        return [in_line("{path}: {reason} ({detail})".format(**json.loads(line))) for line in lines]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # a copy of the set without its list of names: the counts are in the manifest
