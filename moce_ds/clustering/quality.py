"""Quality of clusters: balance of their hard sizes, tightness, and agreement with labels if there are any.

Class names are paths ("digits/3"); the first part is the domain ("digits"), reported beside the classes.

Axes: N images, M clusters, L classes or domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from moce_ds.data.clusters import parts_of

_SHARES_SHOWN = 8


@dataclass(frozen=True)
class Agreement:
    """Agreement of clusters with one labelling, over the labelled images.

    Attributes:
        nmi: normalised mutual information (arithmetic mean), 0 to 1.
        purity: share of images with the most frequent label of their cluster.
        majority_share: per label, the share of its images in clusters where it has the majority.
    """

    nmi: float
    purity: float
    majority_share: dict[str, float]


@dataclass(frozen=True)
class ClusterReport:
    """Quality of a clustering; sizes are hard (argmax) sizes divided by their mean.

    Attributes:
        smallest, median, largest: over all clusters, including empty ones.
        cosine: mean over images of the cosine to the centroid.
        classes, domains: None if no image has a label.
    """

    num_images: int
    num_clusters: int
    empty_clusters: int
    smallest: float
    median: float
    largest: float
    cosine: float
    classes: Agreement | None
    domains: Agreement | None


def cluster_report(
    ids_N: np.ndarray,
    num_clusters: int,
    cosine_M: np.ndarray,
    labels_N: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> ClusterReport:
    """Measure a clustering; memory does not grow with the images.

    Args:
        ids_N: cluster of each image, int; may be memory-mapped.
        cosine_M: mean cosine of a cluster's images to its centroid.
        labels_N: index into `classes`; negative for an image without a label.
        classes: class names, paths with "/".
    """
    sizes_M = sum((np.bincount(part_N, minlength=num_clusters) for part_N in parts_of(ids_N)), np.zeros(num_clusters))
    relative_M = sizes_M / sizes_M.mean()
    by_class = by_domain = None
    counts_ML = np.zeros((num_clusters, len(classes)), dtype=np.int64)
    if labels_N is not None:
        _count(counts_ML, ids_N, labels_N)
    if counts_ML.any():
        domain_of = [name.split("/")[0] for name in classes]
        domains = sorted(set(domain_of))
        domain_of_L = np.array([domains.index(name) for name in domain_of])
        in_domain_LD = domain_of_L[:, None] == np.arange(len(domains))
        by_class = agreement(counts_ML, classes)
        by_domain = agreement(counts_ML @ in_domain_LD, domains)
    return ClusterReport(
        num_images=len(ids_N),
        num_clusters=num_clusters,
        empty_clusters=int((sizes_M == 0).sum()),
        smallest=float(relative_M.min()),
        median=float(np.median(relative_M)),
        largest=float(relative_M.max()),
        cosine=float(np.average(cosine_M, weights=sizes_M)),
        classes=by_class,
        domains=by_domain,
    )


def _count(counts_ML: np.ndarray, ids_N: np.ndarray, labels_N: np.ndarray) -> None:
    """Add to `counts_ML` the images of each cluster and label."""
    for ids, labels in zip(parts_of(ids_N), parts_of(labels_N), strict=True):
        labelled = labels >= 0
        np.add.at(counts_ML, (ids[labelled], labels[labelled]), 1)


def agreement(counts_ML: np.ndarray, names: Sequence[str]) -> Agreement:
    """Compare clusters with labels 0 to len(names) - 1; names without images are left out.

    Args:
        counts_ML: images of each cluster and label; at least one.
    """
    from sklearn.metrics import mutual_info_score  # Slow to import.

    majority_ML = 2 * counts_ML > counts_ML.sum(axis=1, keepdims=True)
    in_majority_L = (counts_ML * majority_ML).sum(axis=0)
    images_L = counts_ML.sum(axis=0)
    uncertainty = (_entropy(images_L) + _entropy(counts_ML.sum(axis=1))) / 2
    information = mutual_info_score(None, None, contingency=counts_ML)
    return Agreement(
        nmi=float(information / uncertainty) if uncertainty else 1.0,
        purity=float(counts_ML.max(axis=1).sum() / counts_ML.sum()),
        majority_share={name: float(in_majority_L[i] / images_L[i]) for i, name in enumerate(names) if images_L[i]},
    )


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def report_table(report: ClusterReport, compared: bool = True) -> Table:
    """The report for a terminal, at most 100 columns; `compared`: whether labels were requested."""
    table = Table(title=f"{report.num_images:,} images in {report.num_clusters:,} clusters", width=100)
    table.add_column("quantity", ratio=4)
    table.add_column("value", justify="right", no_wrap=True, min_width=18)
    table.add_column("meaning", ratio=5, style="dim")
    sizes = f"{report.smallest:.2f} / {report.median:.2f} / {report.largest:.2f}"
    table.add_row("hard sizes min / median / max", sizes, "over the mean size; 1 is balanced")
    table.add_row("empty clusters", f"{report.empty_clusters}", "clusters without images")
    table.add_row("cosine to centroid", f"{report.cosine:.3f}", "mean over images; 1 is a single point")
    by_name = {"classes": report.classes}
    if (
        report.domains
        and report.classes
        and report.domains.majority_share.keys() != report.classes.majority_share.keys()
    ):
        by_name["domains"] = report.domains
    for name, scores in by_name.items():
        if scores is None:
            table.add_row(
                "agreement with labels",
                "-",
                "these images have no labels" if compared else "not compared: pass --shards",
            )
        else:
            _add_agreement(table, name, scores)
    return table


def _add_agreement(table: Table, name: str, scores: Agreement) -> None:
    table.add_section()
    table.add_row(f"NMI with {name}", f"{scores.nmi:.3f}", "mutual information, 0 to 1")
    table.add_row(f"purity by {name}", f"{scores.purity:.3f}", "share with the most frequent label of the cluster")
    ordered = sorted(scores.majority_share.items(), key=lambda item: item[1])
    for rank, (label, share) in enumerate(ordered[:_SHARES_SHOWN]):
        meaning = "in clusters with its majority; lowest" if rank == 0 else ""
        table.add_row(f"  {label}", f"{100 * share:.1f}%", meaning)
    if len(ordered) > _SHARES_SHOWN:
        table.add_row(f"  {len(ordered) - _SHARES_SHOWN} more {name}", f"≥ {100 * ordered[_SHARES_SHOWN][1]:.1f}%", "")
