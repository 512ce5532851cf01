"""Forward and backward with experts compared with the dense model of the same active size.

`moce bench layer` compares expert layers with the dense MLP. One process measures the replicated layer and the stock
ones; two processes measure expert parallelism. Every ratio is relative to the dense MLP, timed in the same processes in
turns with the others. Everything is repeated in several sets of new processes, and the median counts: memory placement
changes the time of a matrix product by 15% between starts.

`moce bench step` compares a training step of MoCE with one of the dense MAE, in this process.

Axes: B images, N patches, M clusters, C width of a cluster embedding.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from moce_ds.bench import cases
from moce_ds.bench.cases import Case, Problem
from moce_ds.bench.timing import in_processes, interleaved, memory_and_waits
from moce_ds.common.compat import quiet_deepspeed
from moce_ds.common.host.allocator import keep_freed_memory
from moce_ds.common.storage.files import PICTURE_TEXT, atomic_file, writes_to
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder
from moce_ds.models.moce import ExpertShape, Moce, Routing
from moce_ds.models.shapes import LossWeights
from moce_ds.models.vit import ViTShape
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.gate import chosen_experts
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import make_plan

Row = dict[str, Any]

ROUTINGS = ("uniform", "skewed")

_CLUSTERS = 64  # of a training step

ALONE: Mapping[str, Callable[[Problem], Case]] = {
    "ours, replicated": cases.ours,
    "stock, no drop": lambda p: cases.stock(p, 0.0),
    "stock, capacity 1.0": lambda p: cases.stock(p, 1.0),
    "stock, capacity 1.25": lambda p: cases.stock(p, 1.25),
    "stock, capacity 2.0": lambda p: cases.stock(p, 2.0),
    "TokenMoE, no drop": cases.token,
}
PARALLEL: Mapping[str, Callable[[Problem], Case]] = {
    "ours, EP": cases.ours,
    "ours, EP with locality": lambda p: cases.ours(p, locality=True),
    "stock, no drop": lambda p: cases.stock(p, 0.0),
}


def measure(
    batches: Sequence[int], experts: Sequence[int], widths: Sequence[int], repeats: int, processes: int, starts: int
) -> list[Row]:
    """All rows: the cases of one process, then those of `processes` processes with `ep_size` = `processes`.

    Each is the median over `starts` sets of processes; `ratios` contains all of them.
    """
    os.environ["KINETO_LOG_LEVEL"] = "99"  # silences the profiler in the processes
    measured = []
    for count in sorted({1, processes}):
        of_starts = [in_processes(_measure, count, batches, experts, widths, repeats) for _ in range(starts)]
        measured += [_middle(rows) for rows in zip(*of_starts, strict=True)]
    return measured


def _middle(rows: Sequence[Row]) -> Row:
    """The median row of all starts."""
    ratios = [row["ratio"] for row in rows]
    return rows[0] | {"ratio": float(np.median(ratios)), "ratios": ratios}


def _measure(
    batches: Sequence[int], experts: Sequence[int], widths: Sequence[int], repeats: int, runtime: Runtime
) -> list[Row]:
    return list(bench_layer(batches, experts, widths, repeats, runtime))


def sizes(batches: Sequence[int], experts: Sequence[int], widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(B, E, D) of the first of each, then of every other one while the rest stay at their first."""
    B, E, D = batches[0], experts[0], widths[0]
    varied = [(b, E, D) for b in batches[1:]] + [(B, e, D) for e in experts[1:]] + [(B, E, d) for d in widths[1:]]
    return [(B, E, D), *varied]


def bench_layer(
    batches: Sequence[int], experts: Sequence[int], widths: Sequence[int], repeats: int, runtime: Runtime
) -> Iterator[Row]:
    """Rows for every size (see `sizes`) and both routings; with several processes, those of the slowest one.

    `ep_size` is the number of processes.
    """
    quiet_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    makers = ALONE if runtime.world_size == 1 else PARALLEL
    for B, E, D, routing in ((*size, routing) for size in sizes(batches, experts, widths) for routing in ROUTINGS):
        problem = cases.make_problem(B, D, E, routing, runtime)
        built = {"dense": cases.dense(problem), **{name: make(problem) for name, make in makers.items()}}
        seconds = interleaved({name: case.run for name, case in built.items()}, repeats, runtime.barrier)
        slowest = runtime.max(list(seconds.values()))
        sent = runtime.sum([float(case.sent) for case in built.values()])
        for (name, case), slowest_seconds, all_sent in zip(built.items(), slowest, sent, strict=True):
            peak, waits = memory_and_waits(case.run, runtime.device)
            yield {
                "name": name,
                "mode": f"ep {runtime.world_size}" if runtime.world_size > 1 else "1 process",
                "routing": routing,
                "B": B,
                "E": E,
                "D": D,
                "dtype": str(problem.x_BTD.dtype).removeprefix("torch."),
                "ratio": slowest_seconds / slowest[0],
                "dropped": case.dropped,
                "bytes": int(all_sent),
                "host_waits": waits,
                "peak_mb": peak / 2**20,
            }


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """A bar chart of the ratios: one panel per (routing, mode), one group per size."""
    panels = sorted({(row["mode"], row["routing"]) for row in rows})
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 2.8 * len(panels)), squeeze=False, layout="constrained")
    for axis, (mode, routing) in zip(axes[:, 0], panels, strict=True):
        shown = [r for r in rows if (r["mode"], r["routing"]) == (mode, routing) and r["name"] != "dense"]
        sizes = list(dict.fromkeys(f"B {r['B']}\nE {r['E']}\nD {r['D']}" for r in shown))
        names = list(dict.fromkeys(r["name"] for r in shown))
        for place, name in enumerate(names):
            ratios = [r["ratio"] for r in shown if r["name"] == name]
            left = np.arange(len(ratios)) + (place - (len(names) - 1) / 2) * 0.8 / len(names)
            axis.bar(left, ratios, 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(sizes)), sizes, fontsize=7)
        axis.set_ylabel("time over dense MLP")
        axis.set_title(f"{mode}, {routing} routing", loc="left", fontsize=10)
        axis.margins(y=0.3)  # room for the legend
        axis.legend(fontsize=7, ncols=3, loc="upper right")
    with writes_to(path), atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", metadata=PICTURE_TEXT)
    plt.close(figure)


def bench_step(batch: int, num_experts: int, width: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows (name, B, E, D, seconds, ratio to dense) for 224 px, patch 16, 12 blocks, experts in blocks 9 and 11."""
    keep_freed_memory()
    torch.manual_seed(0)
    shape, decoder = ViTShape(224, 16, width, 12, width // 64), DecoderShape(width, 2, width // 64)
    experts = ExpertShape(num_experts, (9, 11))
    share_M = torch.full((_CLUSTERS,), 1 / _CLUSTERS)
    embeddings_MC = nn.functional.normalize(torch.randn(_CLUSTERS, width), dim=1)

    def make_layer(make_expert: Any, count: int, shared: bool) -> nn.Module:
        return ClusterMoE(make_expert, count, ep_size=1, shared=shared)

    weights = LossWeights(imbalance=0.01, balance=0.1)
    dense = MaskedAutoencoder(shape, decoder, 0.75).to(device)
    moce = Moce(shape, decoder, 0.75, experts, embeddings_MC, share_M, make_layer, weights).to(device)
    images_BCHW = torch.randn(batch, 3, 224, 224, device=device)
    noise_BN = torch.rand(batch, shape.num_patches, device=device)
    clusters_B = np.random.default_rng(0).integers(_CLUSTERS, size=batch)

    def dense_step() -> None:
        dense.zero_grad(set_to_none=True)
        dense(images_BCHW, noise_BN).loss.backward()

    def moce_step() -> None:
        # Includes what MoCE adds to a step: the copy of the table to the host, the plan, the all-to-all, gate losses.
        moce.zero_grad(set_to_none=True)
        expert_MLK = chosen_experts(moce.gate(), 1).cpu().numpy()
        plan = make_plan(clusters_B[None], expert_MLK, default_placement(2, num_experts), 0, 1).to(device)
        moce(images_BCHW, noise_BN, Routing(torch.from_numpy(clusters_B).to(device), plan, None)).loss.backward()

    seconds = interleaved({"dense MAE": dense_step, "MoCE": moce_step}, repeats)
    return [
        {"name": name, "B": batch, "E": num_experts, "D": width, "seconds": s, "ratio": s / seconds["dense MAE"]}
        for name, s in seconds.items()
    ]
