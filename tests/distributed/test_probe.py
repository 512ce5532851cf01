"""`moce probe method=sgd` in several processes measures what one process measures."""

import json
import sys
from pathlib import Path

import pytest
from launching import local, run_to_end

PROBE = ("method=sgd", "sgd.epochs=3", "sgd.batch_size=16", "batch_size=7", "l2=[0.1,0.001]", "threads=1")


@pytest.fixture
def options(tiny_encoder: Path, tiny_images: Path) -> list[str]:
    images = str(tiny_images)
    return [str(tiny_encoder), "--train", images, "--test", images, "--task", "tiny"]


def test_three_processes_measure_what_one_measures(options: list[str], tmp_path: Path) -> None:
    records = []
    for processes in (1, 3):
        start = local(processes) if processes > 1 else (sys.executable, "-m", "moce_ds")
        results = tmp_path / f"{processes}.json"
        status, output = run_to_end(*start, "probe", *options, *PROBE, "--results", str(results))
        assert status == 0, output
        assert output.count("probe tiny") == 1, "one process reports"
        records.append(json.loads(results.read_text()))
    assert records[0] == records[1]


def test_what_cannot_be_shared_is_refused(options: list[str]) -> None:
    for words in (["knn", *options], ["probe", *options]):
        status, output = run_to_end(*local(2), *words)
        assert status and "runs in one; with method=sgd, `moce probe` shares its work" in output
