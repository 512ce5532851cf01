"""The result of a check: one line for a person, one entry for a program."""

from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "fault"]

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "fault": "bold red"}
_STATUS_WIDTH, _NAME_WIDTH = 7, 13


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: what was checked, such as "open files".
        text: what was found.
        status: "fault" if it makes verbs fail, "warning" if it can make some fail or slow.
        cure: what to do, in full sentences; "" if there is nothing to do.
    """

    name: str
    text: str
    status: Status = "ok"
    cure: str = ""

    def row(self) -> Table:
        """The finding as one row; text that does not fit continues below, in its column."""
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=_STATUS_WIDTH)
        row.add_column(width=_NAME_WIDTH)
        row.add_column(overflow="fold")
        text = f"{self.text}. {self.cure}" if self.cure else self.text
        row.add_row(Text(self.status, style=_STYLES[self.status]), self.name, text)
        return row


def warning(name: str, text: str, cure: str) -> Finding:
    """A finding about what can make some verbs fail or slow."""
    return Finding(name, text, "warning", cure)


def fault(name: str, text: str, cure: str) -> Finding:
    """A finding about what makes verbs fail."""
    return Finding(name, text, "fault", cure)
