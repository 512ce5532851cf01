"""Messages about files of a folder that are skipped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moce_ds.data.image_file import Rejected
from moce_ds.data.shards import REJECTED, Manifest
from moce_ds.text import in_line, part_of, printable

_NAMED = 3


def skipped_notice(folder: Path, named: Path) -> str | None:
    """What the shard set in `folder` skipped, under the name that the user knows; None if it took all files.

    Raises:
        ArtefactError, DataError: the set's manifest is missing or damaged.
    """
    manifest = Manifest.read(folder)
    count = sum(manifest.rejected.values())
    if not count:
        return None
    reasons = ", ".join(f"{number} {reason}" for reason, number in manifest.rejected.items())
    examples = _examples(folder / REJECTED)
    return printable(
        f"{in_line(named)}: {part_of(count, count + manifest.count, 'file', ('was', 'were'))} skipped, "
        f"since {'it is not a complete image' if count == 1 else 'they are not complete images'}: {reasons}"
        f"{_listed(examples, count)}"
    )


def listed_reasons(odd: Mapping[Path, Rejected]) -> str:
    """Some files with the reasons why they are skipped, one per line."""
    lines = [in_line(f"{path}: {why.reason} ({why.detail})") for path, why in odd.items()]
    return _listed(lines[:_NAMED], len(lines))


def _listed(examples: Sequence[str], count: int) -> str:
    more = f"\n  and {count - len(examples)} more" if examples and count > len(examples) else ""
    return "".join(f"\n  {example}" for example in examples) + more


def _examples(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()[:_NAMED]
        return [in_line("{path}: {reason} ({detail})".format(**json.loads(line))) for line in lines]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # a copy of the set without its list of names; the manifest still has the counts
