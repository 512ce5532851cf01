"""The common parts of the report's plots: style, one panel, and its SVG with the numbers that it shows.

Each figure has one panel, so that the page can place two side by side on a wide screen and one below the other on a
telephone without the text shrinking. Colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

import io
import warnings
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moce_ds.common.text import plottable
from moce_ds.report.page import Numbers, Picture, Plotted, data_uri

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8A8A8A")
INK, FAINT = "#2b2f36", "#c9ced6"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_WIDTH, _HEIGHT = 4.4, 2.75  # inches; 10 point text is then about 11 px high in a third of a wide page
_BESIDE = 6  # entries of a legend inside the axes; more stand below them
_ENTRY = 0.19  # inches that an entry below the axes takes
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a `$` in a name is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "moce",
    "figure.constrained_layout.use": True,
}

styled = matplotlib.rc_context(_STYLE)
"""Decorates a function that draws."""


def colour(index: int) -> str:
    """The colour of the index-th run or expert; they repeat after eight."""
    return COLOURS[index % len(COLOURS)]


def dashes(index: int) -> Any:
    """The line style of the index-th run: with `colour`, 32 runs can be distinguished."""
    return _DASHES[index // len(COLOURS) % len(_DASHES)]


def panel(title: str, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one panel, `height` inches high."""
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_subplot()
    axes.set_title(plottable(title))
    return figure, axes


def add_legend(figure: Figure, axes: Axes) -> None:
    """Name the lines of a panel, below it if they are many; the panel keeps its size."""
    _, labels = axes.get_legend_handles_labels()
    if len(labels) <= _BESIDE:
        axes.legend(loc="best", fontsize=9)
        return
    figure.set_figheight(figure.get_figheight() + _ENTRY * (len(labels) + 1))
    figure.legend(loc="outside lower left", fontsize=9)


def svg(figure: Figure, title: str, alt: str, numbers: Numbers) -> Picture:
    """The figure as a picture of the page; `alt` describes it in words, `numbers` are what it shows."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # The browser draws the text with its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(drawn, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * 72
    uri = data_uri(drawn.getvalue(), "image/svg+xml")
    return Picture(uri, round(width), round(height), alt, Plotted(title, drawn.getvalue(), numbers))
