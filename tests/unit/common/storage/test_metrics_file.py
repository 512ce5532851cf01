"""`metrics.jsonl`: which of several records of one step counts. `tests/test_every_harm.py` harms its lines."""

import json
from pathlib import Path

from moce_ds.common.storage.metrics_file import read_metrics


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}, {"step": 3, "loss": 0.8}, {"step": 2, "loss": 0.7}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.7}, {"step": 3, "loss": 0.8}]
