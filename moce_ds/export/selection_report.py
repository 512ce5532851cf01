"""The terminal report of `moce select`: votes per route, images per cluster, the winner, and typicality."""

from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moce_ds.export.routes import route_label
from moce_ds.export.select import Selection
from moce_ds.text import shortened

_CLUSTERS = 10
_NAME = 60  # characters
_BAR = 40
"""Columns of the longest bar."""

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
