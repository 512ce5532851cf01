"""Fine-tuning learns, stops, resumes and gives up as pre-training does, whatever the number of processes.

The runs are made once, by `two` and `one`; the tests compare what they left on disk.
"""

import json
import re
import shutil
import signal
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_distributed
from launching import SECONDS, launched, local, ranks_of, run_to_end, send, wait_for_step
from rich.console import Console
from safetensors import safe_open
from tiny_run import alter_images, comparable, losses, numbers
from tune_jobs import CLASSES, COUNTS, Tune, Tuned, run_tunings, write_task

from moce_ds.checkpoint.format import OPTIMIZER, STATE, WEIGHTS, Checkpoint, find, step_folder, steps_of
from moce_ds.common.errors import STOPPED, ArtefactError
from moce_ds.common.storage.checksums import Findings
from moce_ds.common.storage.files import read_json
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.inspection.inspection import describe, findings
from moce_ds.models.vit import load_encoder
from moce_ds.tuning.augmentation import centre_transform

STEPS = 12
TINY = ("optim.batch_size=16", "optim.epochs=0.8", "optim.warmup_epochs=0.2", "optim.base_lr=2e-2", "optim.ema=0.9")
TINY += ("optim.layer_decay=0.8", "optim.validate_every=0.2", "data.workers=0", "engine.precision=fp32")
PLAIN = ("augment.flip=false", "augment.rand_augment=null", "augment.erase=0", "augment.mixup=0", "augment.cutmix=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task, for all runs."""
    return write_task(tmp_path_factory.mktemp("finetune"))


def words(root: Path, name: str, *other: str) -> list[str]:
    """Settings of a run of twelve steps; drawn by image, all of them the same for any number of processes."""
    data = [f"data.{split}={root / split}" for split in ("encoder", "train", "val", "test")]
    return [*data, f"run.out={root / name}", "run.log_every=1", "augment.drop_path=0", *TINY, *other]


@pytest.fixture(scope="module")
def two_processes(root: Path) -> dict[str, Tuned]:
    """All runs of two processes."""
    moving = ("augment.drop_path=0.3", "engine.precision=bf16", "data.workers=1")
    every_step = ("run.checkpoint_every=1", "run.keep_checkpoints=99", "run.max_skipped=3")
    for name in ("altered", "copy"):
        shutil.copytree(root / "train", root / name)
    alter_images(
        root / "altered", [int(ShuffledSampler(RandomOrder(COUNTS["train"], seed=0), 16).batch(2).part(1, 2).ids[3])]
    )
    jobs = {
        "two": Tune(words(root, "two")),
        "two-parts": Tune(words(root, "two-parts", "optim.accumulation=2", "engine.zero_stage=2")),
        "whole": Tune(words(root, "whole", *moving)),
        "stopped": Tune(words(root, "stopped", *moving), stop_after=5),
        "resumed": Tune(words(root, "stopped", *moving)),  # the same command
        "then-one": Tune(words(root, "then-one"), stop_after=5),
        "skipping": Tune(words(root, "skipping"), not_finite=(3,)),
        "given-up": Tune(words(root, "given-up", *every_step), not_finite=(4, 5, 6)),
        "damaged": Tune(words(root, "damaged", f"data.train={root / 'altered'}", "data.workers=1")),
        "exchanged": Tune(words(root, "exchanged", f"data.train={root / 'copy'}"), stop_after=3),
        "then-other": Tune(words(root, "exchanged", f"data.train={root / 'copy'}"), before=partial(exchange, root)),
    }
    first, second = run_distributed(run_tunings, 2, jobs)
    assert [t.record for t in first.values()] == [t.record for t in second.values()]
    assert [bool(t.error) for t in first.values()] == [bool(t.error) for t in second.values()]
    return first


@pytest.fixture(scope="module")
def one_process(root: Path, two_processes: dict[str, Tuned]) -> dict[str, Tuned]:
    """All runs of one process, the end of one that was begun with two, and one that is long enough to learn."""
    learning = (*PLAIN, "optim.epochs=12", "optim.warmup_epochs=1", "optim.validate_every=3", "optim.base_lr=5e-2")
    learning += ("optim.layer_decay=1", "augment.crop_scale=[0.9,1]", "run.log_every=100")
    diverging = ("optim.epochs=0.4", "optim.warmup_epochs=0")
    jobs = {
        "one": Tune(words(root, "one")),
        "then-one": Tune(words(root, "then-one")),
        "again": Tune(words(root, "one")),
        "other": Tune(words(root, "one", "optim.layer_decay=0.7")),
        "diverged": Tune(words(root, "diverged", *diverging, "optim.base_lr=1e9")),
        "diverged-again": Tune(words(root, "diverged", *diverging, "optim.base_lr=1e9")),  # the same command
        "never": Tune(words(root, "never", "optim.epochs=0.2"), not_finite=(1, 2, 3)),
        "at-last": Tune(words(root, "at-last"), not_finite=(STEPS - 1, STEPS)),
        "one-at-last": Tune(words(root, "one-at-last"), not_finite=(STEPS,)),
        "huge": Tune(words(root, "huge", *diverging, "optim.epochs=0.05", "optim.base_lr=1e38")),
        "several": Tune(
            words(root, "several", *(f"data.{split}={root}/several-{split}" for split in COUNTS), *learning)
        ),
        "learning": Tune(words(root, "learning", *learning)),
    }
    return run_distributed(run_tunings, 1, jobs)[0]


def exchange(root: Path) -> None:
    """Put other images in the place of those that a run was begun with."""
    shutil.rmtree(root / "copy")
    shutil.copytree(root / "val", root / "copy")


def state_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(step_folder(run, STEPS))
    assert {"head.weight.ema", "head.weight.best"} <= checkpoint.load(STATE).keys()
    return checkpoint.load(WEIGHTS) | checkpoint.load(OPTIMIZER) | checkpoint.load(STATE)


def assert_same(first: Path, second: Path, tolerance: float) -> None:
    """Losses, gradient norms, final weights, moments, averages and measures agree; exactly for tolerance 0."""
    assert len(losses(first)) == len(losses(second)) == STEPS
    np.testing.assert_allclose(losses(first), losses(second), rtol=0, atol=tolerance)
    norms = [numbers(r["grad_norm"] for r in read_metrics(run / "metrics.jsonl")) for run in (first, second)]
    np.testing.assert_allclose(*norms, rtol=10 * tolerance)
    states = [state_of(run) for run in (first, second)]
    states = [comparable(state) for state in states] if tolerance else states
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        if "qkv.bias" not in name or not tolerance:  # `comparable` knows the weights' own only, not their averages
            torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=tolerance, msg=name)
    results = [read_json(run / "result.json", "a result", "moce finetune") for run in (first, second)]
    # The tuned weights are compared above: their checksums differ with the last bit.
    assert all(results[0][key] == results[1][key] for key in results[0].keys() - {"files", "content_sha256"})


@pytest.mark.parametrize("other", ["two", "two-parts", "then-one"])
def test_the_result_does_not_depend_on_the_processes(root: Path, one_process: object, other: str) -> None:
    assert_same(root / "one", root / other, tolerance=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(root: Path, two_processes: dict[str, Tuned]) -> None:
    """Bit for bit, with dropped paths, bf16, a running average and worker processes."""
    assert (
        two_processes["stopped"].record is None
        and "as asked. Rerun the same command to resume" in two_processes["stopped"].text
    )
    assert (
        "Resuming" in two_processes["resumed"].text and two_processes["resumed"].record == two_processes["whole"].record
    )
    assert_same(root / "whole", root / "stopped", tolerance=0)


def test_a_complete_run_is_not_run_again(root: Path, one_process: dict[str, Tuned]) -> None:
    assert one_process["again"].record == one_process["one"].record and "is complete" in one_process["again"].text
    assert "optim.layer_decay: 0.8 -> 0.7" in one_process["other"].error


def test_what_a_run_left_is_told(root: Path, one_process: object) -> None:
    table = Console(width=200, file=StringIO())
    table.print(describe(root / "one"))
    told = table.file.getvalue()  # type: ignore[attr-defined]
    assert "top1" in told and f"step {STEPS}, loss" in told and str(root / "train") in told
    assert findings(root / "one") == Findings()
    with pytest.raises(ArtefactError, match=rf"is a tuning run; when complete, its encoder is in {root / 'one/tuned'}"):
        find(root / "one")


def test_it_learns(root: Path, one_process: dict[str, Tuned]) -> None:
    record = one_process["learning"].record
    assert record is not None and record["top1"] > 2 / CLASSES, record
    assert (record["n_train"], record["n_test"]) == (COUNTS["train"] + COUNTS["val"], COUNTS["test"])
    result = json.loads((root / "learning/result.json").read_text())
    validated = [r for r in read_metrics(root / "learning/metrics.jsonl") if "validation" in r]
    assert len(validated) == 4
    best = max(validated, key=lambda r: r["validation"]["top1"])
    assert (result["step"], result["validation"]) == (best["step"], best["validation"])


def test_several_labels_an_image_are_learnt(one_process: dict[str, Tuned]) -> None:
    """A classifier that knows nothing ranks at random: the precision is the share of images, a half."""
    record = one_process["several"].record
    assert record is not None and record["map11"] > 0.7 and "top1" not in record, record


def test_the_tuned_folder_predicts_what_was_measured(root: Path, one_process: dict[str, Tuned]) -> None:
    """An encoder folder as `moce export` writes it, and the head on its features."""
    encoder, test = load_encoder(root / "learning/tuned"), ShardSet.open(root / "test")
    images = torch.stack([centre_transform(encoder.input)(test.decode(i)) for i in range(test.count)])
    with safe_open(root / "learning/tuned/head.safetensors", "pt") as head:
        classes = json.loads(head.metadata()["classes"])
        scores = encoder.features(images) @ head.get_tensor("weight").T + head.get_tensor("bias")
    right = [classes[k] == test.classes[label] for k, label in zip(scores.argmax(1), test.labels, strict=True)]
    record = one_process["learning"].record
    assert record is not None and np.mean(right) == pytest.approx(record["top1"])


def test_a_step_without_a_finite_gradient_is_skipped(root: Path, two_processes: dict[str, Tuned]) -> None:
    records = read_metrics(root / "skipping/metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 0] + [1] * (STEPS - 2)
    assert two_processes["skipping"].record is not None
    assert all(torch.isfinite(tensor).all() for tensor in state_of(root / "skipping").values())


def test_too_many_of_them_end_the_run(root: Path, two_processes: dict[str, Tuned]) -> None:
    assert two_processes["given-up"].error.startswith(
        "DivergedError: Step 6: the gradient was not finite in 3 steps in a row"
    )
    assert steps_of(root / "given-up") == [1, 2, 3] and not (root / "given-up/result.json").exists()


def test_a_single_bad_gradient_at_the_end_spoils_nothing(root: Path, one_process: dict[str, Tuned]) -> None:
    assert one_process["one-at-last"].error == "" and (root / "one-at-last" / "result.json").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("diverged", r"Step 6, the last one: the last \d had no finite gradient"),
        ("diverged-again", r"Step 6, the last one: the last \d had no finite gradient"),
        ("never", "Step 3, the last one: no step had a finite gradient"),
        ("at-last", f"Step {STEPS}, the last one: the last 2 had no finite gradient"),
        ("huge", "(Step 1, the last one: weights|The model's predictions of test images) are not finite"),
    ],
)
def test_a_run_that_ends_without_a_model_leaves_none(
    root: Path, one_process: dict[str, Tuned], name: str, told: str
) -> None:
    """Though it is too short for many skipped steps in a row."""
    assert re.match(f"DivergedError: {told}", one_process[name].error), one_process[name]
    run = root / name.removesuffix("-again")
    assert not (run / "result.json").exists() and not (run / "tuned").exists()


def test_a_damaged_image_is_named(two_processes: dict[str, Tuned]) -> None:
    """To both ranks, though only one reads it, in a worker."""
    error = two_processes["damaged"].error.partition(": ")[2]
    assert error.startswith("Image ") and "was altered after writing" in error and "Traceback" not in error


def test_other_images_than_it_was_begun_with_are_refused(two_processes: dict[str, Tuned]) -> None:
    assert "The task is not what the run was trained with" in two_processes["then-other"].error


def test_the_command_stops_and_goes_on(root: Path, two_processes: object) -> None:
    """As a user runs it, in two processes with workers; a signal to one of them."""
    out, data = root / "command", [f"--{split}={root / split}" for split in ("train", "test")]
    settings = [*TINY, "data.workers=1", "optim.epochs=4", "run.log_every=1"]
    command = (*local(2), "finetune", str(root / "encoder"), *data, "--val=0.2", f"--out={out}", *settings)
    command += (f"--results={root / 'results.json'}",)
    with launched(*command) as process:
        wait_for_step(out, 3)
        send(signal.SIGTERM, ranks_of(process)[1])
        assert process.wait(timeout=SECONDS) == STOPPED
    assert len(steps_of(out)) == 1 and not (out / "tuned").exists()
    status, said = run_to_end(*command)
    assert status == 0 and "Resuming" in said and "finetune" in said, said
    (record,) = json.loads((root / "results.json").read_text())
    assert record["verb"] == "finetune" and 0 <= record["top1"] <= 1
