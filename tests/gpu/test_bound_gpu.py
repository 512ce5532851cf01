"""A task that SLURM has bound to one GPU computes on it, whatever its rank on the machine; DeepSpeed does too."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

RANK_3 = """
import os
import deepspeed
import torch
from moce_ds.distributed.runtime import started

with started() as runtime:
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(2, 2), config=config, dist_init_required=False)
    print(runtime.local_rank, runtime.device, engine.device, torch.cuda.current_device())
print(os.environ["LOCAL_RANK"])
"""


def test_local_rank_3_with_one_visible_gpu() -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    bound = {"LOCAL_RANK": "3", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(
        [sys.executable, "-c", RANK_3], env={**os.environ, **bound}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["3 cuda:0 cuda:0 0", "3"], done.stdout
