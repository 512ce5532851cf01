"""Plots of the report, each one panel drawn by matplotlib.

Axes: S logged steps, M clusters, E experts per layer, G rows of a table (clusters, domains, classes), P points of a
series of a study.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
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
from moce_ds.report.figure import COLOURS, INK, add_legend, colour, dashes, panel, styled, svg
from moce_ds.report.page import Numbers, Picture

_POINTS = 300  # of a curve
_NAME = 26  # characters of the name of a row or a tick
_DOUBLING = 4  # numbers that span this factor are shown on an axis of doublings
_MARK = COLOURS[1]  # of a chosen expert

Floats = NDArray[np.float64]
Scale = Literal["linear", "from zero", "log", "percent"]


@dataclass(frozen=True)
class Line:
    """The `index`-th curve of a plot: name, and a series [S]."""

    name: str
    series: Reduced
    index: int = 0

    @property
    def steps_S(self) -> Floats:
        """The steps."""
        return self.series.steps_P

    @property
    def values_S(self) -> Floats:
        """Means of neighbouring records."""
        return self.series.mean_P


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
        style: dict[str, Any] = {"color": colour(line.index), "ls": dashes(line.index), "marker": point}
        axes.plot(steps_S, values_S, lw=1.6, label=plottable(line.name), **style)
        _, _, low_S, high_S = line.series
        if not np.array_equal(low_S, high_S):
            starts = _starts(len(line.steps_S), _POINTS)
            band = np.minimum.reduceat(low_S, starts), np.maximum.reduceat(high_S, starts)
            axes.fill_between(steps_S, *band, color=colour(line.index), alpha=0.15, lw=0)
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
        add_legend(figure, axes)
    course = "; ".join(
        f"{line.name} from {line.values_S[0]:.3g} to {line.values_S[-1]:.3g} in {line.steps_S[-1]:.0f} steps"
        for line in lines
    )
    rows = [
        [line.name, *point] for line in lines for point in zip(*(part.tolist() for part in line.series), strict=True)
    ]
    numbers = Numbers(["name", "step", "mean", "least", "largest"], rows)
    return svg(figure, title, f"{title} over the training step: {course}.", numbers)


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
    numbers = Numbers(
        ["step", *(f"expert {expert}" for expert in range(n_experts))],
        np.column_stack([steps_S, load_SE]).tolist(),
    )
    return svg(figure, title, f"{title} over the training step, stacked. At the end: {last}.", numbers)


@styled
def sorted_sizes(sizes_M: NDArray[np.int64]) -> Picture:
    """Cluster sizes as bars, largest first, with the mean as a line."""
    title, M, mean, sorted_M = "Cluster sizes", len(sizes_M), sizes_M.mean(), np.sort(sizes_M)[::-1]
    figure, axes = panel(title)
    axes.bar(np.arange(1, M + 1), sorted_M, width=0.85, color=COLOURS[0])
    axes.axhline(mean, color=COLOURS[1], lw=1.4, ls="--", label=f"mean {mean:.0f}")
    axes.legend(loc="upper right")
    # Bars are counted from 1, and the last one is named.
    ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(1, M) if 1 + 0.1 * M < tick < 0.9 * M]
    axes.set_xticks([1, *ticks, M] if M > 1 else [1])
    axes.set_xlim(0.3, M + 0.7)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="clusters, largest first", ylabel="images")
    alt = f"Bars of {M} cluster sizes, {sizes_M.min()} to {sizes_M.max()}, mean {mean:.0f}."
    return svg(figure, title, alt, Numbers(["place", "images"], [list(row) for row in enumerate(sorted_M.tolist(), 1)]))


@styled
def heatmap(share_GE: Floats, rows: Sequence[str], title: str, chosen_G: NDArray[np.int64] | None = None) -> Picture:
    """Rows x experts in shades of one colour; names and numbers if there is room, else a colour bar.

    Args:
        chosen_G: the chosen expert of each row, which is marked.
    """
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
                ink = "white" if share > 0.55 else INK
                axes.text(column + 0.5, row + 0.53, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{n_rows} rows")
        figure.colorbar(mesh, ax=axes, fraction=0.035, pad=0.02, format=PercentFormatter(1, decimals=0))
    alt = f"{title}: heatmap of {n_rows} rows. Largest are {_spread(share_GE.argmax(axis=1), n_columns)}."
    numbers = Numbers(
        ["row", *(f"expert {column}" for column in range(n_columns))],
        [[name, *shares] for name, shares in zip(rows, share_GE.tolist(), strict=True)],
    )
    if chosen_G is not None:
        _mark_chosen(axes, chosen_G, roomy)
        alt += f" Chosen are {_spread(chosen_G, n_columns)}."
        numbers = numbers.with_column("chosen", chosen_G.tolist())
    return svg(figure, title, alt, numbers)


def _mark_chosen(axes: Axes, chosen_G: NDArray[np.int64], roomy: bool) -> None:
    """Frame the cells of chosen experts, or where rows are thin, draw a line in them."""
    rows_G = np.arange(len(chosen_G))
    if roomy:
        for row, column in zip(rows_G, chosen_G, strict=True):
            axes.add_patch(Rectangle((column + 0.03, row + 0.08), 0.94, 0.84, fill=False, edgecolor=_MARK, lw=1.8))
    else:
        lines = axes.hlines(rows_G + 0.5, chosen_G + 0.2, chosen_G + 0.8, color=_MARK, lw=min(1.8, 250 / len(rows_G)))
        lines.set_rasterized(True)


def _spread(expert_G: NDArray[np.int64], n_experts: int) -> str:
    """How many rows have each expert, in words."""
    count_E = np.bincount(expert_G, minlength=n_experts)
    return ", ".join(f"expert {expert} in {count}" for expert, count in enumerate(count_E))


@styled
def grouped_bars(groups: Sequence[str], values: dict[str, list[float | None]], title: str, unit: str) -> Picture:
    """Horizontal bars around 0 for every group, one per series of `values`; None is left out."""
    figure, axes = panel(title, height=0.95 + len(groups) * (0.12 + 0.2 * len(values)))
    thick = 0.8 / len(values)
    for index, (name, of_groups) in enumerate(values.items()):
        places = np.arange(len(groups)) + (index + 0.5) * thick - 0.4
        drawn = [(place, value) for place, value in zip(places, of_groups, strict=True) if value is not None]
        at, lengths = [place for place, _ in drawn], [value for _, value in drawn]
        bars = axes.barh(at, lengths, height=thick * 0.9, color=colour(index), label=plottable(name))
        axes.bar_label(bars, fmt="%+.2f", padding=3, fontsize=8)
    axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(np.arange(len(groups)), [plottable(group, _NAME) for group in groups])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.22)
    axes.set_xlabel(unit)
    figure.set_figheight(figure.get_figheight() + 0.22 * len(values))
    figure.legend(loc="outside lower left", fontsize=9)
    rows = [[group, name, of_groups[i]] for i, group in enumerate(groups) for name, of_groups in values.items()]
    course = "; ".join(f"{group}, {name}: {value:+.2f}" for group, name, value in rows if value is not None)
    return svg(figure, title, f"{title}, {unit}. {course}.", Numbers(["group", "name", unit], rows))


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
        add_legend(figure, axes)
    course = "; ".join(
        f"{line.name or title} "
        + ", ".join(f"{value}: {mean:.4g}" for value, mean in zip(line.at_P, line.mean_P, strict=True))
        for line in lines
    )
    rows = [
        [line.name, *point]
        for line in [*lines, *ideal]
        for point in zip(line.at_P, line.mean_P.tolist(), line.deviation_P.tolist(), strict=True)
    ]
    shown = Numbers(["name", x, "mean", "standard deviation"], rows)
    return svg(figure, title, f"{title} against {x}: {course}.", shown)


def _mark(axes: Axes, place: dict[str, float], values: Sequence[Any], numbers: bool) -> None:
    """Ticks at the values themselves, doublings at equal distances."""
    places = list(place.values())
    if numbers and min(places) > 0 and max(places) >= _DOUBLING * min(places):
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter([plottable(value, _NAME) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)


def _starts(length: int, points: int) -> NDArray[np.int64]:
    """The first places of groups of neighbours, about `points` groups of a long series."""
    return np.arange(0, length, ceil(length / points))


def _thin(steps_S: Floats, values_S: Floats, points: int = _POINTS) -> tuple[Floats, Floats]:
    """Means over groups of neighbouring steps, about `points` of them for a long run."""
    starts = _starts(len(steps_S), points)
    counts = np.diff([*starts, len(steps_S)])
    return np.add.reduceat(steps_S, starts) / counts, np.add.reduceat(values_S, starts) / counts
