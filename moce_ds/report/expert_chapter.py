"""The report's chapter about experts on held-out images: what each of them reconstructs, from `pictures/`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from moce_ds.evaluation.expert_sheet import PICTURES, ExpertRow, ExpertSheet, SheetAbout
from moce_ds.report.page import Cell, Chapter, Exhibit, Section, Table, picture

_SHEETS = 6  # on a page
_WIDTH = 460  # pixels of a strip that is enlarged, at most
_MARK = "#D55E00"


def expert_chapter(folders: Sequence[Path]) -> list[Chapter]:
    """The chapter about the sheets that `moce evaluate --picture` wrote into FOLDER/pictures; none without any."""
    paths = [path for folder in folders for path in sorted((folder / PICTURES).glob("*.png"))]
    sheets = [sheet for sheet in map(ExpertSheet.read, paths) if sheet is not None]
    sections = [section for sheet in sheets[:_SHEETS] for section in _sections(sheet)]
    if not sections:
        return []
    if len(sheets) > _SHEETS:
        more = ", ".join(sheet.about.task for sheet in sheets[_SHEETS:])
        sections.append(Section("", f"The pictures of {more} are not shown, so that the page keeps its size."))
    return [Chapter("Experts on held-out images", "experts", sections)]


def _sections(sheet: ExpertSheet) -> Iterator[Section]:
    about = sheet.about
    text = (
        f"Images of {about.task} and their reconstructions by {about.model}, in which all of them take the same expert "
        f"of block {about.block}, the last expert layer, and keep their own routes in the others."
    )
    exhibits = []
    for index, (row, strip) in enumerate(zip(about.rows, sheet.strips(), strict=True)):
        framed = _framed(strip, about.side, 2 + index)
        experts = ", ".join(str(other.expert) for other in about.rows)
        caption = (
            f"Expert {row.expert}: {row.n_images:,} of {about.n_images:,} images. From left to right: input, masked "
            f"input, and reconstructions by experts {experts}; framed: expert {row.expert}, which receives them."
        )
        alt = f"{len(row.shown)} images of expert {row.expert}, reconstructed by experts {experts}"
        exhibits.append(Exhibit(picture(framed, alt, max(framed.size), quality=88), caption))
    yield Section(f"{about.task}, block {about.block}", text, [_errors(about)], exhibits)


def _framed(strip: NDArray[np.uint8], side: int, column: int) -> Image.Image:
    """A strip of cells, enlarged by a whole number if it is small, with a frame around one column."""
    scale = max(1, _WIDTH // strip.shape[1])
    image = Image.fromarray(strip).resize((strip.shape[1] * scale, strip.shape[0] * scale), Image.Resampling.NEAREST)
    left, right = column * side * scale, (column + 1) * side * scale - 1
    ImageDraw.Draw(image).rectangle((left, 0, right, image.height - 1), outline=_MARK, width=2)
    return image


def _errors(about: SheetAbout) -> Table:
    def cells(row: ExpertRow) -> list[Cell]:
        errors = [Cell(f"{error:.4f}", error == min(row.error)) for error in row.error]
        return [Cell(f"expert {row.expert}"), Cell(str(row.n_measured)), *errors]

    caption = (
        "Mean squared error on hidden patches, each normalised to variance 1: lower is better, least of each row in "
        "bold. Rows: the expert that receives the images; columns: the expert that reconstructs them."
    )
    header = ["images of", "number", *(f"by expert {row.expert}" for row in about.rows)]
    return Table(header, [cells(row) for row in about.rows], caption)
