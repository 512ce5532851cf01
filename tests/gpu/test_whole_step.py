"""In a whole optimizer step (forward pass, backward pass, update) nothing makes the host wait for the device.

PyTorch raises where it would: reads of tensors, copies that block. Events are not among them: the route table is waited
for by an event, which has arrived long before. `test_bench_gpu.py` counts those, too.
"""

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from moce_ds.bench.gpu import Arch, GpuModel, GpuSizes, make_step
from moce_ds.bench.timing import in_processes
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.settings import ModelSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

TINY = ModelSettings(
    vit="vit_tiny_patch16_224", patch_size=32, width=64, depth=4, heads=2, decoder_width=64, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip
SIZES = GpuSizes((), batch=8, experts=4, threads=1, repeats=1)


def step_without_waiting(arch: Arch, ep_size: int, runtime: Runtime) -> str:
    """Take some steps, the last one in the mode in which waiting is an error; returns the device."""
    step = make_step(SIZES, GpuModel("tiny", TINY), ep_size, runtime, arch)
    for _ in range(3):  # libraries set themselves up
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return str(runtime.device)


@pytest.mark.parametrize("arch", ["mae", "moce"])
def test_one_gpu(arch: Arch) -> None:
    assert in_processes(step_without_waiting, 1, arch, 1) == "cuda:0"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("arch", "ep_size"), [("mae", 1), ("moce", 1), ("moce", 2)])
def test_two_gpus(arch: Arch, ep_size: int) -> None:
    assert in_processes(step_without_waiting, 2, arch, ep_size) == "cuda:0"


def test_the_baseline_waits() -> None:
    """TokenMoE's stock dispatch reads its largest load on the host: the mode above does find what waits."""
    with pytest.raises(ProcessRaisedException, match="synchronizing CUDA operation"):
        in_processes(step_without_waiting, 1, "token_moe", 1)
