"""`moce bench gpu` on real devices, at a tiny size: every part runs, and counts what a CPU cannot count."""

from pathlib import Path

import pytest
import torch

from moce_ds.bench.gpu import GpuModel, GpuSizes, bench_gpu
from moce_ds.models.settings import ModelSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

TINY = ModelSettings(
    vit="vit_tiny_patch16_224", patch_size=32, width=64, depth=4, heads=2, decoder_width=64, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


def test_all_parts(tmp_path: Path) -> None:
    sizes = GpuSizes((GpuModel("tiny", TINY),), batch=4, experts=2, threads=2, repeats=1, images=16)
    rows = bench_gpu(sizes, torch.cuda.device_count(), tmp_path)
    assert {row["part"] for row in rows} == {"layer", "step", "checkpoint", "loading"}
    steps = [row for row in rows if row["part"] == "step"]
    assert len(steps) == 5 * min(2, torch.cuda.device_count())
    assert all(row["ratio"] > 0 and row["peak_mb"] > 0 for row in steps), "every model fits, and its memory is seen"
    waits = {row["name"]: row["host_waits"] for row in steps}
    assert waits["dense MAE"] == 0, "an optimizer step never waits"
    assert waits["MoCE"] <= 1, "only for the route table"
    assert waits["TokenMoE, no drop"] > waits["MoCE"], "what waits is counted"
