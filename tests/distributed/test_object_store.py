"""A run that reads blocks from an object store, is killed, and goes on with another number of processes."""

import signal
import sys
from pathlib import Path

from harness import run_distributed
from jobs import Job, run_jobs
from launching import launched, local, ranks_of, run_to_end, send, wait_for_step
from tiny_run import STEPS, TinyData, assert_same, tiny_settings

from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.attach import attach
from tests.examples.object_store import object_store

IN_BLOCKS = ("data.order=blocks", "data.shuffle_window=40", "run.checkpoint_every=2")


def test_a_killed_run_over_blocks_of_a_store_reads_the_same_batches(
    tiny_data: TinyData, runs: Path, tmp_path: Path
) -> None:
    """As a run of one process on the folder itself, without a cache and without a kill."""
    words = tiny_settings(tiny_data.shards, runs / "blocks", *IN_BLOCKS, clusters=tiny_data.clusters)
    run_distributed(run_jobs, 1, {"blocks": Job(words)})
    with object_store() as bucket:
        attach(bucket.upload(tiny_data.shards, "set"), tmp_path / "set")
        words = tiny_settings(
            tmp_path / "set", runs / "blocks-store", *IN_BLOCKS, f"data.cache={tmp_path / 'cache'}",
            clusters=tiny_data.clusters,
        )  # fmt: skip
        with launched(*local(2), "pretrain", *words, "experts.ep_size=2") as launcher:
            wait_for_step(runs / "blocks-store", 5)
            send(signal.SIGKILL, *ranks_of(launcher).values())
        status, output = run_to_end(sys.executable, "-m", "moce_ds", "pretrain", *words)
    assert status == 0, output
    attempts = [record["attempt"] for record in read_metrics(runs / "blocks-store" / "metrics.jsonl")]
    assert len(attempts) == STEPS and attempts[0] == 1 and attempts[-1] == 2, "it was killed before its end"
    assert_same(runs, "blocks", "blocks-store")
    assert len([file for file in (tmp_path / "cache").glob("moce-cache-*/*") if file.name.isdecimal()]) == 3
