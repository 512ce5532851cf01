"""CPU time of what the host computes in a step (docs/performance.md, "Host work of the routes"; docs/planning.md).

    OMP_NUM_THREADS=1 python tests/examples/host_work.py

Axes: L expert layers, M clusters, E experts, N images, W ranks, B images of a rank.
"""

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moce_ds.bench.training_step import TrainingStep
from moce_ds.common.config.settings import load
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.runtime import started
from moce_ds.forecast.host_work import HostWork
from moce_ds.forecast.step_cost import Work
from moce_ds.models.mae import mask_noise
from moce_ds.moe.gate import balanced_experts
from moce_ds.moe.placement import placement_by_traffic
from moce_ds.moe.routing_plan import make_plan
from moce_ds.training.local_sampler import LocalSampler
from moce_ds.training.settings import PretrainSettings

N, B, EP, PATCHES = 1_281_167, 256, 8, 196
ROUNDS, STEPS = 5, 40

TINY = """
    model.patch_size=4 model.width=16 model.depth=4 model.heads=2 model.decoder_width=16 model.decoder_depth=1
    model.decoder_heads=2 experts.num=8 experts.clusters=none data.image_size=16 data.shards=none run.out=none
    optim.batch_size=4
"""
"""A model whose tensors take no time, so that its step takes that of Python and of the dispatcher."""


def milliseconds(call: Callable[[int], object], rounds: int = ROUNDS, of: Callable[..., float] = median) -> float:
    """Median CPU time of `call(round)`, all threads of the process included."""
    times = []
    for number in range(rounds):
        start = time.process_time()
        call(number)
        times.append(1e3 * (time.process_time() - start))
    return of(times)


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
                sampler = ShuffledSampler(RandomOrder(N, 0), W * B)
                local = LocalSampler(sampler, ids_N, slot_LE, W, EP, [(0, expert_ML)])
                sampler.batch(0)  # the permutation of the epoch is made once
                order = milliseconds(local.batch)
                expert_MLK = expert_ML[:, :, None]
                clusters_WB = ids_N[local.batch(0).ids].astype(np.int64).reshape(W, B)
                plan = milliseconds(lambda _: make_plan(clusters_WB, expert_MLK, slot_LE, 3, EP))  # noqa: B023
                print(f"W {W}, L {L}, M {M}, E {E}: LocalSampler.batch {order:.1f} ms, make_plan {plan:.2f} ms")


def mask_times() -> None:
    ids_B, epochs_B = np.arange(B), np.zeros(B, dtype=np.int64)
    taken = milliseconds(lambda _: mask_noise(0, ids_B, epochs_B, PATCHES))
    print(f"mask_noise: {1e6 * taken / B / PATCHES:.1f} ns a patch")


class Operators(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        shapes = func.is_view or name in ("_unsafe_view", "detach", "empty", "empty_like", "new_empty", "split")
        self.names[name] += not shapes
        return func(*args, **(kwargs or {}))


def launch_times() -> None:
    """Operators of whole steps under DeepSpeed, and the CPU time of one in the fastest step: others are disturbed."""
    experts = "model.arch=moce experts.layers=[1,3]"
    with started() as runtime:
        for words in ("", "model.depth=8", "engine.precision=fp32", "optim.accumulation=2", experts,
                      f"{experts} experts.num=4", "model.arch=moce experts.layers=[1,2,3]"):  # fmt: skip
            config = load(PretrainSettings, None, [*TINY.split(), *words.split()])
            host_work = HostWork.of(Work.of(config), config.data, config.experts)
            step = TrainingStep(host_work.work, config.experts, config.loss_weights, runtime)
            taken = milliseconds(lambda _: step(), STEPS, min)  # noqa: B023
            with Operators() as operators:
                step()
            count = operators.names.total()
            print(f"operators of a step, {words or 'dense'}: {count}, predicted {host_work.launches}; "
                  f"{1e3 * taken / count:.0f} us each")  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    table_times()
    batch_times()
    mask_times()
    launch_times()
