"""Pictures for the report: thumbnails as data URIs, and galleries of images per cluster and per expert.

Axes: M clusters, N images of the shard set.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 96
IMAGES_PER_CARD = 8

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """An image inside the page: a data URI, its size in pixels, and what it shows in words."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Card:
    """A few images of one group: `title` and `note` stand beside them."""

    title: str
    note: str
    pictures: list[Picture]


def data_uri(content: bytes, media_type: str) -> str:
    """`content` as a data URI, so that a page needs no second file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def picture(image: Image.Image, alt: str, side: int = THUMBNAIL_SIDE, quality: int = 82) -> Picture:
    """`image` as JPEG, shrunk so that neither edge exceeds `side`; smaller ones keep their native size."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality, optimize=True)
    return Picture(data_uri(encoded.getvalue(), "image/jpeg"), image.width, image.height, alt)


def draw(member_ids: Ints) -> list[int]:
    """`IMAGES_PER_CARD` different members at random, or all where there are fewer; the same ones every time."""
    drawn = np.random.default_rng(0).permutation(member_ids)[:IMAGES_PER_CARD]
    return sorted(drawn.tolist())


def choose_clusters(sizes_M: Ints, routes: Sequence[tuple[int, ...]], limit: int) -> list[int]:
    """At most `limit` clusters, sorted by route: the largest of every route first, then the second largest, ..."""
    largest_first = np.argsort(-sizes_M, kind="stable").tolist()
    by_route = [[cluster for cluster in largest_first if routes[cluster] == route] for route in sorted(set(routes))]
    in_turn = [cluster for rank in zip_longest(*by_route) for cluster in rank if cluster is not None]
    chosen = [cluster for cluster in in_turn if sizes_M[cluster] > 0][:limit]
    return sorted(chosen, key=lambda cluster: (routes[cluster], -sizes_M[cluster], cluster))


class MainClass(NamedTuple):
    """The commonest class of some images and the share of them that are of it; no name without labels."""

    name: str
    share: float


def main_class(labels_N: Ints, classes: Sequence[str]) -> MainClass:
    """The `MainClass` of images with these labels, -1 being none."""
    count_K = np.bincount(labels_N[labels_N >= 0], minlength=len(classes))
    if not count_K.any():
        return MainClass("", 0.0)
    return MainClass(classes[int(count_K.argmax())], float(count_K.max() / len(labels_N)))
