"""Records of what an artefact is made from, compared with what is requested now.

The writer of an artefact records all that determines its content (`MadeFrom`): settings, and fingerprints of its
inputs. A later command compares this record with its own settings and inputs. If there is no record, it makes the
artefact. If the record is the *same*, it keeps or resumes the artefact. If it is *different*, it refuses and lists the
differences, or makes the artefact again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moce_ds.common.config.settings import completed, differences
from moce_ds.common.errors import ArtefactError, MoceError


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a record with the current settings and inputs.

    Attributes:
        differences: dotted keys whose values differ, with the recorded and the current value; None if there is no
            record.
    """

    differences: dict[str, tuple[Any, Any]] | None

    @property
    def same(self) -> bool:
        """Whether there is a record without differences."""
        return self.differences == {}

    @property
    def listed(self) -> str:
        """The differences as text, one indented line each."""
        return "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in (self.differences or {}).items())

    def refuse_different(self, what: str, kind: type[MoceError] = ArtefactError) -> None:
        """Raise `kind`, listing all differences, if there is a record and it differs.

        Args:
            what: the path and its content, such as "runs/clusters holds clusters".
        """
        if self.differences:
            raise kind(f"{what} made from something else; choose another folder or delete it:{self.listed}")


@dataclass(frozen=True)
class MadeFrom:
    """All that determines the content of an artefact.

    Attributes:
        parts: plain data that JSON can hold.
        settings: the settings class of each part that is a tree of settings. Records of earlier versions are completed
            with the defaults of newer settings.
        digests: parts that map names to digests. A digest that is None in the record of an earlier version is unknown
            and counts as the same.
    """

    parts: dict[str, Any]
    settings: Mapping[str, type[Any]] = field(default_factory=dict)
    digests: Sequence[str] = ()

    def compare(self, recorded: Mapping[str, Any] | None) -> Comparison:
        """Compare with a record (None: there is no record). Other keys of the record are ignored."""
        if recorded is None:
            return Comparison(None)
        old = {name: recorded[name] for name in self.parts if name in recorded}
        for name, kind in self.settings.items():
            if isinstance(old.get(name, {}), dict):
                old[name] = completed(old.get(name, {}), kind)
        for name in self.digests:
            if isinstance(old.get(name), dict):
                now = self.parts[name]
                old[name] = {key: now.get(key) if known is None else known for key, known in old[name].items()}
        return Comparison(differences(old, json.loads(json.dumps(self.parts))))  # as JSON returns it: no tuples
