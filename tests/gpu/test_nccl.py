"""Two GPUs with NCCL train as two processes on a CPU with gloo, in bf16."""

import subprocess
from pathlib import Path

import pytest
import torch
from launching import local
from tiny_run import STEPS, losses, tiny_settings, write_data

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("ep_size", [1, 2])
def test_losses_equal_those_of_gloo(ep_size: int, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    found = {}
    for device in ("auto", "cpu"):
        run = tmp_path / device
        words = tiny_settings(
            data.shards,
            run,
            "engine.precision=bf16",
            f"engine.device={device}",
            f"experts.ep_size={ep_size}",
            clusters=data.clusters,
        )
        done = subprocess.run([*local(2), "pretrain", *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found[device] = losses(run)
    assert len(found["auto"]) == STEPS
    assert found["auto"] == pytest.approx(found["cpu"], rel=1e-3)
