"""The output of `moce select`: a report for the terminal, and a picture of images of the task and of images that
trained the chosen expert.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.storage.files import PICTURE_TEXT, atomic_file, writes_to
from moce_ds.common.text import in_line, route_label, shortened
from moce_ds.data.shards import ShardSet
from moce_ds.selection.routes import choose_selected
from moce_ds.selection.training_images import training_images
from moce_ds.selection.vote import Selection

_CLUSTERS = 10
_NAME = 60  # characters
_BAR = 40  # columns of the longest bar

_SIDE, _GAP, _COLUMNS, _ROWS = 80, 6, 6, 5
_TITLE, _MARGIN = 28, 20
_WIDTH = _COLUMNS * (_SIDE + _GAP) - _GAP
_HEIGHT = _ROWS * (_SIDE + _GAP) - _GAP
_PAPER, _INK = "white", "#2b2f36"

Route = tuple[int, ...]


def selection_report(selection: Selection, task: str, routes: Sequence[Route], top: int = 5) -> Group:
    """The whole report, at most 100 columns wide.

    Args:
        routes: the route of every cluster.
        top: number of routes in the table; the others are summed.
    """
    parts: list[RenderableType] = [
        _route_table(selection, task, top),
        _histogram(selection, routes),
        Text(f"Winner: route {route_label(selection.route)}, with {selection.share:.1%} of the votes."),
    ]
    if typicality := selection.typicality:
        as_expected = typicality.verdict in ("typical", "unknown")
        parts.append(Text(typicality.summary, style="" if as_expected else "bold yellow"))
    return Group(*parts)


def _route_table(selection: Selection, task: str, top: int) -> Table:
    table = Table(title=f"{shortened(task, _NAME)}: votes of {selection.n_images:,} images", title_justify="left")
    table.add_column("route (expert of each layer)")
    table.add_column("share of the votes", justify="right")
    for route, share in selection.routes[:top]:
        table.add_row(route_label(route), f"{share:.1%}")
    if others := selection.routes[top:]:
        table.add_row(f"{len(others)} others", f"{sum(share for _, share in others):.1%}")
    return table


def _histogram(selection: Selection, routes: Sequence[Route]) -> Table:
    clusters = list(selection.clusters.items())
    table = Table(title=f"Images in {len(clusters)} of {len(routes)} clusters", title_justify="left")
    table.add_column("cluster", justify="right")
    table.add_column("its route")
    table.add_column("share of the images", justify="right")
    table.add_column("")
    for cluster, share in clusters[:_CLUSTERS]:
        bar = Bar(clusters[0][1], 0, share, width=_BAR)
        table.add_row(str(cluster), route_label(routes[cluster]), f"{share:.1%}", bar)
    if others := clusters[_CLUSTERS:]:
        table.add_row(f"{len(others)} others", "", f"{sum(share for _, share in others):.1%}")
    return table


def write_picture(path: Path, images: ShardSet, task: str, selection: Selection, checkpoint: Checkpoint) -> str | None:
    """Write a PNG: images of the task on the left, training images of the winning route on the right, drawn by the
    votes.

    The same selection gives the same picture. Returns the reason if training images are missing, else None.

    Raises:
        ArtefactError: `path` cannot be written.
        DataError: an image of the task was altered after writing.
    """
    number = min(_COLUMNS * _ROWS, images.count)
    ids = np.random.default_rng(0).choice(images.count, number, replace=False)
    left = _block(f"{task}: {number} of {images.count:,} images", [images.decode(i) for i in sorted(ids.tolist())])
    title, note = f"route {route_label(selection.route)}: training images of its experts", None
    try:
        on_route = choose_selected(checkpoint, selection).clusters
        right = _block(title, training_images(checkpoint, on_route, _COLUMNS * _ROWS))
    except (ArtefactError, DataError) as error:
        note = f"No training images to show: {error}"
        right = _block(title, [], note)
    sheet = Image.new("RGB", (2 * left.width + 3 * _MARGIN, left.height + 2 * _MARGIN), _PAPER)
    sheet.paste(left, (_MARGIN, _MARGIN))
    sheet.paste(right, (left.width + 2 * _MARGIN, _MARGIN))
    text = PngInfo()
    for key, value in PICTURE_TEXT.items():
        text.add_text(key, value)
    with writes_to(path), atomic_file(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=text)
    return note


def _block(title: str, images: Sequence[Image.Image], note: str = "") -> Image.Image:
    block = Image.new("RGB", (_WIDTH, _TITLE + _HEIGHT), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), shortened(title, _NAME), fill=_INK, font=ImageFont.load_default(16))
    draw.multiline_text((0, _TITLE), fill(in_line(note), 70), fill=_INK, font=ImageFont.load_default(14))
    for place, image in enumerate(images):
        row, column = divmod(place, _COLUMNS)
        tile = ImageOps.pad(image, (_SIDE, _SIDE), color=_PAPER)
        block.paste(tile, (column * (_SIDE + _GAP), _TITLE + row * (_SIDE + _GAP)))
    return block
