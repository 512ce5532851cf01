"""Small vectors of all ranks combine to the same bits on every rank, for any number of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

from moce_ds.distributed.host_reduce import combine_all
from moce_ds.distributed.runtime import started

RANKS = (2, 3, 5, 6, 8)


def vectors(world_size: int) -> np.ndarray:
    """One vector for each rank, [W, 4]: sums of its numbers depend on their order."""
    return np.random.default_rng(world_size).normal(size=(world_size, 4)) * 10.0 ** np.arange(4)


def combine() -> dict[str, list[float] | int]:
    """What this rank gets."""
    with started() as runtime:
        own = vectors(runtime.world_size)[runtime.rank].tolist()
        sums, maxima = runtime.sum_and_max(own[:2], own[2:])
        sent: list[int] = []
        send, isend = dist.send, dist.isend
        try:
            dist.send = lambda tensor, dst: sent.append(dst) or send(tensor, dst)
            dist.isend = lambda tensor, dst: sent.append(dst) or isend(tensor, dst)
            product = combine_all(torch.tensor(own), torch.multiply, runtime.rank, runtime.world_size)
        finally:
            dist.send, dist.isend = send, isend
        return {"sums": sums, "maxima": maxima, "product": product.tolist(), "sent": len(sent)}


@pytest.mark.parametrize("world_size", RANKS)
def test_every_rank_gets_the_same_bits(world_size: int) -> None:
    found = run_distributed(combine, world_size)
    v_W4 = vectors(world_size)
    assert all({**rank, "sent": 0} == {**found[0], "sent": 0} for rank in found)
    assert np.allclose(found[0]["sums"], v_W4[:, :2].sum(axis=0), rtol=1e-12)
    assert found[0]["maxima"] == v_W4[:, 2:].max(axis=0).tolist()
    assert np.allclose(found[0]["product"], v_W4.prod(axis=0), rtol=1e-5)
    rounds = world_size.bit_length() - 1
    assert max(rank["sent"] for rank in found) <= rounds + 1, "messages of a rank: logarithmic"
