"""`moce bench checkpoint --processes 2,4,8`: what saving and resuming cost with several processes.

The state is that of a MoCE whose experts are distributed over all processes (`ep_size` is their number): to save, the
parts of Adam's moments that ZeRO has distributed are collected; to resume, each file is read by one process. All
processes share the cores and the disk of this machine, so times are compared with those of the raw disk and of a save.
"""

import os
from pathlib import Path
from typing import Any

from moce_ds.bench.checkpoint import CheckpointRounds, training_step
from moce_ds.bench.timing import collectives, in_processes
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.common.storage.drafts import scratch_folder
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.settings import ExpertSettings, ModelSettings
from moce_ds.training.settings import PretrainRunSettings

EXPERTS = 8
"""Experts of a layer; the numbers of processes must divide it."""


def bench_exchange(vit: str, counts: list[int], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """A row for each number of processes, which run on this machine.

    Columns: processes; GB of the checkpoint; collectives in a save; seconds of a save, of the pause that it makes in
    training, and of a load, always those of the slowest process; `ratio`, the speed of a save relative to a raw write
    by one process; `share`, the pause relative to a save; `per save`, a load relative to a save; the most GB that one
    process reads to resume; and `all read`, the bytes that all of them read relative to those of the checkpoint.

    Args:
        vit: the encoder, by timm's name; its decoder has two blocks, since many processes on one machine compute.
        folder: on the disk to measure; everything written there is removed again.
    """
    os.environ["KINETO_LOG_LEVEL"] = "99"  # silences the profiler in the processes
    rows = []
    for count in counts:
        with scratch_folder(folder) as scratch:
            rows.append(in_processes(_measure, count, vit, str(scratch), repeats))
    return rows


def _measure(vit: str, scratch: str, repeats: int, runtime: Runtime) -> dict[str, Any]:
    run = PretrainRunSettings(out=Path(scratch) / "run", keep_checkpoints=1)
    model = ModelSettings(arch="moce", vit=vit, decoder_depth=2)
    step = training_step(model, ExpertSettings(num=EXPERTS, ep_size=runtime.world_size), runtime)
    bench = CheckpointRounds(step, run.out, runtime)
    with CheckpointManager(step.engine, run, RunLease.claim(run.out, runtime), runtime) as saver:
        for turn in range(repeats + 1):  # the first warms up
            bench.round(saver, 2 * turn + 1)
        count = collectives(lambda: bench.save(saver, 2 * repeats + 3))
    seconds = bench.medians()
    most, total = runtime.max([float(bench.read)])[0], runtime.sum([float(bench.read)])[0]
    return {
        "processes": runtime.world_size,
        "GB": bench.size / 1e9,
        "collectives": count,
        "save": seconds["save"],
        "ratio": seconds["raw write"] / seconds["save"],
        "pause": seconds["pause"],
        "share": seconds["pause"] / seconds["save"],
        "load": seconds["load"],
        "per save": seconds["load"] / seconds["save"],
        "read GB": most / 1e9,
        "all read": total / bench.size,
    }
