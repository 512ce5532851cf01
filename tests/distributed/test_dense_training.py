"""`moce detect` and `moce segment` from first step to last on a miniature set, alone, in two processes, and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from safetensors.torch import load_file

from moce_ds.common.config.settings import load
from moce_ds.common.storage.files import read_json
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.sources.miniature import Material, write_miniature
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.models.vit import ViTShape, save_encoder, timm_vit
from moce_ds.tuning.tune import tune

MODEL = ["model.image_size=32", "model.channels=16", "optim.batch_size=4", "optim.epochs=1", "optim.validate_every=1"]
RUN = ["engine.precision=fp32", "run.log_every=1", "data.workers=0", "optim.base_lr=0.05", "optim.layer_decay=0.9"]
DETECT = ["model.proposals=30", "model.samples=8", "model.least_score=0"]
SEGMENT = ["model.hidden=16", "data.classes=11", "data.scale=[1,1.5]", "model.drop_path=0"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `set` (16 + 3 pictures of 32 pixels) and `encoder`."""
    folder = tmp_path_factory.mktemp("dense")
    write_miniature(folder / "set", Material.from_packages(), side=32, train=16, val=3)
    (folder / "encoder").mkdir()
    torch.manual_seed(0)
    shape = ViTShape(16, 4, 16, 4, 2)
    save_encoder(folder / "encoder", timm_vit(shape).state_dict(), shape, ImageInput(16), {"random": True})
    return folder


def detect(runtime: Runtime, folder: Path, *words: str) -> dict[str, float] | None:
    """One call of `moce detect` into `folder`."""
    from moce_ds.tuning.detection import DetectionTask
    from moce_ds.tuning.settings import DetectSettings

    files = [f"data.{part}={folder.parent}/set/{part}/instances.json" for part in ("train", "val")]
    images = [f"data.{k}={folder.parent}/set/{v}/images" for k, v in (("images", "train"), ("eval_images", "val"))]
    config = settings(DetectSettings, folder, *files, *images, *DETECT, *words)
    return tune(DetectionTask(config.data, config.model, config.optim, config.engine, config.run), config, runtime)


def segment(runtime: Runtime, folder: Path, *words: str) -> dict[str, float] | None:
    """One call of `moce segment`."""
    from moce_ds.tuning.segmentation import SegmentationTask
    from moce_ds.tuning.settings import SegmentSettings

    sets = [f"data.{part}={folder.parent}/set/{part}" for part in ("train", "val")]
    config = settings(SegmentSettings, folder, *sets, *SEGMENT, *words)
    return tune(SegmentationTask(config.data, config.model, config.optim, config.engine, config.run), config, runtime)


def settings(cls: type[Any], folder: Path, *words: str) -> Any:
    return load(cls, None, [f"data.encoder={folder.parent}/encoder", f"run.out={folder}", *MODEL, *RUN, *words])


STOP = "run.max_hours=0.000001"  # so after the first step


def runs_alone(folder: Path) -> dict[str, Any]:
    """All runs of one process."""
    with started() as runtime:
        return {
            "detect": detect(runtime, folder / "detect"),
            "detect-stopped": detect(runtime, folder / "detect-resumed", STOP, "engine.checkpoint_activations=true"),
            "detect-resumed": detect(runtime, folder / "detect-resumed"),
            "frozen": segment(runtime, folder / "frozen", "model.frozen=true"),
            "frozen-stopped": segment(runtime, folder / "frozen-resumed", STOP, "model.frozen=true"),
            "frozen-resumed": segment(runtime, folder / "frozen-resumed", "model.frozen=true"),
            "segment": segment(runtime, folder / "segment"),
            "segment-stopped": segment(runtime, folder / "segment-resumed", STOP),
            "segment-resumed": segment(runtime, folder / "segment-resumed"),
        }


def runs_of_two(folder: Path) -> dict[str, Any]:
    """All runs of two processes."""
    with started() as runtime:
        return {
            "detect": detect(runtime, folder / "two-detect"),
            "segment": segment(runtime, folder / "two-segment"),
        }


@pytest.fixture(scope="module")
def one_process(workplace: Path) -> dict[str, Any]:
    return run_distributed(runs_alone, 1, workplace)[0]


@pytest.fixture(scope="module")
def two_processes(workplace: Path) -> dict[str, Any]:
    first, second = run_distributed(runs_of_two, 2, workplace)
    assert first == second, "processes disagree"
    return first


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("task", ["detect", "segment", "frozen"])
def test_a_resumed_run_is_the_run(workplace: Path, one_process: dict[str, Any], task: str) -> None:
    assert one_process[f"{task}-stopped"] is None and one_process[f"{task}-resumed"] == one_process[task] is not None
    runs = [workplace / task, workplace / f"{task}-resumed"]
    assert len(losses(runs[0])) == 4 and losses(runs[0]) == losses(runs[1])
    weights = [load_file(run / "model.safetensors") for run in runs]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert read_json(runs[1] / "result.json", "a result", "moce")["measures"] == one_process[task]


def test_it_trains_and_measures(workplace: Path, one_process: dict[str, Any]) -> None:
    for task in ("detect", "segment", "frozen"):
        run = losses(workplace / task)
        assert all(0 < loss < 20 for loss in run) and run[-1] < run[0]
    assert {"box_ap", "mask_ap", "box_ap50"} <= set(one_process["detect"]) and set(one_process["segment"]) == {
        "miou",
        "accuracy",
    }


def test_a_frozen_encoder_is_what_it_was(workplace: Path, one_process: dict[str, Any]) -> None:
    given = load_file(workplace / "encoder/model.safetensors")
    for task, frozen in (("frozen", True), ("segment", False)):
        found = load_file(workplace / task / "model.safetensors")
        blocks = [name for name in given if name.startswith("blocks.") and name.endswith(".weight")]
        assert all(torch.equal(given[name], found[f"backbone.body.vit.{name}"]) == frozen for name in blocks)


def test_segmentation_does_not_depend_on_processes(
    workplace: Path, one_process: dict[str, Any], two_processes: dict[str, Any]
) -> None:
    assert losses(workplace / "two-segment") == pytest.approx(losses(workplace / "segment"), rel=1e-4)
    assert two_processes["segment"] == pytest.approx(one_process["segment"], abs=0.02)


def test_detection_in_two_processes(
    workplace: Path, one_process: dict[str, Any], two_processes: dict[str, Any]
) -> None:
    """Each process draws its own boxes to learn from, so losses are alike but not the same."""
    assert losses(workplace / "two-detect")[0] == pytest.approx(losses(workplace / "detect")[0], rel=0.3)
    assert set(two_processes["detect"]) == set(one_process["detect"])
