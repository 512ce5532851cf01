"""Pre-training gives the same losses and weights whatever the processes, ep_size, accumulation, ZeRO stage or stops.

The runs are made by the fixtures `one_process` and `two_processes`; the tests compare what they left on disk.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Told
from tiny_run import EXPERT_LAYERS, STEPS, TOLERANCE, TinyData, assert_same, final_state, losses, tiny_settings

from moce_ds.checkpoint.format import Checkpoint, find, step_folder, steps_of
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.shards import ShardSet
from moce_ds.training.engine import deepspeed_config
from moce_ds.training.pretrain import pretrain
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import PretrainSettings
from tests.examples.alone import ALONE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("one-mae", "two-mae"),
        ("one-mae", "one-mae-accumulated"),
        ("two-mae", "two-mae-accumulated"),
        ("two-mae", "two-mae-zero2"),
        ("one-moce", "two-moce-ep1"),
        ("one-moce", "two-moce-ep2"),  # loader_locality is on
        ("one-moce", "two-moce-plain"),
        ("one-moce", "two-moce-zero2"),
        ("one-moce", "two-moce-both"),
    ],
)
def test_the_result_does_not_depend_on(runs: Path, one_process: object, first: str, second: str) -> None:
    assert_same(runs, first, second)


def test_the_runs_exercise_what_they_are_for(runs: Path, one_process: object) -> None:
    for name in ("one-mae", "one-moce"):
        records = read_metrics(runs / name / "metrics.jsonl")
        assert all(record["grad_norm"] > 0.5 for record in records), "clipping must be active"
        first_moments = [moment for key, moment in final_state(runs / name).items() if key.endswith(".exp_avg")]
        assert 0.1 < sum(float(moment.square().sum()) for moment in first_moments) ** 0.5 <= 0.5, (
            "and cut what it should"
        )
        assert records[-1]["loss"] < records[0]["loss"] - 0.05, "the model must learn"
    layers = [record["layers"] for record in read_metrics(runs / "one-moce" / "metrics.jsonl")]
    for block in map(str, EXPERT_LAYERS):
        load_SE = np.array([layer[block]["load"] for layer in layers])
        assert (load_SE.sum(axis=0) > 0).all(), "every expert must get images"
        assert (load_SE == 0).any(), "and some steps leave one without"
    assert max(abs(a - b) for a, b in itertools.pairwise(losses(runs / "one-mae"))) > 100 * TOLERANCE


def test_locality_moves_fewer_images_and_says_so(runs: Path, two_processes: object) -> None:
    moved = {
        name: np.mean([record["moved"] for record in read_metrics(runs / name / "metrics.jsonl")])
        for name in ("two-moce-ep1", "two-moce-plain", "two-moce-ep2")
    }
    assert moved["two-moce-ep1"] == 0
    assert 0.3 < moved["two-moce-plain"] < 0.7
    assert moved["two-moce-ep2"] < 0.85 * moved["two-moce-plain"]


@pytest.mark.parametrize("name", ["one-moce-bf16", "two-moce-bf16", "two-moce-bf16-zero2"])
def test_bf16_stays_near_fp32(runs: Path, one_process: object, name: str) -> None:
    fp32, bf16 = losses(runs / "one-moce"), losses(runs / name)
    assert fp32 != bf16
    np.testing.assert_allclose(bf16, fp32, rtol=5e-3)
    np.testing.assert_allclose(bf16, losses(runs / "one-moce-bf16"), rtol=5e-3)
    assert all(tensor.dtype == torch.float32 for tensor in final_state(runs / name).values())


STOPPED = ["mae-stopped", "SIGTERM", "SIGUSR1", "SIGUSR2", "time-is-up"]


@pytest.mark.parametrize("name", [*(f"two-{name}" for name in STOPPED), "mae-then-one", "moce-then-one"])
def test_what_stops_one_rank_stops_all_with_a_checkpoint(runs: Path, two_processes: dict[str, Told], name: str) -> None:
    """The fixture `two_processes` asserts that both ranks stop at the same step."""
    told = two_processes[name]
    assert 1 <= told.steps < STEPS
    if name.startswith("two-") and name != "two-mae-stopped":  # which has gone on since
        assert steps_of(runs / name) == [told.steps] and find(runs / name).faults() == []
    assert f"Stopped after step {told.steps} as asked. Rerun the same command to resume." in told.text


@pytest.mark.parametrize(
    ("uninterrupted", "stopped", "resumed", "run"),
    [
        ("two-mae", "two-mae-stopped", "two-mae-resumed", "two-mae-stopped"),
        ("two-moce-ep2", "two-moce-resumed-stopped", "two-moce-resumed", "two-moce-resumed"),
        ("two-moce-bf16", "two-moce-bf16-resumed-stopped", "two-moce-bf16-resumed", "two-moce-bf16-resumed"),
    ],
)
def test_resuming_on_the_same_topology_is_exact(
    runs: Path, two_processes: dict[str, Told], uninterrupted: str, stopped: str, resumed: str, run: str
) -> None:
    assert 3 <= two_processes[stopped].steps < STEPS == two_processes[resumed].steps
    assert f"after step {two_processes[stopped].steps}." in two_processes[resumed].text
    assert_same(runs, uninterrupted, run, tolerance=0)


def test_checkpoints_written_in_the_background_are_those_written_at_once(runs: Path, two_processes: object) -> None:
    """Whether stopped in between or not."""
    for step in steps_of(runs / "two-moce-resumed"):
        files = [
            Checkpoint.open(step_folder(runs / name, step)).manifest["files"]
            for name in ("two-moce-resumed", "two-moce-synchronous")
        ]
        assert files[0] == files[1]
    assert find(runs / "two-moce-ep2").manifest["files"] == find(runs / "two-moce-synchronous").manifest["files"]


def test_the_newest_checkpoints_and_milestones_are_kept(runs: Path, two_processes: object) -> None:
    for name in ("two-moce-resumed", "two-moce-synchronous"):
        assert steps_of(runs / name) == [4, 8, STEPS - 1, STEPS]
        assert all(Checkpoint.open(step_folder(runs / name, step)).faults() == [] for step in steps_of(runs / name))
        assert {path.name[:5] for path in (runs / name / "checkpoints").iterdir()} == {"step-"}


@pytest.mark.parametrize(("uninterrupted", "resumed"), [("one-mae", "mae-then-one"), ("one-moce", "moce-then-one")])
def test_resuming_on_another_topology(
    runs: Path, one_process: dict[str, Told], uninterrupted: str, resumed: str
) -> None:
    assert one_process[resumed].steps == STEPS and "Resuming" in one_process[resumed].text
    assert_same(runs, uninterrupted, resumed)


def test_a_checkpoint_says_what_it_is(runs: Path, two_processes: object, tiny_data: TinyData) -> None:
    assert steps_of(runs / "two-moce-ep2") == [STEPS]
    manifest = find(runs / "two-moce-ep2").manifest
    assert manifest["images_read"] == STEPS * 16
    assert manifest["shards_fingerprint"] == ShardSet.open(tiny_data.shards).fingerprint
    files = [f"block-{block:02d}" for block in range(4)] + ["decoder-block-00", "shared"]
    files += [f"block-{block:02d}-expert-{expert:03d}" for block in EXPERT_LAYERS for expert in range(4)]
    expected = {f"{part}/{file}.safetensors" for part in ("weights", "optimizer") for file in files}
    assert set(manifest["files"]) == expected | {"routing.safetensors"}
    assert find(runs / "two-moce-ep2").faults() == []


def test_a_damaged_image_is_replaced_and_named(
    runs: Path, two_processes: dict[str, Told], damaged_shards: Path
) -> None:
    records = read_metrics(runs / "two-damaged" / "metrics.jsonl")
    assert [record["images_replaced"] for record in records] == [0, 1, 1]
    image = (damaged_shards / "image.txt").read_text()
    assert (
        "1 damaged image was replaced:" in two_processes["two-damaged"].text
        and image in two_processes["two-damaged"].text
    )


def test_deepspeed_is_told_what_was_set(tmp_path: Path) -> None:
    words = ("engine.zero_stage=2", "engine.precision=bf16", "optim.accumulation=2", "optim.clip=0.25")
    config = read_settings(PretrainSettings, tiny_settings(tmp_path, tmp_path, *words))
    told = deepspeed_config(config.optim, config.engine, batch_arithmetic(config.optim, world_size=2))
    assert told["zero_optimization"]["stage"] == 2 and told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert (told["gradient_accumulation_steps"], told["train_micro_batch_size_per_gpu"]) == (2, 4)
    assert told["gradient_clipping"] == 0.25


def test_a_complete_run_says_so(
    runs: Path, two_processes: object, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (runs / "two-mae" / "metrics.jsonl").read_bytes()
    config = read_settings(PretrainSettings, tiny_settings(tiny_data.shards, runs / "two-mae"))
    assert pretrain(config, ALONE) == (STEPS, STEPS)
    assert f"is complete: {STEPS} steps." in capsys.readouterr().err
    assert (runs / "two-mae" / "metrics.jsonl").read_bytes() == before


def test_another_experiment_in_the_same_folder_is_refused(
    runs: Path, two_processes: object, tiny_data: TinyData
) -> None:
    before = (runs / "two-mae" / "config.yaml").read_bytes()
    other = ("optim.epochs=3", "model.mask_ratio=0.5", "run.seed=1", "engine.zero_stage=2")
    config = read_settings(PretrainSettings, tiny_settings(tiny_data.shards, runs / "two-mae", *other))
    with pytest.raises(ConfigError) as refused:
        pretrain(config, ALONE)
    listed = [line.strip() for line in str(refused.value).splitlines()[1:-1]]
    assert listed == ["model.mask_ratio: 0.75 -> 0.5", "optim.epochs: 2.0 -> 3.0", "run.seed: 0 -> 1"]
    assert (runs / "two-mae" / "config.yaml").read_bytes() == before
