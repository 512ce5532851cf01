"""A PNG of images that several experts have reconstructed: its rows and columns, and the errors, are in its metadata.

`moce evaluate --picture` writes it, `moce report` shows it. A row is one image: the input, what the model saw, and the
reconstruction by each expert. Rows are sorted by the expert that the image is routed to.

Axes: E shown experts, I images of each of them, H, W pixels of a cell.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import PICTURE_TEXT, atomic_file, parses, reads_from, valid_record, writes_to

PICTURES = "pictures"
"""`moce report FOLDER` shows the sheets in FOLDER/pictures."""

_ABOUT = "moce_ds experts"
_CURE = "write it again with `moce evaluate --picture`, or remove it."
_Count = Annotated[int, Field(ge=0)]
_Side = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True)
class ExpertRow:
    """The images of one expert.

    Attributes:
        expert: that their clusters choose in this block.
        n_images: of the task.
        shown: ids of the images in the picture.
        error: mean squared error of each shown expert on `n_measured` of the images.
    """

    expert: _Count
    n_images: _Count
    n_measured: _Count
    shown: list[_Count]
    error: list[float]


@dataclass(frozen=True)
class SheetAbout:
    """The metadata: what was reconstructed, and the experts of `block` in the order of columns and rows."""

    task: str
    model: str
    block: _Count
    side: _Side
    n_images: _Count
    rows: list[ExpertRow]

    @property
    def columns(self) -> int:
        """Cells of a row: input, masked input, and one reconstruction per expert."""
        return 2 + len(self.rows)


@dataclass(frozen=True)
class ExpertSheet:
    """The picture, [rows H, columns W, 3] uint8, and its metadata."""

    about: SheetAbout
    picture: NDArray[np.uint8]

    def write(self, path: Path) -> None:
        """Write the PNG, or nothing. Raises ArtefactError."""
        text = PngInfo()
        for key, value in {**PICTURE_TEXT, _ABOUT: json.dumps(asdict(self.about))}.items():
            text.add_text(key, value)
        with writes_to(path), atomic_file(path) as temporary:
            Image.fromarray(self.picture).save(temporary, "PNG", pnginfo=text)

    @classmethod
    def read(cls, path: Path) -> "ExpertSheet | None":
        """A sheet; None for a picture of another kind. Raises ArtefactError if it is damaged."""
        try:
            with reads_from(path, _CURE), Image.open(path, formats=["PNG"]) as opened:
                text = opened.text.get(_ABOUT) if hasattr(opened, "text") else None
                if text is None:
                    return None
                with parses(path, _CURE):
                    about = json.loads(text)
                valid_record(SheetAbout, about, str(path), "a picture of experts", "moce evaluate --picture")
                rows = [ExpertRow(**row) for row in about.pop("rows")]
                sheet = cls(SheetAbout(**about, rows=rows), np.asarray(opened.convert("RGB")))
        except (UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise ArtefactError(f"{path} is damaged ({error}): {_CURE}") from None
        sheet._check(path)
        return sheet

    def _check(self, path: Path) -> None:
        about = self.about
        height = about.side * sum(len(row.shown) for row in about.rows)
        if self.picture.shape[:2] != (height, about.side * about.columns):
            raise ArtefactError(f"{path} is damaged: its size is not that of its rows and columns: {_CURE}")
        if any(len(row.error) != len(about.rows) for row in about.rows):
            raise ArtefactError(f"{path} is damaged: expected one error for each of its experts: {_CURE}")

    def strips(self) -> list[NDArray[np.uint8]]:
        """The part of the picture with the images of each expert, in the order of `about.rows`."""
        ends = np.cumsum([len(row.shown) * self.about.side for row in self.about.rows])
        return np.split(self.picture, ends[:-1].tolist())
