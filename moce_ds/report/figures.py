"""The plots of a page as files: `moce report --figures FOLDER` writes an SVG and a CSV file for each of them.

They are not links in the page: the SVGs would be in it twice, since a link cannot share the data of an image, and
papers and spreadsheets want files.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import atomic_folder, check_output, reads_from, writes_to
from moce_ds.report.page import Chapter, Picture, Plotted

INDEX = "figures.csv"
INDEX_MARK = b"figure,chapter,title,description"
"""The beginning of the table of all figures in such a folder."""

_NAME = 100  # characters of a file's name


def check_figures(folder: Path) -> None:
    """Check that a folder can take figures: it is absent, empty, or holds nothing but earlier figures.

    Raises:
        ArtefactError: it holds something else, which is kept, or cannot be written.
    """
    check_output(folder / INDEX, "the table of figures", INDEX_MARK)
    if not folder.is_dir():
        return
    with writes_to(folder):
        names = {path.name for path in folder.iterdir()}
    if others := sorted(names - _listed(folder / INDEX) - {INDEX}):
        raise ArtefactError(
            f"{folder} holds {others[0]}, which is not a figure of this program: name another folder for the figures, "
            "or move it away."
        )


def _listed(index: Path) -> set[str]:
    """The names of the files that a table of figures lists."""
    if not index.exists():
        return set()
    with reads_from(index, "name another folder."):
        lines = index.read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.partition(",")[0] + suffix for line in lines for suffix in (".svg", ".csv")}


def write_figures(folder: Path, chapters: Sequence[Chapter]) -> None:
    """Write every plot of a page as NAME.svg and NAME.csv, and `figures.csv`, the table of them; all or nothing.

    Raises:
        ArtefactError: the folder cannot be written.
    """
    with writes_to(folder), atomic_folder(folder) as draft:
        rows = []
        for name, chapter, picture, plot in _plots(chapters):
            (draft / f"{name}.svg").write_bytes(plot.svg)
            _write_csv(draft / f"{name}.csv", plot.numbers.header, plot.numbers.rows)
            rows.append([name, chapter.title, plot.title, picture.alt])
        _write_csv(draft / INDEX, INDEX_MARK.decode().split(","), rows)


def _plots(chapters: Sequence[Chapter]) -> Iterator[tuple[str, Chapter, Picture, Plotted]]:
    """The plots in the order of the page, with distinct names of files."""
    taken: set[str] = set()
    for chapter in chapters:
        for picture in (exhibit.picture for section in chapter.sections for exhibit in section.exhibits):
            if plot := picture.plot:
                plain = re.sub(r"[^a-z0-9]+", "-", f"{chapter.anchor} {plot.title}".lower()).strip("-")[-_NAME:]
                numbered = (f"{plain}-{number}" for number in range(2, len(taken) + 3))
                name = plain if plain not in taken else next(one for one in numbered if one not in taken)
                taken.add(name)
                yield name, chapter, picture, plot


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:  # names may not be UTF-8
        lines = csv.writer(file)
        lines.writerow(header)
        lines.writerows(rows)
