"""A pipeline on paper, and the states of its stages; all of them are run in tests/distributed."""

import dataclasses
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.workflow.pipeline import (
    PipelineSettings,
    check_batches,
    check_folders,
    pipeline_workflow,
    stages_of,
)
from moce_ds.cli.workflow.runner import Progress, StageError, run_stages
from moce_ds.cli.workflow.stage import Launch, Stage, StageRecord
from moce_ds.cli.workflow.submit import queued_stages
from moce_ds.common.config.settings import load
from moce_ds.common.errors import STOPPED, ConfigError
from moce_ds.common.storage.locks import held
from moce_ds.data import shard_writer
from tests.examples.moce_command import TINY, refused, run_here

Make = Callable[..., PipelineSettings]
EXPERTS = ["model.arch=moce", "experts.num=4", "experts.layers=[1,3]"]
NAMES = ["shards", "mae", "features", "clusters", "moce", "export", "evaluation"]


@pytest.fixture
def make(tmp_path: Path, tiny_images: Path) -> Make:
    """The settings of a pipeline on tiny images, from pipeline.yaml; call it with what the file says besides."""

    def made(*words: str, **given: Any) -> PipelineSettings:
        path = tmp_path / "pipeline.yaml"
        tree = {"out": str(tmp_path / "out"), "images": str(tiny_images), "mae": str(TINY), "moce": str(TINY)}
        path.write_text(yaml.safe_dump(tree | {"words": {"moce": EXPERTS}} | given, sort_keys=False))
        return load(PipelineSettings, path, words)

    return made


@pytest.fixture
def task(tmp_path: Path, tiny_images: Path, tiny_shards: Path) -> Path:
    """A task's training images as images, and its test images as shards."""
    shutil.copytree(tiny_images, tmp_path / "task" / "train")
    shutil.copytree(tiny_shards, tmp_path / "task" / "test")
    return tmp_path / "task"


def of(pipeline: PipelineSettings, name: str) -> Stage:
    """The stage of a name."""
    return next(stage for stage in stages_of(pipeline) if stage.name == name)


def finish(stage: Stage) -> None:
    """Leave the stage as one that was run to its end, its products aside."""
    stage.records.write(StageRecord(stage.made_from().parts, "done"))


def words(stage: Stage) -> list[str]:
    return [" ".join(command) for command in stage.commands]


def test_the_stages_and_their_commands(make: Make, task: Path, tiny_images: Path, tmp_path: Path) -> None:
    more = {"moce": EXPERTS, "clusters": ["num_clusters=6"], "shards": ["workers=1"]}
    pipeline = make(tasks={"digits": str(task)}, heldout=str(tiny_images), words=more, reconstruction=True)
    stages = {stage.name: words(stage) for stage in stages_of(pipeline)}
    out = tmp_path / "out"
    assert list(stages) == NAMES
    assert stages["shards"] == [f"shards {tiny_images} {out}/shards workers=1"]
    assert stages["mae"] == [f"pretrain {TINY} data.shards={out}/shards run.out={out}/mae"]
    assert stages["features"] == [f"features {out}/mae {out}/shards {out}/features"]
    assert stages["clusters"] == [f"cluster {out}/features {out}/clusters --shards {out}/shards num_clusters=6"]
    config = of(pipeline, "moce").config
    assert (config.experts.clusters, config.run.init_from) == (out / "clusters", out / "mae")
    assert (config.data.shards, config.run.out, config.experts.num) == (out / "shards", out / "moce", 4)
    train, results = f"{out}/tasks/digits/train", f"--task digits --results {out}/results.json"
    assert stages["export"] == [
        f"shards {task}/train {train} workers=1",  # the test images are shards already
        f"select {out}/moce {results} --export {out}/experts/digits --replace --data {train}",
    ]
    split = f"--train {train} --test {task}/test {results}"
    both = [("dense", out / "mae"), ("expert", out / "experts/digits")]
    assert stages["evaluation"] == [
        *(f"{verb} {encoder} --model {model} {split}" for model, encoder in both for verb in ("knn", "probe")),
        *(
            f"evaluate {out}/moce --data {images} --dense {out}/mae --task {name} --results {out}/results.json "
            f"--picture {out}/pictures/{picture}.png"
            for images, name, picture in ((task / "test", "digits", "digits"), (tiny_images, "held out", "held out"))
        ),
        f"report {out}",
    ]
    assert [stage.name for stage in stages_of(pipeline) if stage.parallel] == ["mae", "features", "moce"]
    plain = of(make(tasks={"digits": str(task)}, heldout=str(tiny_images), words=more), "evaluation")
    assert [command for command in words(plain) if command.startswith("evaluate")] == [
        f"evaluate {out}/moce --data {tiny_images} --dense {out}/mae --task held out --results {out}/results.json"
    ]


def test_settings_in_the_file_of_the_pipeline(make: Make, tmp_path: Path) -> None:
    """Without YAML files of their own: the experts build on the dense MAE, the dense baseline on the experts."""
    mae = {"model": {"vit": "vit_tiny_patch16_224", "width": 96}, "optim": {"epochs": 8, "batch_size": 16}}
    moce = {"model": {"arch": "moce"}, "experts": {"layers": [1, 3]}, "optim": {"epochs": 2}}
    own = {"mae": None, "moce": None, "words": {"moce": ["optim.clip=0"]}, "dense": True}
    given = own | {"settings": {"mae": mae, "moce": moce, "clusters": {"num_clusters": 6}}}
    pipeline = make("settings.mae.optim.epochs=4", "settings.dense.optim.min_lr=1e-6", **given)
    stages = {stage.name: stage for stage in stages_of(pipeline)}
    assert list(stages) == [*NAMES[:5], "dense", "evaluation"]
    out, optim = tmp_path / "out", {name: stages[name].config.optim for name in ("mae", "moce", "dense")}
    assert [(one.epochs, one.batch_size, one.clip) for one in optim.values()] == [(4, 16, 1), (2, 16, 0), (2, 16, 0)]
    assert (optim["moce"].min_lr, optim["dense"].min_lr) == (0, 1e-6)
    dense = stages["dense"].config
    assert (dense.model.arch, dense.run.init_from, dense.run.out) == ("mae", out / "mae", out / "dense")
    assert stages["moce"].config.vit_shape == stages["mae"].config.vit_shape == dense.vit_shape
    assert words(stages["clusters"])[0].endswith(f"--shards {out}/shards num_clusters=6")
    assert " model.width=96 " in words(stages["moce"])[0] and words(stages["moce"])[0].count("optim.epochs=") == 1


def test_experts_are_compared_with_the_dense_run_that_trained_as_long(make: Make, task: Path, tmp_path: Path) -> None:
    pipeline, out = make(tasks={"digits": str(task)}, heldout=str(task / "train"), dense=True), tmp_path / "out"
    commands = words(of(pipeline, "evaluation"))
    assert [command.split()[1] for command in commands[:2]] == [f"{out}/dense"] * 2
    assert f"--dense {out}/dense" in commands[4]
    assert of(pipeline, "dense").parallel


def test_what_there_is_no_work_for_is_no_stage(make: Make, tiny_shards: Path) -> None:
    pipeline = make(images=None, shards=str(tiny_shards))
    assert [stage.name for stage in stages_of(pipeline)] == [*NAMES[1:5], "evaluation"]
    assert of(pipeline, "mae").config.data.shards == tiny_shards
    assert words(of(pipeline, "evaluation")) == [f"report {pipeline.out}"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"shards": "some"}, "images, shards: give one of them"),
        ({"images": None}, "images, shards: give one of them"),
        ({"words": {"mae": ["run.out=here"]}}, "words.mae: the pipeline sets run.out"),
        ({"words": {"moce": ["run.init_from=x", "data.shards=y"]}}, "words.moce: .*sets data.shards, run.init_from"),
        ({"words": {"cluster": []}}, "words.cluster: got 'cluster'; expected 'shards', 'mae',"),
        ({"settings": {"mae": {"run": {"out": "here"}}}}, "settings.mae: the pipeline sets run.out"),
        ({"settings": {"cluster": {"eps": 1}}}, "settings.cluster: got 'cluster'; expected 'shards', 'mae',"),
        ({"settings": {"mae": {"optim": {"epoch": 1}}}}, "optim.epoch: no such setting. Did you mean optim.epochs"),
        ({"mae": None, "moce": None, "words": {}}, "moce: model.arch is mae; expected moce"),
        ({"resources": {"report": {}}}, "resources.report: got 'report'"),
        ({"tasks": {"../digits": "x"}}, "tasks.../digits: got '../digits'"),
        ({"words": {}}, "moce: model.arch is mae; expected moce"),
        ({"tasks": {"a": "x"}, "words": {"moce": [*EXPERTS, "experts.k=2"]}}, "tasks: no expert can be exported with"),
    ],
)
def test_pipelines_that_are_refused(make: Make, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        stages_of(make(**given))


def test_faults_of_all_stages_are_listed(make: Make, tmp_path: Path) -> None:
    faults = {"mae": ["model.heads=3"], "features": ["batches=2"], "clusters": ["num_clusters=0"], "moce": EXPERTS}
    with pytest.raises(ConfigError) as refusal:
        stages_of(make(words=faults))
    text = str(refusal.value)
    assert text.startswith("Nothing was run. mae: ") and "model.width: 32 is not a multiple of model.heads 3" in text
    assert "features: " in text and "batches: no such setting" in text and "num_clusters: got 0" in text
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_another_run_is_told(make: Make, tmp_path: Path) -> None:
    pipeline = make(images="none", tasks={"digits": "task"}, heldout="away")
    with pytest.raises(ConfigError, match=r"tasks.digits: task/train not found\n(.*\n)*images: none .*\nheldout: away"):
        check_folders(pipeline, stages_of(pipeline))
    (tmp_path / "out" / "moce").mkdir(parents=True)
    (tmp_path / "out" / "moce" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="moce is not empty and holds no run"):
        check_folders(make(), stages_of(make()))
    with pytest.raises(ConfigError, match=r"mae: optim.batch_size: 16 is not divisible by 3 processes"):
        check_batches(stages_of(make()), 3)


def test_a_stage_is_done_for_what_it_was_made_from(make: Make, tmp_path: Path, tiny_shards: Path) -> None:
    yaml_file = shutil.copy(TINY, tmp_path / "mae.yaml")
    pipeline = make(mae=str(yaml_file))
    run, shards = pipeline.out / "mae", pipeline.out / "shards"
    shutil.copytree(tiny_shards, shards)
    stage = of(pipeline, "mae")
    assert not stage.is_done()
    finish(stage)
    assert not stage.is_done(), "there is no checkpoint"
    for step in (5, 10):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (run / f"checkpoints/step-{step:08d}/manifest.json").write_text(f"{step}")
    assert stage.is_done()
    assert not of(make("words.mae=[run.log_every=2]", mae=str(yaml_file)), "mae").is_done()

    features = of(pipeline, "features")
    before = features.made_from()
    (run / "checkpoints/step-00000005/manifest.json").write_text("an older checkpoint")
    assert features.made_from() == before
    (run / "checkpoints/step-00000010/manifest.json").write_text("another run")
    assert features.made_from() != before

    yaml_file.write_text(yaml_file.read_text().replace("log_every: 1", "log_every: 3"))
    assert not of(pipeline, "mae").is_done(), "an edited YAML file is another setting"
    yaml_file.write_text(yaml_file.read_text().replace("log_every: 3", "log_every: 1"))
    assert of(pipeline, "mae").is_done()
    stage.records.write(dataclasses.replace(stage.record(), state="failed"))  # type: ignore[type-var]
    assert not stage.is_done(), "what failed is run again"


def test_a_setting_that_an_earlier_version_did_not_have_had_its_default(make: Make, tiny_shards: Path) -> None:
    pipeline = make()
    shutil.copytree(tiny_shards, pipeline.out / "shards")
    shards = of(pipeline, "shards")
    made_from = shards.made_from().parts
    del made_from["settings"]["max_pixels"]
    shards.records.write(StageRecord(made_from, "done"))
    assert shards.is_done()
    assert not of(make("words.shards=[max_pixels=1000]"), "shards").is_done(), "and not what is asked for now"


def test_other_images_in_a_folder_are_another_input(make: Make, tmp_path: Path, task: Path) -> None:
    heldout = shutil.copytree(task / "train", tmp_path / "heldout")
    pipeline = make(tasks={"digits": str(task)}, heldout=str(heldout))
    for name, images in (("export", task / "train"), ("evaluation", heldout)):
        stage = dataclasses.replace(of(pipeline, name), outputs=[])
        finish(stage)
        assert stage.is_done()
        image = next(path for path in images.rglob("*") if path.is_file())
        image.write_bytes(image.read_bytes() + b" ")
        assert not stage.is_done()
        before = stage.made_from().parts
        stage.records.write(StageRecord(before | {"read": before["read"] | {str(images): None}}, "done"))
        assert stage.is_done(), "an earlier version did not list the images"


def test_a_stage_that_is_done_is_not_run_again(make: Make, tmp_path: Path) -> None:
    shards, path = of(make(), "shards"), tmp_path / "pipeline.yaml"
    command = ("pipeline", path, "--stage", "shards")
    first = run_here(*command)
    assert first.status == 0 and f"\n$ moce {words(shards)[0]}\n" in first.err, first
    assert "stage 1 of 6 shards done in" in first.err and "1 of 6 stages done" in first.out
    kept = shards.records.path.stat().st_mtime_ns
    again = run_here(*command)
    assert "stage 1 of 6 shards is done\n" in again.err and "$ moce" not in again.err
    assert run_stages([shards], Progress(pipeline_workflow(make()))).status == 0
    assert shards.records.path.stat().st_mtime_ns == kept
    (tmp_path / "out" / "shards" / "shards.json").unlink()
    assert not shards.is_done()


def test_a_failed_stage_says_so_and_is_run_by_the_same_command(make: Make, tmp_path: Path, tiny_images: Path) -> None:
    make(images=str(tmp_path / "images"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "no-image.txt").write_text("Dear reader,")
    path, state = tmp_path / "pipeline.yaml", tmp_path / "out/pipeline/shards.json"
    told = refused("pipeline", path)
    assert told.startswith("Stage shards failed: ")
    assert "images: No image to write: of 1 files none could be decoded." in told
    assert f"Its state is in {state}. Rerun the same command to resume." in told
    record = json.loads(state.read_text())
    assert record["state"] == "failed" and "No image to write" in record["told"]
    assert sorted(path.name for path in state.parent.glob("*.json")) == ["shards.json", "stages.json"], (
        "those after it were not begun"
    )
    assert re.search(r"shards .* failed ", run_here("pipeline", path, "--list").out)
    shutil.copytree(tiny_images, tmp_path / "images", dirs_exist_ok=True)
    assert run_here("pipeline", path, "--stage", "shards").status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_a_stage_of_one_process(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    shards = of(make(), "shards")
    monkeypatch.setattr(shard_writer, "write_shards", lambda *_, **__: signal.raise_signal(number))
    said = run_here("pipeline", tmp_path / "pipeline.yaml", "--stage", "shards")
    assert said.status == STOPPED and not said.out.strip(), said
    assert "Stopped as asked in stage shards. Rerun the same command to resume." in said.err
    assert (record := shards.record()) is not None and record.state == "begun"


def test_a_stage_whose_processes_tell_nothing_has_failed(make: Make) -> None:
    ending = Launch([sys.executable, "-c", "raise SystemExit(3)"])
    workflow = pipeline_workflow(make())
    mae = dataclasses.replace(workflow.named("mae"), launch=ending)
    outcome = run_stages([mae], Progress(dataclasses.replace(workflow, stages=[mae])))
    assert str(StageError("stage", outcome.failures[0])).startswith(
        "Stage mae failed: its processes ended with status 3. Their messages are above."
    )
    assert outcome.status == 3
    record = mae.record()
    assert record is not None and record.state == "failed" and "ended with status 3" in record.message


def test_states_are_listed(make: Make, tmp_path: Path, tiny_shards: Path) -> None:
    pipeline, path = make(), tmp_path / "pipeline.yaml"
    shutil.copytree(tiny_shards, pipeline.out / "shards")
    finish(of(pipeline, "shards"))
    mae = of(pipeline, "mae")
    mae.records.write(StageRecord(mae.made_from().parts))
    with held(of(pipeline, "features").lock):
        said = run_here("pipeline", path, "--list")
    for row in (r"shards .* done ", r"mae .* begun ", r"features .* running ", r"clusters .* waiting "):
        assert re.search(row, said.out), said.out
    said = run_here("pipeline", path, "words.shards=[images_per_shard=5]", "--list")
    assert re.search(r"shards .* changed ", said.out), said.out


def test_stages_out_of_turn_are_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    path = tmp_path / "pipeline.yaml"
    assert "no stage cluster; it has shards, mae, " in refused("pipeline", path, "--stage", "cluster")
    assert "mae comes after shards, which is not done" in refused("pipeline", path, "--stage", "mae")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert "one of 2 processes, and shards runs in one" in refused("pipeline", path, "--stage", "shards")
    assert "one of 2 processes, and the whole pipeline runs in one" in refused("pipeline", path)


def test_what_is_queued(make: Make, tiny_shards: Path) -> None:
    """Sixteen images a step are shared by 4 or 8 processes, but not by 12."""
    resources = {"shards": {"gpus_per_node": 0, "cpus_per_task": 16}, "features": {"nodes": 1, "min_nodes": None}}
    pipeline = make(resources=resources)
    profile = SlurmProfile(nodes=4, min_nodes=1, gpus_per_node=4, cpus_per_task=8)
    groups = queued_stages(stages_of(pipeline), profile)
    assert [group.needs for group in groups] == [[], *([name] for name in NAMES[:4]), ["moce"]], "a chain"
    queued = {group.stages[0].name: (group.profile, group.usable_nodes) for group in groups if len(group.stages) == 1}
    assert list(queued) == [stage.name for stage in stages_of(pipeline)]
    shards, _ = queued["shards"]
    assert (shards.nodes, shards.processes_per_node, shards.gpus_per_node, shards.cpus_per_task) == (1, 1, 0, 16)
    for name in ("mae", "moce"):
        assert queued[name] == (profile, [1, 2, 4])
    features, usable = queued["features"]
    assert (features.nodes, features.processes_per_node, usable) == (1, 4, [])
    clusters, _ = queued["clusters"]
    assert (clusters.nodes, clusters.min_nodes, clusters.processes_per_node, clusters.gpus_per_node) == (1, None, 1, 1)

    shutil.copytree(tiny_shards, pipeline.out / "shards")
    (pipeline.out / "clusters").mkdir()
    (pipeline.out / "clusters" / "clusters.json").touch()
    for name in ("shards", "clusters"):
        finish(of(pipeline, name))
        assert of(pipeline, name).is_done()
    queued_then = [group.stages[0].name for group in queued_stages(stages_of(pipeline), profile)]
    assert queued_then == list(queued)[1:], "what comes after a stage that is run may change with it"


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({"mae": {"gpus": 4}}, r"resources.mae\):\n  gpus: no such setting. Known settings: nodes, "),
        ({"moce": {"nodes": 3}}, "moce: optim.batch_size: 16 is not divisible by 3 processes"),
    ],
)
def test_resources_that_are_refused(make: Make, resources: dict[str, Any], told: str) -> None:
    pipeline = make(resources=resources)
    with pytest.raises(ConfigError, match=told):
        queued_stages(stages_of(pipeline), SlurmProfile())
