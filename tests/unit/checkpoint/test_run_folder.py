"""A run folder: what its settings and checkpoints say. `tests/test_every_harm.py` harms each of its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moce_ds.checkpoint.format import Checkpoint, step_folder
from moce_ds.checkpoint.run_folder import CONFIG, RunFolder
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.metrics_file import METRICS
from tests.examples.artefacts import STEPS


@pytest.mark.parametrize("written", ["a$$b/shards", "a$b/shards"])  # an earlier version wrote paths as they are
def test_a_shard_set_whose_name_has_a_dollar(written: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{}}\ndata: {{shards: {written}}}\n")
    assert RunFolder.open(tmp_path).shards == Path("a$b/shards")


@pytest.mark.parametrize("content", ["", "model: {}", "data: [1]", "data: {shards: a}"])
def test_a_file_that_holds_no_settings_of_a_run(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ArtefactError, match=r"config\.yaml holds no settings"):
        _ = RunFolder.open(tmp_path).config


@pytest.mark.parametrize(("data", "tuning"), [("{encoder: a, train: b}", True), ("{shards: a}", False)])
def test_a_tuning_run_is_told_by_its_encoder(data: str, tuning: bool, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(f"model: {{}}\ndata: {data}\n")
    assert RunFolder.open(tmp_path).is_tuning is tuning


def test_a_series_has_the_steps_at_which_a_value_is_recorded_and_finite(tmp_path: Path) -> None:
    records = [{"step": 1, "layers": {"3": 0.5}}, {"step": 2}, {"step": 3, "layers": {"3": None}}]
    records += [{"step": 4, "layers": {"3": float("inf")}}, {"step": 5, "layers": {"3": 0.25}}]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    found = RunFolder.open(tmp_path).series("layers", "3")
    np.testing.assert_array_equal(found.steps_P, [1, 5])
    np.testing.assert_array_equal(found.mean_P, [0.5, 0.25])
    assert [len(part) for part in RunFolder.open(tmp_path).series("loss")] == [0, 0, 0, 0]


def test_a_run_whose_newest_checkpoint_is_damaged_or_missing_still_says_what_it_was_made_from(
    artefacts: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(artefacts["dense run"], tmp_path / "run")
    (step_folder(run, STEPS) / "manifest.json").write_text("{")
    assert RunFolder.open(run).made_from == {"config": RunFolder.open(run).config}
    shutil.copytree(artefacts["checkpoint"], step_folder(run, STEPS - 1))
    assert RunFolder.open(run).made_from == Checkpoint.open(artefacts["checkpoint"]).made_from
