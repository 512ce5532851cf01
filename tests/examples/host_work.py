"""CPU time of what the host computes for the routes of a step (docs/performance.md, "Host work of the routes").

    OMP_NUM_THREADS=1 python tests/examples/host_work.py

Axes: L expert layers, M clusters, E experts, N images, W ranks, B images of a rank.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from moce_ds.data.sampler import ShuffledSampler
from moce_ds.moe.gate import balanced_experts
from moce_ds.moe.placement import placement_by_traffic
from moce_ds.moe.routing_plan import make_plan
from moce_ds.training.local_sampler import LocalSampler

N, B, EP = 1_281_167, 256, 8
ROUNDS = 5


def milliseconds(call: Callable[[int], object]) -> float:
    """Median CPU time of `call(round)`, all threads of the process included."""
    times = []
    for number in range(ROUNDS):
        start = time.process_time()
        call(number)
        times.append(1e3 * (time.process_time() - start))
    return median(times)


def table_times() -> None:
    for L, M, E in ((2, 256, 8), (2, 1024, 64), (12, 256, 8), (12, 4096, 64)):
        for deviation in (0.1, 1.0, 3.0):  # of the logits: a new gate, a trained one, one that is nearly hard
            probs_LME = torch.softmax(deviation * torch.randn(L, M, E), dim=-1)
            taken = milliseconds(lambda _: balanced_experts(probs_LME, torch.full((M,), 1 / M), 1))  # noqa: B023
            print(f"balanced_experts: L {L}, M {M}, E {E}, logits of deviation {deviation}: {taken:.1f} ms")


def batch_times() -> None:
    random = np.random.default_rng(0)
    for M, E in ((256, 8), (4096, 64)):
        ids_N = random.integers(M, size=N).astype(np.int32)
        for W in (64, 512):
            for L in (2, 12):
                expert_ML = random.integers(E, size=(M, L))
                slot_LE = placement_by_traffic(expert_ML, np.full(M, 1 / M), E, EP)
                sampler = ShuffledSampler(N, W * B, 0)
                local = LocalSampler(sampler, ids_N, slot_LE, W, EP, [(0, expert_ML)])
                sampler.batch(0)  # the permutation of the epoch is made once
                order = milliseconds(local.batch)
                expert_MLK = expert_ML[:, :, None]
                clusters_WB = ids_N[local.batch(0).ids].astype(np.int64).reshape(W, B)
                plan = milliseconds(lambda _: make_plan(clusters_WB, expert_MLK, slot_LE, 3, EP))  # noqa: B023
                print(f"W {W}, L {L}, M {M}, E {E}: LocalSampler.batch {order:.1f} ms, make_plan {plan:.2f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    table_times()
    batch_times()
