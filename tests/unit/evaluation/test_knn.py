"""The neighbours of k-NN, found tile by tile, against all similarities at once."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moce_ds.common.errors import DataError
from moce_ds.evaluation import knn
from moce_ds.evaluation.knn import knn_accuracy, nearest
from moce_ds.evaluation.settings import KnnSettings

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at_once(train_ND: Tensor, test_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What earlier versions computed: all similarities of a test image, then the k best."""
    similarity = normalize(test_ND.float(), dim=1) @ normalize(train_ND.float(), dim=1).T
    return tuple(similarity.topk(min(k, len(train_ND)), dim=1))  # type: ignore[return-value]


@pytest.fixture(params=["faiss", "torch"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 7 x 50 images, compared by faiss, and without it (`test_knn_screening.py` has screened ones)."""
    monkeypatch.setattr(knn, "is_fast", lambda width: False)
    monkeypatch.setattr(knn, "TRAINING_TILE", 50)
    monkeypatch.setattr(knn, "TEST_TILE", {"cpu": 7})
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "faiss", None)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("k", [1, 20, 49, 50, 51, 130, 400])
def test_tiles_find_the_neighbours_of_all_similarities(k: int) -> None:
    """Also where a tile, or the whole split, has fewer images than neighbours."""
    train_ND, test_ND = random(230, 12), random(40, 12, seed=1)
    found, expected = nearest(train_ND, test_ND, k, CPU), at_once(train_ND, test_ND, k)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.usefixtures("small_tiles")
def test_neighbours_arrive_in_any_order_of_the_tiles() -> None:
    """Training images sorted by similarity: every tile, or no later tile, has better ones."""
    test_ND = random(1, 12)
    by_similarity = (random(300, 12, seed=1) @ test_ND[0]).argsort()
    for order in (by_similarity, by_similarity.flip(0)):
        train_ND = random(300, 12, seed=1)[order]
        assert torch.equal(nearest(train_ND, test_ND, 20, CPU)[1], at_once(train_ND, test_ND, 20)[1])


def test_a_set_of_one_tile_has_the_neighbours_of_earlier_versions_also_among_equals() -> None:
    train_ND, test_ND = torch.eye(3).repeat(400, 1), torch.eye(3)
    assert torch.equal(nearest(train_ND, test_ND, 20, CPU)[1], at_once(train_ND, test_ND, 20)[1])


@pytest.mark.usefixtures("small_tiles")
def test_among_equals_the_earlier_tile_wins() -> None:
    """All images are alike, and those of the first tile have class 1."""
    train_ND, labels_N = torch.ones(200, 4), (torch.arange(200) < 50).long()
    assert (nearest(train_ND, torch.ones(3, 4), 20, CPU)[1] < 50).all()
    assert knn_accuracy(train_ND, labels_N, torch.ones(3, 4), torch.ones(3).long()).figures["top1"] == 1.0
    better_N1 = torch.where(torch.arange(200) == 170, 0.0, 1.0)[:, None]  # a better one drives out one of the equals
    ids_Qk = nearest(torch.cat([torch.ones(200, 3), better_N1], dim=1), torch.tensor([[1.0, 1, 1, 0]]), 20, CPU)[1]
    assert ids_Qk[0, 0] == 170 and (ids_Qk[0, 1:] < 50).all()


def test_features_of_any_precision_are_checked() -> None:
    labels = torch.arange(20) % 2
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        features = random(20, 12).to(kind)
        assert knn_accuracy(features, labels, features, labels).n_test == 20
        features[3, 4] = torch.inf
        with pytest.raises(DataError, match="1 of 20 training features"):
            knn_accuracy(features, labels, features, labels)


def test_half_precision_features_are_as_good() -> None:
    train_ND, test_ND = random(300, 12).half(), random(20, 12, seed=1).half()
    assert torch.equal(nearest(train_ND, test_ND, 5, CPU)[1], nearest(train_ND.float(), test_ND.float(), 5, CPU)[1])


class _Largest(TorchDispatchMode):
    """The largest number of values that an operation writes to new memory."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor) and not tensor._is_view()]
        self.values = max([self.values, *(tensor.numel() for tensor in made)])
        return result


def test_memory_does_not_grow_with_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "TRAINING_TILE", 64)
    monkeypatch.setattr(knn, "TEST_TILE", {"cpu": 16})
    monkeypatch.setattr(knn, "_CHECKED_ROWS", 64)
    monkeypatch.setattr(knn, "is_fast", lambda width: False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # whose memory torch does not see
    train_ND, labels_N = random(5000, 8), torch.arange(5000) % 7
    with _Largest() as largest:
        knn_accuracy(train_ND, labels_N, random(40, 8, seed=1), torch.arange(40) % 7, KnnSettings(k=5))
    assert largest.values == 5000  # the labels
