"""`moce bench`: every measurement runs, small, and its rows say what they are asked to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from moce_ds.bench.gpu import GpuModel, GpuSizes, bench_gpu
from moce_ds.bench.peers import PeerSize, bench_peers
from moce_ds.cli.main import moce
from moce_ds.common.errors import DataError
from moce_ds.models.settings import ModelSettings


def rows_of(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The rows that `moce bench WORDS` writes."""
    file = folder / "rows.json"
    result = CliRunner().invoke(moce, ["bench", *words, "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["machine"]["cores"]
    return content["rows"]


def test_layer(tmp_path: Path) -> None:
    size = ("--batch", "4", "--experts", "2", "--width", "64", "--repeats", "1", "--starts", "1")
    rows = rows_of(tmp_path, "layer", *size, "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert {(row["mode"], row["routing"]) for row in rows} == {
        (mode, routing) for mode in ("1 process", "ep 2") for routing in ("uniform", "skewed")
    }
    for row in rows:
        assert list(row)[:3] == ["name", "mode", "routing"] and (row["B"], row["E"], row["D"]) == (4, 2, 64)
        assert row["ratios"] == [row["ratio"]]
        assert row["peak_mb"] > 0
        if row["name"] == "dense":
            assert row["ratio"] == 1 and row["bytes"] == 0
        if row["name"].startswith("ours"):
            assert (row["dropped"], row["host_waits"]) == (0, 0), "nothing is dropped, and nobody waits"


def test_step(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "step", "--batch", "2", "--experts", "2", "--width", "64", "--repeats", "1")
    assert rows and all(row["ratio"] > 0 for row in rows)


def test_load(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "load", "--images", "8", "--repeats", "1")


def test_checkpoint(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "checkpoint", "--vit", "vit_tiny_patch16_224", "--folder", str(tmp_path), "--repeats", "1")
    assert rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "what was written to measure is gone"


def test_checkpoint_with_several_processes(tmp_path: Path) -> None:
    words = ("--vit", "vit_tiny_patch16_224", "--processes", "1,2", "--folder", str(tmp_path), "--repeats", "1")
    alone, both = rows_of(tmp_path, "checkpoint", *words)
    assert (alone["processes"], both["processes"]) == (1, 2) and alone["GB"] == both["GB"]
    assert alone["collectives"] == 0 < both["collectives"] < 10, "moments travel in buckets"
    assert alone["all read"] == both["all read"] == 1, "each byte is read once"
    assert alone["read GB"] == alone["GB"] and both["read GB"] < 0.7 * both["GB"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "what was written to measure is gone"


def test_checkpoint_refuses_processes_that_cannot_share_the_experts() -> None:
    result = CliRunner().invoke(moce, ["bench", "checkpoint", "--processes", "2,3"])
    assert "--processes: 3 does not divide the 8 experts of a layer." in str(result.exception)


TINY = {"patch_size": 8, "width": 16, "depth": 3, "heads": 2}
TINY |= {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
PEERS = PeerSize("tiny", TINY, {"num": 2}, 16, (48, 32), 40, (0.5, 1.0), True, batch=4, warmup=1, steps=2, log_every=1)


def test_peers() -> None:
    rows = bench_peers([PEERS], None, workers=1, repeats=1)
    assert [row["name"] for row in rows] == ["plain PyTorch", "moce pretrain, dense", "moce pretrain, MoCE"]
    assert rows[0]["ratio"] == 1 and all(row["ratio"] > 0 for row in rows)
    assert all(row["rates"] == [row["images_per_second"]] for row in rows)


def test_peers_need_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no image file"):
        bench_peers([PEERS], tmp_path, workers=1, repeats=1)


def test_gpu_measures_everything(tmp_path: Path) -> None:
    """The same code as on GPUs, at a size for two processes of a CPU."""
    settings = ModelSettings(**(TINY | {"vit": "vit_tiny_patch16_224", "patch_size": 32}))
    sizes = GpuSizes((GpuModel("tiny", settings),), batch=2, experts=2, threads=1, repeats=1, images=8)
    rows = bench_gpu(sizes, processes=3, folder=tmp_path)
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"
    steps = {(row["mode"], row["name"]) for row in rows if row["part"] == "step"}
    models = ("dense MAE", "MoCE", "stock DeepSpeed, no drop", "stock DeepSpeed, capacity 1.25", "TokenMoE, no drop")
    assert steps == {(mode, name) for mode in ("ep 1 of 2", "ep 2 of 2") for name in models}
    assert all(row["ratio"] > 0 and row["images_per_second"] > 0 for row in rows if row["part"] == "step")
    assert {row["mode"] for row in rows if row["part"] == "layer"} == {"1 process", "ep 2"}
    assert {row["name"] for row in rows if row["part"] == "checkpoint"} == {"save", "pause", "delay"}
    assert any(row["part"] == "loading" and row["images_per_second"] > 0 for row in rows)
    assert not list(tmp_path.iterdir()), "what was written to measure is gone"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_refuses_a_machine_without_one() -> None:
    result = CliRunner().invoke(moce, ["bench", "gpu"])
    assert "torch sees no CUDA device" in str(result.exception)
