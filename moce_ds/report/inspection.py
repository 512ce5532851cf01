"""What a path of ours is and what it holds, for `moce inspect`: the artefacts describe and verify themselves."""

from pathlib import Path

from rich.table import Table

from moce_ds.artefacts.kinds import KINDS
from moce_ds.storage.artefact import recognised
from moce_ds.storage.checksums import Findings
from moce_ds.text import in_line


def describe(path: Path) -> Table:
    """What `path` is and holds, as a table. Raises ArtefactError when it is nothing of ours, or damaged."""
    kind = recognised(path, KINDS)
    table = Table(title=f"{in_line(path)}: {kind.kind}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in kind.open(path).describe().items():
        table.add_row(name, value)
    return table


def findings(path: Path) -> Findings:
    """Everything that is not as it was written; reads all of it.

    Raises:
        MoceError: as `describe`; or what the rest is compared with is missing or damaged.
    """
    return recognised(path, KINDS).open(path).verify()
