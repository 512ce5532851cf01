"""The memory that an export takes does not grow with the number of experts."""

from pathlib import Path

import pytest

from moce_ds.models.mae import DecoderShape
from moce_ds.models.vit import ViTShape
from tests.synthetic_run import export_memory, synthetic_spec, write_run

SHAPE = ViTShape(32, 8, 384, 4, 4)
LAYERS = (1, 3)
EXPERT = (2 * 384 * 1536 + 384 + 1536) * 4 / 2**20  # MiB


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of 2 and of 32 experts a layer: nearly 300 MiB more."""
    folder = tmp_path_factory.mktemp("synthetic")
    decoder = DecoderShape(64, 1, 2)
    found = {}
    for experts in (2, 32):
        (folder / str(experts)).mkdir()
        found[experts] = write_run(folder / str(experts), synthetic_spec(SHAPE, experts, LAYERS, decoder))
    return found


def test_more_experts_take_no_more_memory(runs: dict[int, Path], tmp_path: Path) -> None:
    """An average reads them all."""
    few, many = (export_memory(runs[e], tmp_path / str(e), average="weighted")["peak"] for e in (2, 32))
    more_on_disk = 30 * len(LAYERS) * EXPERT
    assert more_on_disk > 250 and many - few < 4 * EXPERT, (few, many)
