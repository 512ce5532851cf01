"""Which experts of a run are exported: a route, by various ways to name it, or an average of many experts."""

from collections.abc import Mapping
from dataclasses import dataclass

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.errors import ConfigError
from moce_ds.export.select import Selection

AVERAGES = ("uniform", "weighted")

Voices = Mapping[int, float]
"""Clusters, and the share of each."""


@dataclass(frozen=True)
class Chosen:
    """Experts to export.

    Attributes:
        layers: for every expert layer its experts, each with the clusters that speak for it; the shares of a layer sum
            to 1. One expert a layer is a route, several are averaged.
        clusters: the share of every cluster that speaks for any.
        average: how experts are averaged, None for a route.
    """

    layers: tuple[Mapping[int, Voices], ...]
    clusters: Voices
    average: str | None = None

    @classmethod
    def of_route(cls, experts: tuple[int, ...], clusters: Voices) -> "Chosen":
        """One expert a layer."""
        return cls(tuple({expert: clusters} for expert in experts), clusters)

    @property
    def experts(self) -> tuple[int, ...] | None:
        """The route, None for an average."""
        return None if self.average else tuple(next(iter(layer)) for layer in self.layers)

    @property
    def spoken(self) -> str:
        """Such as "route 3-5"."""
        return f"{self.average} average" if self.average else f"route {spoken(self.experts or ())}"


def spoken(route: tuple[int, ...]) -> str:
    """A route as it is written: 3-5."""
    return "-".join(map(str, route))


def routes_of(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    """The route of every cluster."""
    return [tuple(row) for row in checkpoint.entry("routing", "expert_ML")]


def choose_cluster(checkpoint: Checkpoint, cluster: int) -> Chosen:
    """The route of one cluster. Raises ConfigError when there is no such cluster."""
    routes = routes_of(checkpoint)
    if not 0 <= cluster < len(routes):
        raise ConfigError(f"--cluster: got {cluster}; the run has clusters 0 to {len(routes) - 1}.")
    return Chosen.of_route(routes[cluster], {cluster: 1.0})


def choose_route(checkpoint: Checkpoint, experts: tuple[int, ...]) -> Chosen:
    """A route by its experts, the clusters on it weighed by their share of the training set.

    Raises:
        ConfigError: the route has the wrong length, or no cluster takes it; those that are taken are listed.
    """
    routes, share_M = routes_of(checkpoint), checkpoint.entry("routing", "cluster_share_M")
    on_route = {cluster: share_M[cluster] for cluster, route in enumerate(routes) if route == experts}
    total = sum(on_route.values())
    if not total:
        taken = ", ".join(spoken(route) for route in sorted(set(routes)))
        raise ConfigError(f"--route: no cluster takes {spoken(experts)}; routes of this run: {taken}.")
    return Chosen.of_route(experts, {cluster: share / total for cluster, share in on_route.items()})


def choose_expert(checkpoint: Checkpoint, expert: int) -> Chosen:
    """The route that most training images take through an expert of the *last* expert layer, the most specialised one.

    Raises:
        ConfigError: no cluster takes that expert there; those that are taken are listed.
    """
    share: dict[tuple[int, ...], float] = {}
    for route, part in zip(routes_of(checkpoint), checkpoint.entry("routing", "cluster_share_M"), strict=True):
        share[route] = share.get(route, 0.0) + part
    through = {route: part for route, part in share.items() if route[-1] == expert and part}
    if not through:
        taken = ", ".join(str(e) for e in sorted({route[-1] for route in share}))
        raise ConfigError(f"--expert: no cluster takes {expert} in the last expert layer; taken there: {taken}.")
    return choose_route(checkpoint, max(through, key=lambda route: (through[route], route)))


def choose_all(checkpoint: Checkpoint) -> list[Chosen]:
    """Every route that training images take."""
    share_M = checkpoint.entry("routing", "cluster_share_M")
    taken = {route for route, share in zip(routes_of(checkpoint), share_M, strict=True) if share}
    return [choose_route(checkpoint, route) for route in sorted(taken)]


def choose_selected(checkpoint: Checkpoint, selection: Selection) -> Chosen:
    """The route that a task's images voted for, its clusters weighed by those votes."""
    routes = routes_of(checkpoint)
    on_route = {c: share for c, share in selection.clusters.items() if routes[c] == selection.route}
    return Chosen.of_route(selection.route, {c: share / selection.share for c, share in on_route.items()})


def choose_average(checkpoint: Checkpoint, how: str, histogram: Voices | None = None) -> Chosen:
    """All experts that images take, averaged layer by layer.

    Args:
        how: "weighted" by the images that take each, or "uniform".
        histogram: share of the images in each cluster, of a task; None: of the training set.
    """
    shares = histogram or dict(enumerate(checkpoint.entry("routing", "cluster_share_M")))
    routes, layers = routes_of(checkpoint), []
    for layer in range(len(routes[0])):
        voices: dict[int, dict[int, float]] = {}
        for cluster, share in shares.items():
            if share:
                voices.setdefault(routes[cluster][layer], {})[cluster] = float(share)
        weight = {e: sum(v.values()) * len(voices) if how == "uniform" else 1.0 for e, v in voices.items()}
        layers.append({e: {c: share / weight[e] for c, share in v.items()} for e, v in sorted(voices.items())})
    return Chosen(tuple(layers), {c: float(share) for c, share in shares.items() if share}, how)
