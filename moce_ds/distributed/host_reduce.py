"""Small vectors of all ranks, combined on the host in log2(W) rounds.

Gloo's own `all_reduce` passes a vector around a ring, in 2 (W - 1) hops. For the few numbers that ranks agree on once
per step, only the number of hops matters.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]


def combine_all(own: Tensor, combine: Combine, rank: int, world_size: int) -> Tensor:
    """The vectors of all ranks combined, bit for bit the same on every rank; a collective.

    Recursive doubling: in round k, rank r and rank r XOR 2^k combine what they have. The ranks above the largest power
    of two first hand their vector to a rank below it, and receive the result from it.

    Args:
        own: this rank's vector on the host; the same shape and type on every rank.
        combine: commutative, as a sum or a maximum is: both partners must get the same bits.
    """
    power = 1 << (world_size.bit_length() - 1)  # the largest power of two that is not above world_size
    if rank >= power:
        dist.send(own, rank - power)
        return _received(own, rank - power)
    folded = rank + power < world_size
    result = combine(own, _received(own, rank + power)) if folded else own
    distance = 1
    while distance < power:
        partner = rank ^ distance
        sending = dist.isend(result, partner)
        other = _received(result, partner)
        assert sending is not None, "the partner is another rank of the group"
        sending.wait()
        result = combine(result, other)
        distance *= 2
    if folded:
        dist.send(result, rank + power)
    return result


def _received(like: Tensor, source: int) -> Tensor:
    vector = like.new_empty(like.shape)
    dist.recv(vector, source)
    return vector
