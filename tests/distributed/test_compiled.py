"""Compiled dense blocks (`engine.compile`) train as uncompiled ones do, to rounding, and resume from the same files."""

import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from harness import run_distributed
from jobs import Job, Told, run_job
from tiny_run import STEPS, TinyData, comparable, final_state, losses, tiny_settings
from torch._dynamo.utils import counters

from moce_ds.checkpoint.format import find
from moce_ds.distributed.runtime import started

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
HEADER = Path(sysconfig.get_path("include")) / "Python.h"


def run_and_count(jobs: dict[str, Job]) -> dict[str, tuple[Told, int]]:
    """What each job told, and how many graphs torch compiled for it. A rank's work."""
    with started() as runtime:
        counted = {}
        for name, job in jobs.items():
            before = counters["stats"]["unique_graphs"]
            told = run_job(job, runtime)
            counted[name] = told, counters["stats"]["unique_graphs"] - before
        return counted


@pytest.mark.skipif(
    not (COMPILER and HEADER.exists()), reason="torch.compile needs a C++ compiler and the headers of Python on a CPU"
)
def test_compiled_blocks_train_and_resume_as_others_do(tiny_data: TinyData, tmp_path: Path) -> None:
    def words(name: str, *other: str) -> list[str]:
        return tiny_settings(tiny_data.shards, tmp_path / name, *other, clusters=tiny_data.clusters)

    jobs = {
        "plain": Job(words("plain")),
        "compiled": Job(words("compiled", "engine.compile=true")),
        "stopped": Job(words("resumed", "engine.compile=true"), stop_after=3),
        "resumed": Job(words("resumed", "engine.compile=false")),
    }
    (found_jobs,) = run_distributed(run_and_count, 1, jobs)
    told, graphs = ({name: pair[number] for name, pair in found_jobs.items()} for number in (0, 1))
    assert 3 <= told["stopped"].steps < STEPS == told["compiled"].steps == told["resumed"].steps
    assert graphs["plain"] == 0 < graphs["compiled"], graphs  # the later jobs of this process reuse the code
    expected = comparable(final_state(tmp_path / "plain"))
    for name in ("compiled", "resumed"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "plain"), rtol=0, atol=1e-5)
        found = comparable(final_state(tmp_path / name))
        assert found.keys() == expected.keys()
        assert find(tmp_path / name).manifest["files"].keys() == find(tmp_path / "plain").manifest["files"].keys()
        worst = max((float((found[n] - t).abs().max()), n) for n, t in expected.items())
        assert worst[0] <= 1e-5, worst
