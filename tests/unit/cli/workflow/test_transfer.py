"""`moce transfer` on runs with random weights: everything it does, and that it does nothing twice."""

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from moce_ds.checkpoint.format import find, publish, step_folder, write_checkpoint
from moce_ds.cli.workflow import transfer
from moce_ds.cli.workflow.transfer import campaign_tables
from moce_ds.cli.workflow.transfer_tasks import TASK_FILES
from moce_ds.common.config.settings import to_tree
from moce_ds.encoders.from_checkpoint import TokenExperts
from moce_ds.models.build import build_model
from moce_ds.models.moce import MakeLayer
from moce_ds.models.vit import Encoder
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.training.settings import PretrainSettings
from tests.examples.images import contents
from tests.examples.moce_command import refused, run_here
from tests.examples.public_folders import MINIATURES

MakeRun = Callable[..., Path]
FAST = {"probe": {"method": "closed_form", "threads": 1}, "knn": {"k": 5, "threads": 1}}


@pytest.fixture
def runs(tiny_moce_run: MakeRun, tiny_config: Callable[..., PretrainSettings], tmp_path: Path) -> Path:
    """A folder that holds a dense run and one with experts, both untrained."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.move(tiny_moce_run(), folder / "a_moce")
    write_dense(folder / "b_mae", tiny_config())
    return folder


def write_dense(run: Path, config: PretrainSettings, make_layer: MakeLayer = ReferenceMoE, step: int = 5) -> None:
    torch.manual_seed(step)
    weights = {name: p.detach() for name, p in build_model(config.model_spec, None, make_layer).named_parameters()}
    manifest = {"step": step, "config": to_tree(config), "model": config.model_spec.to_tree(), "routing": None}
    manifest |= {"clusters_hash": None, "shards_fingerprint": "", "placement": None, "skipped": 0, "images_read": 60}
    write_checkpoint(step_folder(run, step), weights, {}, {**manifest, "dealt_by": []})


@pytest.fixture
def task(tiny_images: Path, tmp_path: Path) -> Path:
    """The settings of a task in folders: digits or flower, every other image for testing."""
    for label in ("digits", "flower"):
        for number, image in enumerate(sorted((tiny_images / label).iterdir())):
            place = tmp_path / "tasks/kinds" / ("test" if number % 2 else "train") / label
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place)
    return write_task(tmp_path, "kinds")


def write_task(folder: Path, name: str, **settings: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"data": str(folder / "tasks" / name), **FAST, **settings}))
    return path


def records(out: Path, verb: str) -> list[dict[str, Any]]:
    return [record for record in json.loads((out / "results.json").read_text()) if record["verb"] == verb]


def test_a_table_of_all_models_and_nothing_twice(runs: Path, task: Path, tmp_path: Path) -> None:
    command = ("transfer", runs, "--tasks", task, "--seeds", "3,4")
    said = run_here(*command)
    assert said.status == 0, said
    out = runs / "transfer"
    (vote,) = records(out, "select")
    assert f"kinds: MoCE gives route {'-'.join(map(str, vote['route']))}, {vote['share']:.1%} of the votes" in said.out
    provenance = json.loads((out / "experts/MoCE/kinds/provenance.json").read_text())
    assert provenance["route"] == vote["route"] and provenance["step"] == 5
    assert [(r["model"], r["seed"]) for r in records(out, "knn")] == [("MAE", None), ("MoCE", None)]
    seeds = [(r["model"], r["seed"]) for r in records(out, "probe")]
    assert seeds == [("MAE", 3), ("MAE", 4), ("MoCE", 3), ("MoCE", 4)]
    assert all(r["settings"]["method"] == "closed_form" and r["n_test"] == 20 for r in records(out, "probe"))
    assert "[6/6] kinds MoCE probe seed 4: top-1 " in said.out
    mean = sum(100 * r["top1"] for r in records(out, "probe")[:2]) / 2
    assert re.search(r"linear probe: percent [^┃]* 2 seeds[^┃]*┃ task .* MAE .* MoCE ", said.out), said.out
    assert re.search(rf"│ kinds │ top-1 +│ +{mean:.1f} ± \d+\.\d │", said.out), said.out

    before = contents(out)
    again = run_here(*command)
    assert again.out.count("(was done)") == 6 and contents(out) == before
    assert [line for line in again.out.splitlines() if "│" in line] == [
        line for line in said.out.splitlines() if "│" in line
    ]
    more = run_here("transfer", runs, "--tasks", task, "--seeds", "4,5")
    assert more.out.count("(was done)") == 4 and len(records(out, "probe")) == 6


def test_a_campaign_that_was_stopped_goes_on(runs: Path, task: Path) -> None:
    run_here("transfer", runs, "--tasks", task)
    out = runs / "transfer"
    whole = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(whole[:3]))
    assert run_here("transfer", runs, "--tasks", task).out.count("(was done)") == 2  # the first one is the vote
    assert sorted(map(str, json.loads((out / "results.json").read_text()))) == sorted(map(str, whole))


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (Path.unlink, "config.json"),
        (Path.unlink, "provenance.json"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3] + b"abc"), "model.safetensors"),
    ],
)
def test_a_damaged_export_is_exported_again(
    tiny_moce_run: MakeRun, task: Path, harm: Callable[[Path], object], name: str
) -> None:
    command = ("transfer", tiny_moce_run(), "--tasks", task, "--methods", "knn")
    run_here(*command)
    out = Path(command[1]) / "transfer"
    whole, made = contents(out / "experts"), len(records(out, "knn"))
    harm(out / "experts/MoCE/kinds" / name)
    said = run_here(*command)
    assert said.status == 0 and said.err.count("It is exported again.") == 1 and name in said.err, said
    assert contents(out / "experts") == whole and "(was done)" in said.out and len(records(out, "knn")) == made
    assert "exported again" not in run_here(*command).err


def test_what_was_made_otherwise_is_made_again(runs: Path, task: Path, tmp_path: Path) -> None:
    run_here("transfer", runs, "--tasks", task)
    other = tmp_path / "other.yaml"
    other.write_text("knn: {k: 3}\n")
    said = run_here("transfer", runs, "--tasks", task, "--config", other)
    assert said.out.count("(was done)") == 2
    assert [r["settings"]["k"] for r in records(runs / "transfer", "knn")] == [5, 5, 3, 3], "nothing is replaced"
    next((tmp_path / "tasks/kinds/train/digits").iterdir()).unlink()
    expert = runs / "transfer/experts/MoCE/kinds/provenance.json"
    before = json.loads(expert.read_text())
    said = run_here("transfer", runs, "--tasks", task, "--config", other)
    assert said.status == 0 and "(was done)" not in said.out
    assert json.loads(expert.read_text())["votes"]["n_images"] == before["votes"]["n_images"] - 1


def test_a_campaign_exports_the_checkpoint_that_it_found(
    tiny_moce_run: MakeRun, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = tiny_moce_run(), transfer.opened_task
    first = find(run)

    def save_another_step(*places: Any) -> Any:
        shutil.copytree(first.folder, run / "draft")
        publish(run / "draft", step_folder(run, first.step + 1), {**first.manifest, "step": first.step + 1})
        return opened(*places)

    monkeypatch.setattr(transfer, "opened_task", save_another_step)
    said = run_here("transfer", run, "--tasks", task, "--methods", "knn")
    assert said.status == 0 and find(run).step == first.step + 1, said
    provenance = json.loads((run / "transfer/experts/MoCE/kinds/provenance.json").read_text())
    (vote,) = records(run / "transfer", "select")
    assert provenance["step"] == first.step and vote["model_sha256"] == first.identity


def test_a_run_that_was_trained_further_is_measured_again(
    runs: Path, task: Path, tiny_config: Callable[..., PretrainSettings]
) -> None:
    run_here("transfer", runs, "--tasks", task, "--methods", "knn")
    write_dense(runs / "b_mae", tiny_config(), step=6)
    said = run_here("transfer", runs, "--tasks", task, "--methods", "knn")
    assert [line.endswith("(was done)") for line in said.out.splitlines() if line.startswith("[")] == [False, True]


def test_what_an_earlier_version_measured_counts(runs: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knew an encoder by its weights alone, and wrote no checksum of it."""
    command = ("transfer", runs / "b_mae", "--tasks", task, "--methods", "knn")
    with monkeypatch.context() as before:
        before.setattr(Encoder, "identity", Encoder.fingerprint)
        run_here(*command)
    results = runs / "b_mae/transfer/results.json"
    (record,) = json.loads(results.read_text())
    del record["content_sha256"]
    for known_by, done in (({}, True), ({"model_sha256": "f" * 64}, False)):
        results.write_text(json.dumps([{k: v for k, v in record.items() if k != "model_sha256"} | known_by]))
        assert run_here(*command).out.count("(was done)") == done


def test_runs_alike_are_disambiguated(runs: Path, task: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(runs / "b_mae", tmp_path / "twin")
    words = (runs / "b_mae", twin, "--tasks", task, "--methods", "knn", "--out", tmp_path / "out")
    assert run_here("transfer", *words).status == 0
    assert [r["model"] for r in records(tmp_path / "out", "knn")] == [f"MAE ({runs / 'b_mae'})", f"MAE ({twin})"]


def test_tokens_that_choose_their_experts(runs: Path, task: Path, tiny_config: Callable[..., PretrainSettings]) -> None:
    def make_layer(make_expert: Callable[[], nn.Module], num_experts: int, shared: bool) -> nn.Module:
        return TokenExperts(make_expert, 16, num_experts, 1)

    config = tiny_config("model.arch=token_moe", "experts.num=4", "experts.layers=[0,2]")
    write_dense(runs / "c_token", config, make_layer)
    assert run_here("transfer", runs, "--tasks", task).status == 0
    found = {r["model"]: r["top1"] for r in records(runs / "transfer", "probe")}
    assert list(found) == ["MAE", "TokenMoE", "MoCE"] and found["TokenMoE"] > 0.6
    message = refused("transfer", runs / "c_token", "--tasks", task, "--methods", "finetune")
    assert "c_token routes by token, so there is no dense ViT to fine-tune: name another method" in message
    said = run_here("transfer", runs / "c_token", "--tasks", task, "--methods", "knn,finetune")
    assert said.status == 0 and said.err.count("its cells in that table stay empty") == 1, said
    assert "[1/1] kinds TokenMoE knn" in said.out


def test_a_public_data_set_is_written_when_it_is_missing(runs: Path, tmp_path: Path) -> None:
    """And one whose images have several labels is judged by 11-point mAP."""
    settings = {"dataset": "voc2007", "source": str(tmp_path / "unpacked"), "metric": "map11"}
    task = write_task(tmp_path, "voc", **settings)
    told = refused("transfer", runs, "--tasks", task)
    assert f"write it with `moce dataset voc2007 UNPACKED {tmp_path}/tasks/voc`, or set source" in told
    MINIATURES["voc2007"](tmp_path / "unpacked")
    said = run_here("transfer", runs, "--tasks", task)
    assert said.status == 0, said
    assert re.search(r"\[1/4\] voc MAE knn: 11-point mAP [01]\.\d{4}", said.out)
    dense, _ = records(runs / "transfer", "probe")
    assert dense["metric"] == "map11" and dense["settings"]["n_validation"] == 1 and dense["n_train"] == 4
    write_task(tmp_path, "voc", **settings | {"metric": "top1"})
    told = refused("transfer", runs, "--tasks", task)
    assert "Task voc: metric: got top1; its images have several labels each: expected map11" in told


def test_faults_are_named_before_anything_is_measured(runs: Path, task: Path, tmp_path: Path) -> None:
    def told(*words: object) -> str:
        message = refused("transfer", runs, *words)
        assert not (runs / "transfer").exists()
        return message

    assert "known tasks: aircraft, caltech101, cars" in told("--tasks", "digit")
    for option, words in (("--tasks", ""), ("--tasks", f"{task},"), ("--methods", "knn,,probe")):
        message = told("--tasks", task, option, words)
        assert f"{option}: got '{words}'; expected one name or more, with a comma between two" in message
    assert "--tasks: kinds is named twice" in told("--tasks", f"{task},{task}")
    message = told("--tasks", task, "--methods", "svm")
    assert "--methods: svm is not known; expected some of knn, probe, finetune" in message
    for seed in ("a", "-1", 2**70):
        assert f"--seeds: got '{seed}'" in told("--tasks", task, "--seeds", seed)
    assert "nowhere/kinds/train not found" in told("--tasks", task, "--data", tmp_path / "nowhere")
    over = ("--tasks", task, "--config", tmp_path / "over.yaml")
    (tmp_path / "over.yaml").write_text("probe: {methd: lars}")
    assert "probe.methd: no such setting. Did you mean probe.method?" in told(*over)
    (tmp_path / "over.yaml").write_text("finetune: {choices: [[a=1]]}")
    assert "finetune.choices need" in told(*over)
    message = refused("transfer", tmp_path / "tasks", "--tasks", task, "--out", tmp_path / "out")
    assert "holds no checkpoint: expected a run folder" in message


@pytest.mark.parametrize("content", ["{}", '[{"verb": "knn"}]', "[1]", "3"])
def test_results_of_another_shape_are_left_alone(runs: Path, task: Path, content: str) -> None:
    results = runs / "transfer/results.json"
    results.parent.mkdir()
    results.write_text(content)
    told = refused("transfer", runs, "--tasks", task, "--methods", "knn")
    assert re.match(rf"{results}(, record 0,)? is damaged \(", told), told
    assert [path.name for path in results.parent.iterdir()] == ["results.json"] and results.read_text() == content


def test_bad_images_are_named(runs: Path, task: Path, tmp_path: Path) -> None:
    test = tmp_path / "tasks/kinds/test"
    (test / "flower").rename(test / "roses")
    message = refused("transfer", runs, "--tasks", task)
    assert re.search(r"classes \['roses'\] are not among the training classes", message)
    for image in test.rglob("*.*"):
        image.write_bytes(b"no image")
    message = refused("transfer", runs, "--tasks", task)
    assert re.search(rf"{test}: No image to write: of 20 files none could be decoded", message)
    shutil.rmtree(test)
    test.mkdir()
    assert f"{test}: No image to write: the folder holds no files" in refused("transfer", runs, "--tasks", task)
    assert not (runs / "transfer/results.json").exists() or records(runs / "transfer", "knn") == []


def test_fine_tuning_takes_the_choice_that_validates_better(runs: Path, task: Path, tmp_path: Path) -> None:
    kinds = tmp_path / "tasks/kinds"
    shutil.copytree(kinds / "test", kinds / "val")
    still, learning = ["optim.base_lr=1.0e-9"], ["optim.base_lr=0.05"]
    words = ["optim.epochs=12", "optim.batch_size=5", "optim.warmup_epochs=1", "data.workers=0", "optim.layer_decay=1"]
    words += ["augment.mixup=0", "augment.cutmix=0", "augment.rand_augment=null", "augment.erase=0"]
    words += ["augment.crop_scale=[0.9,1]", "augment.drop_path=0", "engine.precision=fp32", "optim.validate_every=6"]
    write_task(tmp_path, "kinds", finetune={"words": words, "choices": [still, learning]})
    command = ("transfer", runs / "b_mae", "--tasks", task, "--methods", "finetune", "--seeds", "3")
    said = run_here(*command)
    assert said.status == 0, said
    out = runs / "b_mae/transfer"
    (record,) = records(out, "finetune")
    assert record["settings"]["chosen"] == learning and record["seed"] == 3
    judged = {
        path.parent.name: json.loads(path.read_text())[0]["top1"] for path in out.glob("finetune/*/*/result.json")
    }
    assert judged["choice-0"] < judged["choice-1"] and judged["final"] == record["top1"] > 0.6
    assert re.search(rf"fine-tuning: percent[^±│]*│ kinds │ top-1 +│ +{100 * record['top1']:.1f} │", said.out), said.out
    assert "(was done)" in run_here(*command).out


def test_fine_tuning_that_fails_tells_the_end_of_its_log(runs: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("finetune: {words: [no.such=1]}")
    words = ("--tasks", task, "--methods", "finetune", "--config", tmp_path / "over.yaml")
    message = refused("transfer", runs, *words)
    assert re.search(r"moce finetune ended with status [12] \(full log: .*log\.txt\):\n  ", message)


def test_means_and_spread_by_hand() -> None:
    made = [
        {"verb": "probe", "model": model, "task": task, "metric": metric, metric: value}
        for task, metric, by_model in (
            ("digits", "top1", {"MAE": (0.5, 0.7), "MoCE": (0.8, 0.8)}),
            ("pets", "mean_per_class", {"MAE": (0.3, 0.3), "MoCE": (0.4, 0.6)}),
        )
        for model, values in by_model.items()
        for value in values
    ]
    assert rows_of(made, width=100) == [
        ["digits", "top-1", "60.0 ± 14.1", "80.0 ± 0.0"],
        ["pets", "per class", "30.0 ± 0.0", "50.0 ± 14.1"],
        ["mean", "", "45.0", "65.0"],
    ]
    assert rows_of([record for record in made if (record["task"], record["model"]) != ("pets", "MAE")], width=100) == [
        ["digits", "top-1", "60.0 ± 14.1", "80.0 ± 0.0"],
        ["pets", "per class", "-", "50.0 ± 14.1"],
        ["mean", "", "-", "65.0"],
    ]


def rows_of(made: list[dict[str, Any]], width: int) -> list[list[str]]:
    """The rows of all tables, as they are printed."""
    console = Console(file=StringIO(), width=width)
    for table in campaign_tables(made, list(dict.fromkeys(record["model"] for record in made))):
        console.print(table)
    assert isinstance(console.file, StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_eleven_tasks_and_five_models_fit_into_100_columns() -> None:
    models = ("MAE", "TokenMoE", "SDR", "MoCE, random gate", "MoCE")
    tasks = [path.stem for path in sorted(TASK_FILES.glob("*.yaml"))]
    made = [
        {"verb": verb, "model": model, "task": task, "metric": metric, metric: value}
        for task, metric in zip(tasks, ("mean_per_class", "top1", "map11") * 5, strict=False)
        for model in models
        for verb in ("knn", "probe", "finetune")
        for value in ((0.5,) if verb == "knn" else (0.0, 1.0))
        if (model, verb) != ("TokenMoE", "finetune")
    ]
    rows = rows_of(made, width=100)
    assert [row[0] for row in rows] == 3 * [*tasks, "mean"] and len(tasks) > 10
    assert all(row[2:] == 5 * ["50.0"] for row in rows[: len(tasks) + 1]), "k-NN, means too"
    assert all(row[2] == row[6] == "50.0 ± 70.7" for row in rows[len(tasks) + 1 :] if row[0] != "mean")
    assert {row[3] for row in rows[2 * (len(tasks) + 1) :]} == {"-"}
