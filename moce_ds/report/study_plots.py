"""Plots of a study: one panel a measure, a point for each value of the horizontal axis, error bars over seeds.

Axes: P points of a series.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from moce_ds.report.gallery import Picture
from moce_ds.report.plots import Floats, panel, styled, svg
from moce_ds.text import plottable

_TICK = 26  # characters
_DOUBLING = 4  # numbers that span this factor stand on an axis of doublings


@dataclass(frozen=True)
class Series:
    """Values of one series: where on the horizontal axis, mean and standard deviation, each [P]."""

    name: str
    at_P: list[Any]
    mean_P: Floats
    deviation_P: Floats
    colour: str


@styled
def error_bars(
    lines: Sequence[Series], title: str, x: str, unit: str, from_zero: bool = False, ideal: Sequence[Series] = ()
) -> Picture:
    """A curve with error bars for each series; dashed lines without any for what would be `ideal`.

    Numbers on the horizontal axis stand where they belong, other values (lists, names) side by side.
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
    axes.xaxis.set_major_formatter(FixedFormatter([plottable(value, _TICK) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
