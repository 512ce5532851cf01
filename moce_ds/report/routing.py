"""Routes as people read them, and which expert sees which kind of image.

Axes: E experts per layer, N images, G groups of images (domains or classes).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def route_name(route: Sequence[int]) -> str:
    """A route as people read it: `1→3` is expert 1 in the first expert layer, 3 in the second."""
    return "→".join(str(expert) for expert in route)


def domain_of(class_name: str) -> str:
    """First component of a class's path: `digits/3` is of the domain `digits`."""
    return class_name.split("/", 1)[0]


def group_images(classes: Sequence[str], labels_N: Ints) -> tuple[list[str], Ints]:
    """Domains, and the domain of each image, int64 [N]; -1 for images without a label."""
    domains = sorted({domain_of(name) for name in classes})
    domain_K = np.array([domains.index(domain_of(name)) for name in classes] + [-1], np.int64)
    return domains, domain_K[labels_N]


def count(group_N: Ints, column_N: Ints, n_groups: int, n_columns: int) -> Ints:
    """Images by group and column (cluster or expert), int64 [G, columns]; group -1 is left out."""
    table = np.zeros((n_groups, n_columns), np.int64)
    known_N = group_N >= 0
    np.add.at(table, (group_N[known_N], column_N[known_N]), 1)
    return table


def shares(count_GE: Ints) -> Floats:
    """Each row divided by its sum; an empty row stays zero."""
    return count_GE / np.maximum(count_GE.sum(axis=1, keepdims=True), 1)


def row_order(share_GE: Floats) -> list[int]:
    """Rows sorted by their largest column, the purest first, so that blocks show."""
    favourite_G = share_GE.argmax(axis=1)
    return sorted(range(len(share_GE)), key=lambda g: (favourite_G[g], -share_GE[g].max(), g))
