"""Plots of the report, each one panel drawn by matplotlib as SVG inside a data URI.

Each figure has one panel, so that the page can place two side by side on a wide screen and one below the other on a
telephone without the text shrinking. Colours are those of Okabe and Ito, which colour-blind readers can distinguish.

Axes: S logged steps, M clusters, E experts per layer, G rows of a table (clusters, domains, classes), P points of a
series of a study.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

from moce_ds.common.storage.metrics_series import Reduced
from moce_ds.common.text import plottable
from moce_ds.report.page import Picture, data_uri

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8A8A8A")
_INK, _FAINT = "#2b2f36", "#c9ced6"
_POINTS = 300  # of a curve
_NAME = 26  # characters of the name of a row or a tick
_DOUBLING = 4  # numbers that span this factor are shown on an axis of doublings
_WIDTH, _HEIGHT = 4.4, 2.75  # inches; 10 point text is then about 11 px high in a third of a wide page
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "text.parse_math": False,  # a `$` in a name is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "moce",
    "figure.constrained_layout.use": True,
}

styled = matplotlib.rc_context(_STYLE)
"""Decorates a function that draws."""

Floats = NDArray[np.float64]
Scale = Literal["linear", "from zero", "log", "percent"]


@dataclass(frozen=True)
class Line:
    """One curve: name, steps [S] and values [S]; where they are means, the least and the largest values, [S] each."""

    name: str
    steps_S: Floats
    values_S: Floats
    colour: str
    low_S: Floats | None = None
    high_S: Floats | None = None

    @classmethod
    def of(cls, name: str, reduced: Reduced, colour: str) -> "Line":
        """The curve of a series."""
        return cls(name, reduced.steps_P, reduced.mean_P, colour, reduced.low_P, reduced.high_P)


@dataclass(frozen=True)
class Series:
    """One series: positions on the horizontal axis, mean and standard deviation, each [P]."""

    name: str
    at_P: list[Any]
    mean_P: Floats
    deviation_P: Floats
    colour: str


@styled
def curves(lines: Sequence[Line], title: str, unit: str, scale: Scale = "linear") -> Picture:
    """Curves over the training step; the `log` axis is used if values span more than a factor of 2."""
    figure, axes = panel(title)
    for line in lines:
        point = "o" if len(line.steps_S) == 1 else None  # a line needs two
        steps_S, values_S = _thin(line.steps_S, line.values_S)
        axes.plot(steps_S, values_S, lw=1.6, marker=point, color=line.colour, label=plottable(line.name))
        if line.low_S is not None and line.high_S is not None and not np.array_equal(line.low_S, line.high_S):
            starts = _starts(len(line.steps_S), _POINTS)
            band = np.minimum.reduceat(line.low_S, starts), np.maximum.reduceat(line.high_S, starts)
            axes.fill_between(steps_S, *band, color=line.colour, alpha=0.15, lw=0)
    values = np.concatenate([line.values_S for line in lines])
    if scale == "log" and values.min() > 0 and values.max() > 2 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if scale == "from zero":
        axes.set_ylim(0, values.max() * 1.15)
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(0, min(1.02, max(0.05, values.max() * 1.15)))
    axes.set(xlabel="step", ylabel=unit)
    if len(lines) > 1:
        axes.legend(loc="best", fontsize=9)
    course = "; ".join(
        f"{line.name} from {line.values_S[0]:.3g} to {line.values_S[-1]:.3g} in {line.steps_S[-1]:.0f} steps"
        for line in lines
    )
    return svg(figure, f"{title} over the training step: {course}.")


@styled
def expert_load(steps_S: Floats, load_SE: Floats, title: str) -> Picture:
    """Each expert's share of the images, stacked over time; white dashes mark equal shares."""
    figure, axes = panel(title)
    n_experts = load_SE.shape[1]
    points = min(_POINTS, 3000 // n_experts)
    thinned = [_thin(steps_S, load_SE[:, expert], points) for expert in range(n_experts)]
    bands = np.stack([values for _, values in thinned])
    colours = [colour(expert) for expert in range(n_experts)]
    thinned_S = thinned[0][0]
    if len(thinned_S) == 1:  # a band needs two steps
        thinned_S, bands = np.add(thinned_S, [-0.5, 0.5]), np.repeat(bands, 2, axis=1)
        axes.set_xticks(steps_S)
    axes.stackplot(thinned_S, bands, colors=colours, edgecolor="white", linewidth=0.6)
    for edge in range(1, n_experts):
        axes.axhline(edge / n_experts, color="white", lw=0.8, ls=(0, (4, 4)))
    right_of_axes = axes.get_yaxis_transform()
    for expert, (top, height) in enumerate(zip(np.cumsum(bands[:, -1]), bands[:, -1], strict=True)):
        if height > 0.03:
            axes.text(1.02, top - height / 2, f"expert {expert}", transform=right_of_axes, va="center", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="step", ylabel="share of images", ylim=(0, 1))
    axes.margins(x=0)
    axes.grid(False)
    last = ", ".join(f"expert {expert} {share:.0%}" for expert, share in enumerate(load_SE[-1]))
    return svg(figure, f"{title} over the training step, stacked. At the end: {last}.")


@styled
def sorted_sizes(sizes_M: NDArray[np.int64]) -> Picture:
    """Cluster sizes as bars, largest first, with the mean as a line."""
    figure, axes = panel("Cluster sizes")
    mean = sizes_M.mean()
    axes.bar(np.arange(1, len(sizes_M) + 1), np.sort(sizes_M)[::-1], width=0.85, color=COLOURS[0])
    axes.axhline(mean, color=COLOURS[1], lw=1.4, ls="--", label=f"mean {mean:.0f}")
    axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="clusters, largest first", ylabel="images")
    return svg(figure, f"Bars of {len(sizes_M)} cluster sizes, {sizes_M.min()} to {sizes_M.max()}, mean {mean:.0f}.")


@styled
def heatmap(share_GE: Floats, rows: Sequence[str], title: str) -> Picture:
    """Rows x experts in shades of one colour; names and numbers if there is room, else a colour bar."""
    n_rows, n_columns = share_GE.shape
    roomy = n_rows <= 64 and n_columns <= 12
    figure, axes = panel(title, height=0.85 + 0.2 * n_rows if roomy else 5.0)
    mesh = axes.pcolormesh(share_GE, vmin=0, vmax=1, cmap="Blues", rasterized=not roomy)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(n_columns) + 0.5, [str(column) for column in range(n_columns)])
    axes.set_xlabel("expert")
    if roomy:
        mesh.set(edgecolor="white", linewidth=0.6)
        axes.set_yticks(np.arange(n_rows) + 0.5, [plottable(row, _NAME) for row in rows], fontsize=9)
        for (row, column), share in np.ndenumerate(share_GE):
            if share >= 0.005:
                ink = "white" if share > 0.55 else _INK
                axes.text(column + 0.5, row + 0.53, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{n_rows} rows")
        figure.colorbar(mesh, ax=axes, fraction=0.035, pad=0.02, format=PercentFormatter(1, decimals=0))
    led_E = np.bincount(share_GE.argmax(axis=1), minlength=n_columns)
    spread = ", ".join(f"expert {expert} in {rows_led}" for expert, rows_led in enumerate(led_E))
    return svg(figure, f"{title}: heatmap of {n_rows} rows. Largest are {spread}.")


@styled
def error_bars(
    lines: Sequence[Series], title: str, x: str, unit: str, from_zero: bool = False, ideal: Sequence[Series] = ()
) -> Picture:
    """A curve with error bars for each series; dashed lines without error bars for `ideal`.

    Numbers on the horizontal axis are placed to scale, other values (lists, names) side by side.
    """
    figure, axes = panel(title)
    values = list({str(value): value for line in lines for value in line.at_P}.values())
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {str(value): float(value) if numbers else float(i) for i, value in enumerate(values)}
    for line in lines:
        x_P = [place[str(value)] for value in line.at_P]
        error_P = line.deviation_P if line.deviation_P.any() else None
        name = plottable(line.name) or None
        axes.errorbar(x_P, line.mean_P, error_P, fmt="o-", ms=4, lw=1.6, capsize=3, color=line.colour, label=name)
    for line in ideal:
        x_P = [place[str(value)] for value in line.at_P]
        axes.plot(x_P, line.mean_P, lw=1.2, ls=(0, (4, 3)), color=line.colour, label=plottable(line.name))
    _mark(axes, place, values, numbers)
    if from_zero:
        top = max(float(np.max(line.mean_P + line.deviation_P)) for line in [*lines, *ideal])
        axes.set_ylim(0, top * 1.15 or 1)
    axes.set(xlabel=plottable(x), ylabel=unit)
    if any(line.name for line in [*lines, *ideal]):
        axes.legend(loc="best", fontsize=9)
    course = "; ".join(
        f"{line.name or title} "
        + ", ".join(f"{value}: {mean:.4g}" for value, mean in zip(line.at_P, line.mean_P, strict=True))
        for line in lines
    )
    return svg(figure, f"{title} against {x}: {course}.")


def _mark(axes: Axes, place: dict[str, float], values: Sequence[Any], numbers: bool) -> None:
    """Ticks at the values themselves, doublings at equal distances."""
    places = list(place.values())
    if numbers and min(places) > 0 and max(places) >= _DOUBLING * min(places):
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([plottable(value, _NAME) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)


def colour(index: int) -> str:
    """The colour of the index-th run or expert; they repeat after eight."""
    return COLOURS[index % len(COLOURS)]


def panel(title: str, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one panel, `height` inches high."""
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_subplot()
    axes.set_title(plottable(title))
    return figure, axes


def svg(figure: Figure, alt: str) -> Picture:
    """The figure as a picture of the page; `alt` describes it in words."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # The browser draws the text with its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(drawn, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * 72
    return Picture(data_uri(drawn.getvalue(), "image/svg+xml"), round(width), round(height), alt)


def _starts(length: int, points: int) -> NDArray[np.int64]:
    """The first places of groups of neighbours, about `points` groups of a long series."""
    return np.arange(0, length, ceil(length / points))


def _thin(steps_S: Floats, values_S: Floats, points: int = _POINTS) -> tuple[Floats, Floats]:
    """Means over groups of neighbouring steps, about `points` of them for a long run."""
    starts = _starts(len(steps_S), points)
    counts = np.diff([*starts, len(steps_S)])
    return np.add.reduceat(steps_S, starts) / counts, np.add.reduceat(values_S, starts) / counts
