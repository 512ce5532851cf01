"""`moce bench load` runs all of its cases; what they measure depends on the machine."""

import torch

from moce_ds.bench.load import bench_load


def test_all_cases_read_all_images() -> None:
    rows = bench_load(10, 1, 1, torch.device("cpu"))
    assert [row["name"] for row in rows] == ["PIL + torchvision", "PyTorch DataLoader", "DALI's file reader", "moce_ds"]
    assert all(row["images"] == 10 and row["images_per_second"] > 0 for row in rows)
    assert [row["wait_ms"] is None for row in rows] == [True, True, True, False]
