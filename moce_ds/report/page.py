"""The elements of the report's page, and its file. The template knows these elements and nothing about runs."""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from moce_ds import __version__
from moce_ds.common.storage.files import atomic_file, writes_to
from moce_ds.common.text import printable

PAGE_MARK = b"<title>MoCE report: "
"""Text near the beginning of every page."""

THUMBNAIL_SIDE = 96

_PADDING, _BROAD, _WIDE = 2, 40, 130  # characters, as the page's font sets them


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

    @property
    def width(self) -> str:
        """On which screens the table scrolls sideways, by the characters of its columns: "wide" on most, "broad" on a
        telephone's, else none."""
        columns = zip(self.header, *([cell.text for cell in row] for row in self.rows), strict=True)
        characters = sum(max(map(len, column)) + _PADDING for column in columns)
        return "wide" if characters > _WIDE else "broad" if characters > _BROAD else ""


@dataclass(frozen=True)
class Numbers:
    """What a plot shows, as named columns."""

    header: list[str]
    rows: list[list[Any]]

    def with_column(self, name: str, values: Sequence[Any]) -> "Numbers":
        """The same with one more column."""
        rows = [[*row, value] for row, value in zip(self.rows, values, strict=True)]
        return Numbers([*self.header, name], rows)


@dataclass(frozen=True)
class Plotted:
    """A plot as `moce report --figures` writes it: its title, SVG, and numbers."""

    title: str
    svg: bytes
    numbers: Numbers


@dataclass(frozen=True)
class Picture:
    """An image inside the page: a data URI, its size in pixels, a description of its content, and the plot it shows."""

    uri: str
    width: int
    height: int
    alt: str
    plot: Plotted | None = None


@dataclass(frozen=True)
class Exhibit:
    """A picture and the sentences below it; `scale` enlarges a small picture by a whole number."""

    picture: Picture
    caption: str
    scale: int = 1


@dataclass(frozen=True)
class Card:
    """A few images of one group, with a title and a note beside them."""

    title: str
    note: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Section:
    """Parts of a chapter: non-empty parts are shown in this order; a `listing` is collapsed."""

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
    page = environment.get_template("report.html").render(
        title=title, summary=summary, chapters=chapters, version=__version__, date=time.strftime("%F %H:%M %Z")
    )
    with writes_to(out), atomic_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _shown(value: Any) -> Any:
    """The text of a value on the page, before it is escaped for HTML."""
    return printable(value) if isinstance(value, str) else value


def data_uri(content: bytes, media_type: str) -> str:
    """`content` as a data URI, so that a page needs no second file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def picture(image: Image.Image, alt: str, side: int = THUMBNAIL_SIDE, quality: int = 82) -> Picture:
    """`image` as JPEG, shrunk so that neither edge exceeds `side`; smaller ones keep their native size."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality, optimize=True)
    return Picture(data_uri(encoded.getvalue(), "image/jpeg"), image.width, image.height, alt)
