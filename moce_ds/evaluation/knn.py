"""Weighted k-nearest-neighbour accuracy on frozen features, with DINO's protocol.

Labels are classes [N], or targets [N, K] (see `metrics`).

Axes: N images of a split, T training images of one tile, Q test images of one tile, D features, K classes,
k neighbours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from moce_ds.common.errors import DataError
from moce_ds.common.host.program import progress_bar
from moce_ds.evaluation.knn_screening import Screening, is_fast
from moce_ds.evaluation.metrics import MultiLabelScore, Score, figures_of, judge
from moce_ds.evaluation.settings import KnnSettings

TRAINING_TILE = 16384
"""Training images of a tile."""

FIRST_TILE = 2048
"""The same of the first tile, if the others are screened with its neighbours."""

TEST_TILE = {"cpu": 512, "cuda": 4096}
"""Test images of a tile, by the kind of device: similarities of a tile take 32 MiB on a CPU and 256 MiB on a GPU."""

_CHECKED_ROWS = 8192
"""Rows whose values are checked at a time."""


def knn_accuracy(
    train_ND: Tensor,
    train_labels: Tensor,
    test_ND: Tensor,
    test_labels: Tensor,
    config: KnnSettings | None = None,
    device: torch.device | None = None,
) -> Score | MultiLabelScore:
    """Accuracy of a vote of the k nearest training images, each weighted by exp(cosine / temperature).

    If there are fewer than k training images, all vote; `settings["k"]` is the number of voters. With targets, the
    score of a class is its share of the vote, without neighbours that are ignored for the class.

    Beside the features, memory holds a normalised copy of the test features, the neighbours of the test images and one
    tile of similarities, whatever the number of training images.

    Args:
        train_ND, test_ND: features of any scale and floating type (they are L2-normalised here, in float32).
        train_labels, test_labels: integer class of each image [N], or targets [N, K].
        device: where similarities are computed; by default that of the features.

    Raises:
        DataError: see `check_split`.

    Source: Wu et al. 2018 (arXiv 1805.01978), with k and temperature of DINO (Caron et al. 2021).
    """
    config, device = config or KnnSettings(), device or train_ND.device
    check_split(train_ND, train_labels, test_ND, test_labels)
    train_y, test_y = (labels.cpu() for labels in positions(train_labels, test_labels))
    similarity_Nk, neighbour_Nk = (part.cpu() for part in nearest(train_ND, test_ND, config.k, device))
    settings = {"k": similarity_Nk.shape[1], "temperature": config.temperature}
    rows = TEST_TILE["cpu"]
    votes = (
        _vote(similarity_Qk, train_y[neighbour_Qk], int(train_y.max()) + 1, config.temperature)
        for similarity_Qk, neighbour_Qk in zip(similarity_Nk.split(rows), neighbour_Nk.split(rows), strict=True)
    )
    if train_y.ndim == 2:
        return judge(torch.cat(list(votes)).numpy(), test_y.numpy(), len(train_ND), settings)
    predicted_N = torch.cat([votes_QK.argmax(dim=1) for votes_QK in votes])  # all votes would be [N, K]
    return Score(*figures_of(predicted_N.numpy(), test_y.numpy()), len(train_ND), len(test_y), settings)


def nearest(train_ND: Tensor, test_ND: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and ids of the k most similar training images of each test image, most similar first; [N, k] each.

    One pass over the training features: every tile of them is read, moved to `device`, normalised and compared with
    all test features once, and its k best are merged with the k best so far. On a CPU with fast int8 products they
    screen the tiles, which takes less than half of the time; else, or if too many images pass (see `Screening`), faiss
    compares, if it is installed. A set of one tile is compared by torch, as in earlier versions.

    Of equally similar images those of the earlier tile are nearer; within a tile `torch.topk`, or faiss, chooses. The
    ways differ in the last bits of a cosine, so images whose cosines differ no more than that may change places.
    """
    many_tiles = device.type == "cpu" and len(train_ND) > TRAINING_TILE
    test_ND = normalize(test_ND.to(device, torch.float32), dim=1)
    screened = many_tiles and is_fast(train_ND.shape[1])
    screening = Screening(test_ND, _mean_of_some(train_ND).to(device)) if screened else None
    in_tile = _in_tile_by_faiss if many_tiles and _has_faiss() else _in_tile
    values_Nk, ids_Nk = (
        torch.empty(len(test_ND), 0, dtype=kind, device=device) for kind in (torch.float32, torch.long)
    )
    for first, train_TD in _training_tiles(train_ND, device, FIRST_TILE if screening else TRAINING_TILE):
        if screening and screening.pays and values_Nk.shape[1] == k:
            found = screening.in_tile(train_TD, values_Nk[:, -1], k)
        else:
            found = in_tile(test_ND, train_TD, k)
        both_values, both_ids = torch.cat([values_Nk, found[0]], dim=1), torch.cat([ids_Nk, found[1] + first], dim=1)
        # Stable: of equal similarities the earlier tile's comes first.
        order = both_values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values_Nk, ids_Nk = both_values.gather(1, order), both_ids.gather(1, order)
    return values_Nk, ids_Nk


def _mean_of_some(train_ND: Tensor) -> Tensor:
    """The mean direction of a thousand training images at equal distances."""
    return normalize(train_ND[:: max(1, len(train_ND) // 1000)].float(), dim=1).mean(dim=0)


def _training_tiles(train_ND: Tensor, device: torch.device, smallest: int) -> Iterator[tuple[int, Tensor]]:
    """The id of the first image of each tile, and the tile's normalised features [T, D].

    A tile holds as many images as all tiles before it, within `smallest` and TRAINING_TILE.
    """
    first = 0
    with progress_bar(total=len(train_ND), desc="neighbours", unit=" images", unit_scale=True, delay=2) as bar:
        while first < len(train_ND):
            part_TD = train_ND[first : first + min(TRAINING_TILE, max(smallest, first))]
            yield first, normalize(part_TD.to(device, torch.float32), dim=1)
            bar.update(len(part_TD))
            first += len(part_TD)


def _in_tile(test_ND: Tensor, train_TD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and places of the k best of a tile, [N, k] each; all if there are fewer."""
    rows, k = TEST_TILE["cuda" if test_ND.is_cuda else "cpu"], min(k, len(train_TD))
    found = [(test_QD @ train_TD.T).topk(k, dim=1) for test_QD in test_ND.split(rows)]
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def _in_tile_by_faiss(test_ND: Tensor, train_TD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    k = min(k, len(train_TD))
    values, places = faiss.knn(test_ND.numpy(), train_TD.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(values), torch.from_numpy(places)


def _has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def positions(train_labels: Tensor, *others: Tensor) -> list[Tensor]:
    """Classes as positions in the sorted classes of the training split; targets unchanged."""
    if train_labels.ndim == 2:
        return [train_labels, *others]
    classes = torch.unique(train_labels)
    return [torch.searchsorted(classes, labels) for labels in (train_labels, *others)]


def check_split(
    train_ND: Tensor, train_labels: Tensor, test_ND: Tensor, test_labels: Tensor, test: str = "test"
) -> None:
    """Check that a classifier can be evaluated on features and labels; `test` names the second split in errors.

    Raises:
        DataError: an empty split, labels that do not match the features, unequal widths, non-finite values, fewer than
            two classes, or a test class without a training image.
    """
    for split, features_ND, labels in (("training", train_ND, train_labels), (test, test_ND, test_labels)):
        if features_ND.ndim != 2 or labels.ndim not in (1, 2) or labels.shape[:1] != features_ND.shape[:1]:
            raise DataError(
                f"The {split} split has features {tuple(features_ND.shape)} and labels {tuple(labels.shape)}; "
                "expected [N, D] and [N] or [N, K]: one feature vector and one label per image, or one target per "
                "class."
            )
        if len(features_ND) == 0:
            raise DataError(f"The {split} split holds no images; expected at least one per class.")
        bad = sum(_not_finite(part_ND) for part_ND in features_ND.split(_CHECKED_ROWS))
        if bad:
            raise DataError(
                f"{bad} of {len(features_ND)} {split} features hold NaN or infinity; compute them again with "
                "`moce features`, and check that the checkpoint's loss was finite."
            )
    if train_ND.shape[1] != test_ND.shape[1]:
        raise DataError(
            f"Training features have {train_ND.shape[1]} dimensions and {test} features {test_ND.shape[1]}; "
            "expected both from the same encoder."
        )
    if train_labels.shape[1:] != test_labels.shape[1:]:
        raise DataError(
            f"Training labels are {list(train_labels.shape)} and {test} labels {list(test_labels.shape)}; "
            "expected both with one label per image, or with one target per class for the same classes."
        )
    if train_labels.ndim == 1:
        check_classes(train_labels, test_labels, test)


def _not_finite(features_ND: Tensor) -> int:
    """The number of rows that hold NaN or infinity."""
    # Only rows with such a norm can, which takes a fifth of the time; finite values may have an infinite norm.
    wide_ND = features_ND if features_ND.dtype == torch.float64 else features_ND.float()
    norm_N = vector_norm(wide_ND, dim=1)
    return int((~torch.isfinite(features_ND[~torch.isfinite(norm_N)])).any(dim=1).sum())


def check_classes(train_labels_N: Tensor, test_labels_N: Tensor, test: str) -> None:
    """Raise DataError for a single class, or a class of the split `test` without a training image."""
    known = set(train_labels_N.unique().tolist())
    if len(known) < 2:
        raise DataError("The training split holds a single class; accuracy needs at least two.")
    if missing := sorted(set(test_labels_N.unique().tolist()) - known):
        raise DataError(
            f"{test.capitalize()} classes {missing} have no training image; split the task so that every class is in "
            "both."
        )


def _vote(similarity_Qk: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Votes [Q, K] of neighbours with classes [Q, k], or with targets [Q, k, K]."""
    # A common factor per row does not change the vote; dividing by the largest weight keeps small temperatures finite.
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp()
    if labels.ndim == 2:
        return weight_Qk.new_zeros(len(labels), classes).scatter_add_(1, labels, weight_Qk)
    for_QK, all_QK = (torch.einsum("qk,qkc->qc", weight_Qk, part.float()) for part in (labels == 1, labels >= 0))
    return for_QK / all_QK.clamp(min=torch.finfo(torch.float32).tiny)
