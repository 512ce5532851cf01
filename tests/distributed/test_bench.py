"""`moce bench`: every measurement runs, small, and its rows say what they are asked to."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from moce_ds.main import moce


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
