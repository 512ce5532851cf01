"""What an artefact is made from: recorded beside it, and compared before it is made again.

Whoever writes an artefact keeps a record of all that decides its content: settings, and fingerprints of what it reads.
When the same place is asked for again, the record has one of three outcomes: *absent*, make it; *same*, keep it or
resume it; *different*, refuse and name the differences, or make it again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moce_ds.config.settings import completed, differences
from moce_ds.errors import ArtefactError, MoceError


@dataclass(frozen=True)
class Comparison:
    """What a record says, beside what is asked for now.

    Attributes:
        differences: dotted keys at which the two differ, with the recorded value and the one of now; None where there
            is no record.
    """

    differences: dict[str, tuple[Any, Any]] | None

    @property
    def absent(self) -> bool:
        """Whether there is no record."""
        return self.differences is None

    @property
    def same(self) -> bool:
        """Whether there is a record, and it says the same."""
        return self.differences == {}

    @property
    def listed(self) -> str:
        """The differences, each on an indented line of its own."""
        return "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in (self.differences or {}).items())

    def refuse_different(self, what: str, kind: type[MoceError] = ArtefactError) -> None:
        """Raise `kind`, which names every difference, if there is a record and it differs.

        Args:
            what: the place and what it holds, such as "runs/clusters holds clusters".
        """
        if self.differences:
            raise kind(f"{what} made from something else; choose another folder or delete it:{self.listed}")


@dataclass(frozen=True)
class MadeFrom:
    """All that decides the content of an artefact.

    Attributes:
        parts: plain data, as JSON can hold it.
        settings: for each part that is a tree of settings, their class: a record of an earlier version is completed
            with the defaults of settings added since.
    """

    parts: dict[str, Any]
    settings: Mapping[str, type[Any]] = field(default_factory=dict)

    def compare(self, recorded: Mapping[str, Any] | None) -> Comparison:
        """Compare with a record, None where there is none. What else the record holds decides nothing."""
        if recorded is None:
            return Comparison(None)
        old = {name: recorded[name] for name in self.parts if name in recorded}
        for name, kind in self.settings.items():
            if isinstance(old.get(name, {}), dict):
                old[name] = completed(old.get(name, {}), kind)
        return Comparison(differences(old, json.loads(json.dumps(self.parts))))  # as it is read again: no tuples
