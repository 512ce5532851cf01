"""The memory that an export takes grows with the dense model, and not with the number of experts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moce_ds.models.mae import DecoderShape
from moce_ds.models.vit import ViTShape
from tests.examples.synthetic_run import export_memory, synthetic_spec, write_run

SHAPE, LARGER = ViTShape(32, 8, 384, 4, 4), ViTShape(32, 8, 768, 6, 12)
DECODER = DecoderShape(64, 1, 2)
LAYERS = (1, 3)
EXPERT = (2 * 384 * 1536 + 384 + 1536) * 4 / 2**20  # MiB


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of 2 and of 32 experts a layer: nearly 300 MiB more."""
    folder = tmp_path_factory.mktemp("synthetic")
    found = {}
    for experts in (2, 32):
        (folder / str(experts)).mkdir()
        found[experts] = write_run(folder / str(experts), synthetic_spec(SHAPE, experts, LAYERS, DECODER))
    return found


@pytest.fixture(scope="module")
def larger_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 experts a layer; its dense model takes 135 MiB more."""
    return write_run(tmp_path_factory.mktemp("larger"), synthetic_spec(LARGER, 2, LAYERS, DECODER))


def test_more_experts_take_no_more_memory(runs: dict[int, Path], tmp_path: Path) -> None:
    """An average reads them all."""
    assert 30 * len(LAYERS) * EXPERT > 250, "MiB more on disk"
    differences = _differences(runs[2], runs[32], tmp_path, average="weighted")
    assert any(difference < 4 * EXPERT for difference in differences)


@pytest.mark.parametrize("format", ["timm", "onnx"])
def test_a_larger_model_takes_itself_once(runs: dict[int, Path], larger_run: Path, tmp_path: Path, format: str) -> None:
    """Loaded back included. The difference between two sizes leaves out what the format's libraries take."""
    differences = _differences(runs[2], larger_run, tmp_path, format)
    assert any(difference < 1.5 * (_dense(LARGER) - _dense(SHAPE)) for difference in differences)


def _differences(small: Path, large: Path, out: Path, format: str = "timm", average: str = "") -> Iterator[float]:
    """MiB that the export of the larger run takes more, measured up to three times.

    By chance the allocator keeps up to some hundred MiB that were freed; what an export needs, it takes each time.
    """
    for attempt in range(3):
        low, high = (
            export_memory(run, out / f"{run.name}-{attempt}", format, average)["peak"] for run in (small, large)
        )
        yield high - low


def _dense(shape: ViTShape) -> float:
    """MiB of the blocks, which are nearly all of it."""
    return shape.depth * 12 * shape.width**2 * 4 / 2**20
