"""What the report's page is made of. The template knows these and nothing about runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from moce_ds.report.gallery import Card, Picture
from moce_ds.storage.files import atomic_file, writes_to
from moce_ds.text import printable

PAGE_MARK = b"<title>MoCE report: "
"""What every page holds near its beginning."""


class Cell(NamedTuple):
    """Text of a table's cell; `best` sets it in bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first `names` columns are text, the others numbers."""

    header: list[str]
    rows: list[list[Cell]]
    caption: str
    names: int = 1


@dataclass(frozen=True)
class Exhibit:
    """A picture and the sentences below it; `scale` enlarges a small picture by a whole number."""

    picture: Picture
    caption: str
    scale: int = 1


@dataclass(frozen=True)
class Section:
    """Whatever of these a section holds is shown in this order; a `listing` is folded away."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    exhibits: list[Exhibit] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    listing: str = ""


@dataclass(frozen=True)
class Chapter:
    """Sections under a heading that the page's contents link to as `#anchor`."""

    title: str
    anchor: str
    sections: list[Section]


def _shown(value: Any) -> Any:
    """What the page shows of a value, before it is escaped for HTML."""
    return printable(value) if isinstance(value, str) else value


def write_page(out: Path, title: str, summary: str, chapters: Sequence[Chapter]) -> None:
    """Write one HTML file that needs no other file, script or network, atomically."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moce_ds.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    page = environment.get_template("report.html").render(title=title, summary=summary, chapters=chapters)
    with writes_to(out), atomic_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
