"""The thread that writes checkpoints uses the GPU of its process: a context on another one costs half a gigabyte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

LOCAL_RANK_1 = """
import sys
from pathlib import Path
import torch
from moce_ds.bench.checkpoint import bench_checkpoint
from moce_ds.distributed.runtime import started
from moce_ds.models.settings import ModelSettings

model = ModelSettings(vit="vit_tiny_patch16_224", width=64, depth=2, heads=2, decoder_width=64, decoder_depth=1)
with started() as runtime:
    rows = bench_checkpoint(model, Path(sys.argv[1]), 1, runtime)
    contexts = [torch._C._cuda_hasPrimaryContext(index) for index in range(2)]
print(runtime.device, *contexts)
"""


def test_no_context_on_the_gpu_of_another_rank(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCAL_RANK_1, str(tmp_path)],
        env={**os.environ, "LOCAL_RANK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "cuda:1 False True", done.stdout
