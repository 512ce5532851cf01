"""The experts of a run to export: a route, chosen in one of several ways, or an average of many experts."""

from collections.abc import Mapping
from dataclasses import dataclass

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.common.errors import ConfigError
from moce_ds.common.text import route_label
from moce_ds.selection.vote import Selection

AVERAGES = ("uniform", "weighted")

ClusterShares = Mapping[int, float]
"""Share of each cluster."""


@dataclass(frozen=True)
class SelectedExperts:
    """Experts to export.

    Attributes:
        layers: per expert layer its experts, each with the clusters that choose it; the shares of a layer sum to 1. One
            expert per layer is a route; several are averaged.
        clusters: share of every cluster that chooses one of these experts.
        average: how experts are averaged; None for a route.
    """

    layers: tuple[Mapping[int, ClusterShares], ...]
    clusters: ClusterShares
    average: str | None = None

    @classmethod
    def of_route(cls, experts: tuple[int, ...], clusters: ClusterShares) -> "SelectedExperts":
        """One expert per layer."""
        return cls(tuple({expert: clusters} for expert in experts), clusters)

    @property
    def experts(self) -> tuple[int, ...] | None:
        """The route; None for an average."""
        return None if self.average else tuple(next(iter(layer)) for layer in self.layers)

    @property
    def label(self) -> str:
        """A label such as "route 3-5"."""
        return f"{self.average} average" if self.average else f"route {route_label(self.experts or ())}"


def routes_of(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """The route of every cluster."""
    return [tuple(row) for row in checkpoint.routes.expert_ML.tolist()]


def choose_cluster(checkpoint: Checkpoint, cluster: int) -> SelectedExperts:
    """The route of one cluster. Raises ConfigError if there is no such cluster."""
    routes = routes_of(checkpoint)
    if not 0 <= cluster < len(routes):
        raise ConfigError(f"--cluster: got {cluster}; the run has clusters 0 to {len(routes) - 1}.")
    return SelectedExperts.of_route(routes[cluster], {cluster: 1.0})


def choose_route(checkpoint: Checkpoint, experts: tuple[int, ...]) -> SelectedExperts:
    """A route by its experts; its clusters are weighted by their share of the training set.

    Raises:
        ConfigError: the route has the wrong length, or no cluster takes it; the message lists all routes.
    """
    routes, share_M = routes_of(checkpoint), checkpoint.routes.cluster_share_M.tolist()
    on_route = {cluster: share_M[cluster] for cluster, route in enumerate(routes) if route == experts}
    total = sum(on_route.values())
    if not total:
        taken = ", ".join(route_label(route) for route in sorted(set(routes)))
        raise ConfigError(f"--route: no cluster takes {route_label(experts)}; routes of this run: {taken}.")
    return SelectedExperts.of_route(experts, {cluster: share / total for cluster, share in on_route.items()})


def choose_expert(checkpoint: Checkpoint, expert: int) -> SelectedExperts:
    """The most frequent route through an expert of the *last* expert layer, the most specialised one.

    Raises:
        ConfigError: no cluster takes that expert; the message lists the experts taken.
    """
    share: dict[tuple[int, ...], float] = {}
    for route, part in zip(routes_of(checkpoint), checkpoint.routes.cluster_share_M.tolist(), strict=True):
        share[route] = share.get(route, 0.0) + part
    through = {route: part for route, part in share.items() if route[-1] == expert and part}
    if not through:
        taken = ", ".join(str(e) for e in sorted({route[-1] for route in share}))
        raise ConfigError(f"--expert: no cluster takes {expert} in the last expert layer; taken there: {taken}.")
    return choose_route(checkpoint, max(through, key=lambda route: (through[route], route)))


def choose_all(checkpoint: Checkpoint) -> list[SelectedExperts]:
    """All routes that training images take."""
    share_M = checkpoint.routes.cluster_share_M.tolist()
    taken = {route for route, share in zip(routes_of(checkpoint), share_M, strict=True) if share}
    return [choose_route(checkpoint, route) for route in sorted(taken)]


def choose_selected(checkpoint: Checkpoint, selection: Selection) -> SelectedExperts:
    """The route that a task's images voted for, its clusters weighted by those votes."""
    routes = routes_of(checkpoint)
    on_route = {c: share for c, share in selection.clusters.items() if routes[c] == selection.route}
    return SelectedExperts.of_route(selection.route, {c: share / selection.share for c, share in on_route.items()})


def choose_average(checkpoint: Checkpoint, how: str, histogram: ClusterShares | None = None) -> SelectedExperts:
    """All experts in use, averaged layer by layer.

    Args:
        how: "weighted" by the images of each expert, or "uniform".
        histogram: share of a task's images in each cluster; None: of the training set.
    """
    shares = histogram or dict(enumerate(checkpoint.routes.cluster_share_M.tolist()))
    routes, layers = routes_of(checkpoint), []
    for layer in range(len(routes[0])):
        by_expert: dict[int, dict[int, float]] = {}
        for cluster, share in shares.items():
            if share:
                by_expert.setdefault(routes[cluster][layer], {})[cluster] = float(share)
        weight = {e: sum(v.values()) * len(by_expert) if how == "uniform" else 1.0 for e, v in by_expert.items()}
        layers.append({e: {c: share / weight[e] for c, share in v.items()} for e, v in sorted(by_expert.items())})
    return SelectedExperts(tuple(layers), {c: float(share) for c, share in shares.items() if share}, how)
