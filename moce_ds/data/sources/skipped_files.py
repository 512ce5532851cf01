"""Files of a folder that are left out of a set, in words."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moce_ds.data.image_file import Rejected
from moce_ds.data.shards import REJECTED, Manifest
from moce_ds.text import in_line, part_of, printable

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
    return printable(
        f"{in_line(named)}: {part_of(count, count + manifest.count, 'file', ('was', 'were'))} left out, "
        f"since {'it is no whole image' if count == 1 else 'they are no whole images'}: {reasons}"
        f"{_listed(examples, count)}"
    )


def told_left_out(odd: Mapping[Path, Rejected]) -> str:
    """Some files with the reasons why they are left out, a line each."""
    told = [in_line(f"{path}: {why.reason} ({why.detail})") for path, why in odd.items()]
    return _listed(told[:_NAMED], len(told))


def _listed(examples: Sequence[str], count: int) -> str:
    more = f"\n  and {count - len(examples)} more" if examples and count > len(examples) else ""
    return "".join(f"\n  {example}" for example in examples) + more


def _examples(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()[:_NAMED]
        return [in_line("{path}: {reason} ({detail})".format(**json.loads(line))) for line in lines]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # a copy of the set without its list of names: the counts are in the manifest
