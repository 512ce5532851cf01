"""Screening by int8 scores finds the neighbours that float32 finds, whatever the features are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moce_ds.evaluation import knn, knn_screening
from moce_ds.evaluation.knn import nearest
from moce_ds.evaluation.knn_screening import Screening, is_fast

CPU = torch.device("cpu")
WIDTH = 48
pytestmark = pytest.mark.skipif(not is_fast(WIDTH), reason="this CPU has no avx512_vnni: screening is not used")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """A first tile of 64 images, then up to 512, in strips of 64 and groups of 16; blocks of 30 test images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "TRAINING_TILE", 512)
        patch.setattr(knn, "FIRST_TILE", 64)
        for name, value in {"TEST_BLOCK": 30, "STRIP": 64, "GROUP": 16}.items():
            patch.setattr(knn_screening, name, value)
        yield


def check(train_ND: Tensor, test_ND: Tensor, k: int) -> None:
    """The cosines are the k best of all in float64 up to float32's error, and each is that of its image."""
    values_Nk, ids_Nk = nearest(train_ND, test_ND, k, CPU)
    cosine_NN = normalize(test_ND.float(), dim=1).double() @ normalize(train_ND.float(), dim=1).double().T
    torch.testing.assert_close(values_Nk.double(), cosine_NN.topk(k, dim=1).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(values_Nk.double(), cosine_NN.gather(1, ids_Nk), atol=1e-6, rtol=0)
    assert all(len(ids.unique()) == k for ids in ids_Nk)


def features(kind: str, count: int, seed: int) -> Tensor:
    """Features that are hard to round, or alike."""
    x_ND = random(count, WIDTH, seed=seed)
    if kind == "groups":
        x_ND = random(9, WIDTH)[torch.arange(count) % 9] + 0.05 * x_ND
    elif kind == "sorted groups":
        x_ND = random(9, WIDTH)[torch.arange(count) * 9 // count] + 0.05 * x_ND
    elif kind == "equal":
        x_ND = x_ND[:3].repeat(count // 3 + 1, 1)[:count]
    elif kind == "constant":
        x_ND = torch.ones(count, WIDTH)
    elif kind == "zeros":
        x_ND[::2] = 0
    elif kind == "huge coordinate":
        x_ND[:, 3] *= 1e4
    elif kind == "huge image":
        x_ND[7] *= 1e18
        x_ND[8] = 1e-20 * torch.eye(WIDTH)[0]
    elif kind == "common mean":
        x_ND += 20
    elif kind == "float16":
        x_ND = x_ND.half()
    return x_ND


KINDS = [
    "random", "groups", "sorted groups", "equal", "constant", "zeros", "huge coordinate", "huge image", "common mean",
    "float16",
]  # fmt: skip


@pytest.mark.parametrize("k", [1, 20, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_the_neighbours_are_those_of_all_cosines(kind: str, k: int) -> None:
    """Also with more neighbours than a strip, or the first tile, has images."""
    check(features(kind, 1500, 0), features(kind, 70, 1), k)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    count=st.integers(513, 1300),
    k=st.integers(1, 90),
    seed=st.integers(0, 1000),
)
def test_any_features_have_their_neighbours(kinds: tuple[str, str], count: int, k: int, seed: int) -> None:
    check(features(kinds[0], count, seed), features(kinds[1], 33, seed + 1), k)


class _Operations(TorchDispatchMode):
    """Pairs of features that are multiplied, and the largest number of values of a new tensor."""

    pairs = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.sparse_sampled_addmm.default:
            self.pairs += len(result.values())
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor) and not tensor._is_view()]
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        return result


def test_few_images_are_compared_in_float32() -> None:
    test_ND, train_ND = (normalize(random(count, WIDTH, seed=count), dim=1) for count in (30, 512))
    worst_N = (test_ND @ train_ND.T).topk(5, dim=1).values[:, -1] - 1e-4
    screening = Screening(test_ND, torch.zeros(WIDTH))
    with _Operations() as operations:
        screening.in_tile(train_ND, worst_N, 5)
    assert screening.pays and 30 * 5 <= operations.pairs < 30 * 10


@pytest.mark.parametrize("kind", ["random", "equal", "constant", "zeros"])
def test_memory_does_not_grow_with_the_images_that_pass(kind: str) -> None:
    """No tensor is larger than the features of a tile, or of the sample for the mean."""
    train_ND, test_ND = features(kind, 5000, 0), features(kind, 60, 1)
    with _Operations() as operations:
        nearest(train_ND, test_ND, 20, CPU)
    assert operations.largest <= 1000 * WIDTH


def test_screening_ends_where_it_does_not_pay() -> None:
    """Equal images all pass, so strips are compared in float32, and the k best alone are kept."""
    test_ND = normalize(torch.ones(30, WIDTH), dim=1)
    screening = Screening(test_ND, torch.zeros(WIDTH))
    values_Nk, _ = screening.in_tile(normalize(torch.ones(512, WIDTH), dim=1), torch.full((30,), 0.5), 5)
    assert not screening.pays and values_Nk.shape == (30, 5)
    torch.testing.assert_close(values_Nk, torch.ones(30, 5))
