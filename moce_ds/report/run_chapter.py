"""The report's chapter about one run: its losses, clusters, routes, images, reconstructions and settings.

Axes: M clusters, N images of the shard set, E experts per layer, G groups of images (domains or classes).
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from moce_ds.checkpoint.records import RoutingTable
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.clustering.quality import cluster_report
from moce_ds.common.errors import ArtefactError, DataError
from moce_ds.common.text import route_label, without_home
from moce_ds.data.clusters import Clusters
from moce_ds.data.shards import ShardSet
from moce_ds.report import plots
from moce_ds.report.page import Card, Cell, Chapter, Exhibit, Section, Table, picture
from moce_ds.report.plots import Floats, Line

_CLUSTER_CARDS = 24
_EXPERT_CARDS = 64  # over all layers
_MOST_CLASSES = 60  # more rows would not be readable
_ROUTES_NAMED = 8
_PICTURE_SIDE = 1400  # pixels
_IMAGES_PER_CARD = 8
_LEAST_CARDS = 4  # of a run, however many share the page
_STARTS = 5

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """The images of a run's clusters.

    Attributes:
        labels_N: position in `classes`, -1 without a class.
        ids_N: cluster.
    """

    shards: ShardSet
    labels_N: Ints
    ids_N: NDArray[np.int32]

    @property
    def classes(self) -> list[str]:
        """Names of the shard set's classes, in the order of the labels."""
        return self.shards.classes

    def card(self, title: str, member_ids: Ints, note: str = "") -> Card:
        """A card of some of `member_ids`, with their number, their most frequent class and a note."""
        main = main_class(self.labels_N[member_ids], self.classes)
        notes = (f"{len(member_ids):,} images", f"{main.name} {main.share:.0%}" if main.name else "", note)
        drawn = [picture(self.shards.decode(i), self._describe(i)) for i in draw(member_ids)]
        return Card(title, " · ".join(part for part in notes if part), drawn)

    def _describe(self, image_id: int) -> str:
        label = self.labels_N[image_id]
        return f"image {image_id}" + (f", {self.classes[label]}" if label >= 0 else "")


def run_chapter(run: RunFolder, name: str, sharing: int = 1) -> Chapter:
    """Everything that a run's folder holds, from the training of its experts to its settings.

    Args:
        name: of the run on this page.
        sharing: runs with galleries on the page; each shows fewer images, so that the page keeps its size.
    """
    images, why_not = _open_images(run)
    sections = [
        *_starts(run),
        *_experts(run),
        *_cluster_sizes(run, images, why_not),
        *_gates(run, images),
        *_cluster_gallery(run, images, max(_LEAST_CARDS, _CLUSTER_CARDS // sharing)),
        *_expert_gallery(run, images, max(_LEAST_CARDS, _EXPERT_CARDS // sharing)),
        *_reconstruction(run),
        Section("Settings", listing=without_home(yaml.safe_dump(run.config, sort_keys=False))),
    ]
    return Chapter(f"Run {name}", f"run-{name}", sections)


def _starts(run: RunFolder) -> Iterator[Section]:
    """Who started the run, when, and with which command: of several starts the newest ones."""
    attempts = run.attempts
    rows = [
        [
            Cell(str(number)),
            Cell((attempt.started or "–").replace("T", " ")),
            Cell(attempt.version or "–"),
            Cell((attempt.host or "–") + (f", job {attempt.job}" if attempt.job else "")),
            Cell(f"{attempt.processes} on {attempt.device}" if attempt.processes else "–"),
            Cell(without_home(shlex.join(attempt.command)) or "–"),
        ]
        for number, attempt in list(attempts.items())[-_STARTS:]
    ]
    if rows:
        earlier = f" {len(attempts) - len(rows)} earlier ones are not shown." if len(attempts) > len(rows) else ""
        caption = f"Each start of the run, with the version of moce_ds and the processes that shared the work.{earlier}"
        header = ["start", "date", "version", "machine", "processes", "command"]
        yield Section("Starts", tables=[Table(header, rows, caption, names=len(header))])


def _open_images(run: RunFolder) -> tuple[Images | None, str]:
    """The run's images, or the reason why they cannot be shown, such as a deleted shard set."""
    if run.clusters is None or run.shards is None:
        return None, ""
    try:
        shards = ShardSet.open(run.shards)
        ids_N = run.cluster_ids(shards.fingerprint, shards.count)
    except (ArtefactError, DataError) as error:
        return None, without_home(f"Images are not shown: {error}")
    return Images(shards, shards.labels.astype(np.int64), ids_N), ""


def _experts(run: RunFolder) -> Iterator[Section]:
    exhibits = []
    for key, caption in (
        ("imbalance", "0 if the gates prefer no expert, 1 − E for every expert layer if they are certain."),
        ("balance", "Squared coefficient of variation of the experts' load, summed over layers: 0 is an equal load."),
    ):
        line = Line(key, run.series(key))
        if len(line.steps_S):
            exhibits.append(Exhibit(plots.curves([line], f"{key.capitalize()} loss", ""), caption))
    layers = sorted({keys[1] for keys in run.metrics if keys[0] == "layers"}, key=int)
    confidence = [
        Line(f"block {layer}", run.series("layers", layer, "confidence"), i) for i, layer in enumerate(layers)
    ]
    if confidence:
        caption = "Mean over images of the largest probability of an expert; 1/E means undecided, 100% certain."
        exhibits.append(Exhibit(plots.curves(confidence, "Gate confidence", "probability", "percent"), caption))
    for layer in layers:
        load, live = run.series("layers", layer, "load"), run.series("layers", layer, "live")
        if not len(load.steps_P):
            continue
        caption = (
            f"Share of images of each expert of block {layer}; white dashes mark equal shares. "
            f"Live at the end: {live.high_P[-1]:.0f} of {load.mean_P.shape[1]} experts."
        )
        exhibits.append(Exhibit(plots.expert_load(load.steps_P, load.mean_P, f"Expert load, block {layer}"), caption))
    if exhibits:
        yield Section("Experts in training", exhibits=exhibits)


def _cluster_sizes(run: RunFolder, images: Images | None, why_not: str) -> Iterator[Section]:
    if run.clusters is None:
        return
    clusters = run.clusters
    method = "k-means" if clusters.method == "kmeans" else f"balanced assignment (eps {clusters.eps:g})"
    relative_M = clusters.sizes_M / clusters.sizes_M.mean()
    caption = (
        f"Images per cluster by {method}: smallest {relative_M.min():.2f}, median {np.median(relative_M):.2f}, "
        f"largest {relative_M.max():.2f} of the mean."
    )
    text = _agreement(clusters, images) if images else why_not
    yield Section("Clusters", text, exhibits=[Exhibit(plots.sorted_sizes(clusters.sizes_M), caption)])


def _agreement(clusters: Clusters, images: Images) -> str:
    report = cluster_report(images.ids_N, clusters.num_clusters, clusters.cosine_M, images.labels_N, images.classes)
    if report.domains is None or report.classes is None:
        return "The images have no classes to compare the clusters with."
    text = f"Agreement of clusters with classes: NMI {report.classes.nmi:.2f}, purity {report.classes.purity:.2f}."
    if len(report.domains.majority_share) > 1:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in report.domains.majority_share.items())
        text += f" Share of each domain's images in clusters that are mostly of that domain: {shares}."
    return text


def _gates(run: RunFolder, images: Images | None) -> Iterator[Section]:
    if run.routing is None:
        return
    table, order = run.routing, run.routing.order()
    rows = [_cluster_name(images, cluster) for cluster in order]
    exhibits = [
        Exhibit(
            plots.heatmap(probs_ME[order], rows, f"Gate of block {layer}", expert_M[order]),
            f"Probability of each expert for a cluster (row, with its most frequent class) in block {layer}; framed: "
            f"the chosen expert. {_other_choices(probs_ME, expert_M)}Rows are sorted by route, then by confidence; the "
            "order is the same for all blocks. Equal routes form bands.",
        )
        for layer, probs_ME, expert_M in zip(table.layers, table.probs_LME, table.expert_ML.T, strict=True)
    ]
    used = Counter(table.routes)
    counted = ", ".join(f"{route_label(route)} ({clusters})" for route, clusters in used.most_common(_ROUTES_NAMED))
    more = f" and {len(used) - _ROUTES_NAMED} others" if len(used) > _ROUTES_NAMED else ""
    text = f"{len(used)} routes are in use at step {table.step:,}; in brackets their clusters: {counted}{more}."
    yield Section("Routing of clusters", text, exhibits=exhibits)
    if images:
        yield from _groups(table, images)


def _other_choices(probs_ME: Floats, expert_M: Ints) -> str:
    """A sentence on the clusters whose chosen expert is not the most probable one; empty if there are none."""
    others = int((probs_ME.max(axis=1) > probs_ME[np.arange(len(expert_M)), expert_M]).sum())
    if not others:
        return ""
    balanced = "balanced assignment moves clusters to experts with fewer images"
    return f"It is not the most probable one for {others} of {len(expert_M)} clusters: {balanced}. "


def _cluster_name(images: Images | None, cluster: int) -> str:
    name = main_class(images.labels_N[images.ids_N == cluster], images.classes).name if images else ""
    return f"{name} · {cluster}" if name else str(cluster)


def _groups(table: RoutingTable, images: Images) -> Iterator[Section]:
    """Experts of each block by domain, and by class if there are more classes than domains but not too many."""
    domains, domain_N = group_images(images.classes, images.labels_N)
    groupings = [("domains", domains, domain_N)] if len(domains) > 1 else []
    if len(domains) < len(images.classes) <= _MOST_CLASSES:
        groupings.append(("classes", images.classes, images.labels_N))
    for what, names, group_N in groupings:
        exhibits = []
        for position, layer in enumerate(table.layers):
            expert_N = table.expert_ML[images.ids_N, position]
            share_GE = row_shares(count_by_group(group_N, expert_N, len(names), table.n_experts))
            order = row_order(share_GE)
            title = f"{what.capitalize()} in block {layer}"
            plot = plots.heatmap(share_GE[order], [names[group] for group in order], title)
            exhibits.append(
                Exhibit(plot, f"Share of the images of each row that the experts of block {layer} receive.")
            )
        yield Section(f"Routing of {what}", exhibits=exhibits)


def _cluster_gallery(run: RunFolder, images: Images | None, limit: int) -> Iterator[Section]:
    if run.clusters is None or images is None:
        return
    m = run.clusters.num_clusters
    routes = run.routing.routes if run.routing else [()] * m
    cards = [
        images.card(
            f"Cluster {cluster}",
            np.flatnonzero(images.ids_N == cluster),
            f"route\u00a0{route_label(routes[cluster])}" if routes[cluster] else "",
        )
        for cluster in choose_clusters(run.clusters.sizes_M, routes, limit)
    ]
    text = "Images drawn at random from each cluster, with its size, its most frequent class and its route"
    text += f"; {len(cards)} of {m} clusters, the largest of each route first." if len(cards) < m else "."
    yield Section("Images by cluster", text, cards=cards)


def _expert_gallery(run: RunFolder, images: Images | None, limit: int) -> Iterator[Section]:
    if run.routing is None or images is None:
        return
    for position, layer in enumerate(run.routing.layers):
        expert_N = run.routing.expert_ML[images.ids_N, position]
        used_E = np.bincount(expert_N, minlength=run.routing.n_experts)
        busiest = np.argsort(-used_E, kind="stable")[: max(1, limit // len(run.routing.layers))]
        cards = [
            images.card(f"Expert {expert}", np.flatnonzero(expert_N == expert))
            for expert in sorted(busiest.tolist())
            if used_E[expert]
        ]
        text = f"Random images of each expert; {(used_E > 0).sum()} of {len(used_E)} experts receive images."
        yield Section(f"Images by expert, block {layer}", text, cards=cards)


def _reconstruction(run: RunFolder) -> Iterator[Section]:
    if run.reconstruction is None:
        return
    with Image.open(run.reconstruction) as opened:
        shown = picture(opened, f"Reconstructions of run {run.name}", _PICTURE_SIDE, quality=92)
    scale = max(1, min(720 // shown.width, 640 // shown.height))
    step = int(run.reconstruction.stem.removeprefix("step-"))
    caption = (
        f"From left to right: input, masked input, and the input with its hidden patches filled in, at step {step:,}. "
        "Filled patches have the true patch's mean and contrast, which the model does not predict."
    )
    yield Section("Reconstructions", exhibits=[Exhibit(shown, caption, scale)])


def draw(member_ids: Ints) -> list[int]:
    """`_IMAGES_PER_CARD` random members, or all if there are fewer; deterministic."""
    drawn = np.random.default_rng(0).permutation(member_ids)[:_IMAGES_PER_CARD]
    return sorted(drawn.tolist())


def choose_clusters(sizes_M: Ints, routes: Sequence[tuple[int, ...]], limit: int) -> list[int]:
    """At most `limit` clusters, sorted by route: the largest of every route first, then the second largest, ..."""
    largest_first = np.argsort(-sizes_M, kind="stable").tolist()
    by_route = [[cluster for cluster in largest_first if routes[cluster] == route] for route in sorted(set(routes))]
    in_turn = [cluster for rank in zip_longest(*by_route) for cluster in rank if cluster is not None]
    chosen = [cluster for cluster in in_turn if sizes_M[cluster] > 0][:limit]
    return sorted(chosen, key=lambda cluster: (routes[cluster], -sizes_M[cluster], cluster))


class MainClass(NamedTuple):
    """The most frequent class of some images, and its share; no name without labels."""

    name: str
    share: float


def main_class(labels_N: Ints, classes: Sequence[str]) -> MainClass:
    """The `MainClass` of images with these labels; -1: no label."""
    count_K = np.bincount(labels_N[labels_N >= 0], minlength=len(classes))
    if not count_K.any():
        return MainClass("", 0.0)
    return MainClass(classes[int(count_K.argmax())], float(count_K.max() / len(labels_N)))


def domain_of(class_name: str) -> str:
    """First component of a class's path: `digits/3` is of the domain `digits`."""
    return class_name.split("/", 1)[0]


def group_images(classes: Sequence[str], labels_N: Ints) -> tuple[list[str], Ints]:
    """Domains, and the domain of each image, int64 [N]; -1 for images without a label."""
    domains = sorted({domain_of(name) for name in classes})
    domain_K = np.array([domains.index(domain_of(name)) for name in classes] + [-1], np.int64)
    return domains, domain_K[labels_N]


def count_by_group(group_N: Ints, column_N: Ints, n_groups: int, n_columns: int) -> Ints:
    """Images by group and column (cluster or expert), int64 [G, columns]; group -1 is left out."""
    table = np.zeros((n_groups, n_columns), np.int64)
    known_N = group_N >= 0
    np.add.at(table, (group_N[known_N], column_N[known_N]), 1)
    return table


def row_shares(count_GE: Ints) -> Floats:
    """Each row divided by its sum; an empty row stays zero."""
    return count_GE / np.maximum(count_GE.sum(axis=1, keepdims=True), 1)


def row_order(share_GE: Floats) -> list[int]:
    """Rows sorted by their largest column, the purest first, so that blocks show."""
    favourite_G = share_GE.argmax(axis=1)
    return sorted(range(len(share_GE)), key=lambda g: (favourite_G[g], -share_GE[g].max(), g))
