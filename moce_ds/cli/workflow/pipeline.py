"""`moce pipeline CONFIG`: all stages from images to a report. Each stage needs the previous one.

`PipelineSettings` and the settings of every stage's verbs determine the `moce` commands of each stage. Faults in any of
them are refused before anything is run.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from rich.table import Table

from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.workflow.runner import Failure, Progress, StageError, run_stages, states_table
from moce_ds.cli.workflow.stage import Launch, Stage, StageFile, Workflow, input_digest, perform, run_commands
from moce_ds.cli.workflow.study_grid import TaskName, check_there
from moce_ds.clustering.settings import ClusterSettings
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import KeysOf, Positive, from_tree, option, settings, to_tree, word
from moce_ds.common.config.values import Reading, arguments, opened
from moce_ds.common.errors import ConfigError, MoceError
from moce_ds.common.host.program import say
from moce_ds.common.host.rank import ProcessRank
from moce_ds.data.shard_manifest import MANIFEST
from moce_ds.data.shard_writer import ShardSettings
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.settings import EncodeSettings, FeatureSettings
from moce_ds.evaluation.expert_sheet import PICTURES
from moce_ds.evaluation.results_file import RESULTS
from moce_ds.inspection.pipeline_folder import PIPELINE, StagesRecord
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import PretrainSettings

_logger = logging.getLogger(__name__)

Name = Literal["shards", "mae", "features", "clusters", "moce", "dense", "export", "evaluation"]
"""The stages, in order."""

_PARALLEL = ("mae", "features", "moce", "dense")
_SETTINGS: dict[Name, type[Any]] = {
    "shards": ShardSettings,
    "mae": PretrainSettings,
    "features": FeatureSettings,
    "clusters": ClusterSettings,
    "moce": PretrainSettings,
    "dense": PretrainSettings,
    "export": EncodeSettings,
    "evaluation": EncodeSettings,
}
_PARTS = ("train", "test")
_ARCHS: dict[Name, str] = {"mae": "mae", "moce": "moce, token_moe or sdr", "dense": "mae"}
"""What `model.arch` may be in the stages of pre-training."""

_RUNS = tuple(_ARCHS)


class _OfStages(Reading):
    """Reads a mapping from stages to settings: values have the types of the settings of the stage's verbs."""

    def read(self, value: Any, key: str) -> Any:
        """Dotted keys with values of plain data, for each stage; validation refuses a name that is no stage."""
        value = opened(value, key)
        if not isinstance(value, dict):
            return value
        kinds = {name: KeysOf(cls) for name, cls in _SETTINGS.items()}
        return {
            name: kinds[name].read(part, f"{key}.{name}") if name in kinds else part for name, part in value.items()
        }


@settings
class PipelineSettings:
    """The settings of `moce pipeline`."""

    out: Path = option(help="folder of everything that the stages write")
    images: Path | None = option(None, "folder of images for pre-training, which become shards")
    shards: Path | None = option(None, "instead of images: an existing shard set")
    mae: Path | None = option(None, "YAML file of `moce pretrain` for the dense MAE; null: settings.mae alone")
    moce: Path | None = option(
        None, "the same for the model with experts; null: it builds on the settings of the dense MAE"
    )
    settings: Annotated[dict[Name, dict[str, Any]], _OfStages()] = option(
        {}, "for each stage, settings of its verbs as in their YAML files, such as settings.mae.optim.epochs"
    )
    words: dict[Name, list[str]] = option({}, "for each stage, more words for its verbs: key=value, or a YAML file")
    dense: bool = option(
        False, "also train the dense MAE for as many more epochs as the experts, and compare the experts with it"
    )
    tasks: dict[TaskName, Path] = option(
        {}, "name and folder of tasks; a folder holds train/ and test/, of images or of shards"
    )
    heldout: Path | None = option(None, "held-out images, for the reconstruction error of the experts")
    reconstruction: bool = option(
        False, "also measure how the tasks' test images are reconstructed, and draw what each expert makes of them"
    )
    processes: Positive = option(2, "processes that share pre-training and features on this machine")
    resources: dict[Name, Annotated[dict[str, Any], KeysOf(SlurmProfile)]] = option(
        {}, "for each stage, keys in which its job differs from the profile"
    )

    def __post_init__(self) -> None:
        if (self.images is None) == (self.shards is None):
            raise ValueError("images, shards: give one of them, a folder of images or a shard set")
        for stage in _RUNS:
            own = {text.partition("=")[0] for text in self.chosen(stage)}
            given = {text.partition("=")[0] for text in self.words.get(stage, [])}
            for group, names in (("words", given), ("settings", self.settings.get(stage, {}))):
                if taken := own.intersection(names):
                    raise ValueError(f"{group}.{stage}: the pipeline sets {', '.join(sorted(taken))}")

    @property
    def shard_set(self) -> Path:
        """The shards to pre-train on."""
        return self.shards or self.out / "shards"

    @property
    def baseline(self) -> Path:
        """The dense run that the experts are compared with."""
        return self.out / ("dense" if self.dense else "mae")

    def chosen(self, stage: Name) -> list[str]:
        """The settings of a stage of pre-training that the pipeline sets."""
        own: dict[str, object] = {"data.shards": self.shard_set, "run.out": self.out / stage}
        if stage == "moce":
            own["experts.clusters"] = self.out / "clusters"
        if stage == "dense":
            own["model.arch"] = "mae"
        if stage != "mae":
            own["run.init_from"] = self.out / "mae"
        return [word(key, value) for key, value in own.items()]

    def words_of(self, stage: Name) -> list[str]:
        """The settings of a stage's verbs, as words of a command line; of several with one key, the last."""
        files = {"mae": self.mae, "moce": self.moce or self.mae, "dense": self.moce or self.mae}
        words = arguments([file]) if (file := files.get(stage)) else []
        for name in self._builds_on(stage):
            words += [word(key, value) for key, value in self.settings.get(name, {}).items()]
            words += self.words.get(name, [])
        words += self.chosen(stage) if stage in _RUNS else []
        return list({text.partition("=")[0]: text for text in words}.values())

    def _builds_on(self, stage: Name) -> list[Name]:
        """The stages whose settings a stage has, the last one wins."""
        if stage == "dense":
            return [*self._builds_on("moce"), stage]
        return ["mae", stage] if stage == "moce" and self.moce is None else [stage]


def run_pipeline(words: Sequence[str], only: str | None = None) -> int:
    """Run all stages that are not done, in order, or `only` one; returns the exit status (STOPPED if asked to stop).

    Several such processes share the stages: each waits for the stages that another one runs. A process that torchrun or
    a job has started is one of the processes of the stage.

    Args:
        words: the words of `moce pipeline`, passed to the processes of a parallel stage.

    Raises:
        ConfigError: before anything is run: a fault in the settings of any stage, a folder that is missing or holds
            another run, or a stage that cannot run yet.
        StageError: a stage failed; later stages were not run.
    """
    pipeline = read_settings(PipelineSettings, words)
    workflow = pipeline_workflow(pipeline, words)
    stages = workflow.stages
    chosen = stages if only is None else [_in_turn(workflow, only)]
    _check_processes(chosen)
    check_folders(pipeline, stages)
    if only is not None and chosen[0].parallel and "RANK" in os.environ:
        _share(chosen[0])
        return 0
    check_batches(chosen, pipeline.processes)
    keep_stages(stages, pipeline.out)
    outcome = run_stages(chosen, Progress(workflow))
    for stage in outcome.stopped:
        _logger.info(f"Stopped as asked in stage {stage.name}. Rerun the same command to resume.")
    for failure in outcome.failures:
        if not failure.shown:
            raise StageError("stage", failure)
    if outcome.status == 0:
        say(f"{workflow.summary(stages)} in {pipeline.out}.")
    return outcome.status


def list_pipeline(words: Sequence[str]) -> Table:
    """A table of the stages and their states. Raises ConfigError for a fault in the settings of any stage."""
    pipeline = read_settings(PipelineSettings, words)
    return states_table(pipeline_workflow(pipeline), f"{pipeline.images or pipeline.shards} -> {pipeline.out}")


def keep_stages(stages: Sequence[Stage], out: Path) -> None:
    """Record the order of the stages and their outputs, to verify the folder later. Raises ArtefactError."""
    makes: dict[str, list[str]] = {
        stage.name: [str(place.relative_to(out) if place.is_relative_to(out) else place) for place in stage.outputs]
        for stage in stages
    }
    StagesRecord(makes).write(out)


def _share(stage: Stage) -> None:
    """Run a stage as one of its processes. Raises StageError in the first process, MoceError in the others."""
    try:
        perform(stage)
    except MoceError as error:
        if ProcessRank.here().rank:
            raise
        raise StageError("stage", Failure(stage, str(error), error.status)) from None


def _in_turn(workflow: Workflow, name: str) -> Stage:
    """The stage called `name`. Raises ConfigError if an earlier stage is not done."""
    stage = workflow.named(name)
    before = workflow.stages[: workflow.stages.index(stage)]
    waiting = next((earlier.name for earlier in before if not earlier.is_done()), None)
    if waiting is not None:
        raise ConfigError(f"--stage: {name} comes after {waiting}, which is not done: run --stage {waiting} first.")
    return stage


def _check_processes(chosen: Sequence[Stage]) -> None:
    """Raise ConfigError if a launcher has started several processes and they cannot share the work."""
    here = ProcessRank.here().world_size
    if here > 1 and not (len(chosen) == 1 and chosen[0].parallel):
        what = chosen[0].name if len(chosen) == 1 else "the whole pipeline"
        raise ConfigError(f"This is one of {here} processes, and {what} runs in one. Name a stage that they share.")


def pipeline_workflow(pipeline: PipelineSettings, words: Sequence[str] = ()) -> Workflow:
    """The stages as a workflow, without those that have nothing to do.

    Args:
        words: the words of `moce pipeline`, passed to the processes of a parallel stage.

    Raises:
        ConfigError: a fault in the settings of any stage; every one is listed.
    """
    configs = _configs(pipeline)
    stages: list[Stage] = []
    experts = configs["moce"]
    drawn = pipeline.reconstruction and experts.experts.k == 1 and experts.model_kind.routes_by_cluster
    for draft in _drafts(pipeline, drawn):
        stages.append(_stage(pipeline, draft, configs[draft.name], [stage.name for stage in stages[-1:]], words))
    return Workflow("pipeline", "stage", pipeline.out, stages)


def stages_of(pipeline: PipelineSettings) -> Sequence[Stage]:
    """The stages in order. Raises ConfigError if `pipeline_workflow` does."""
    return pipeline_workflow(pipeline).stages


class _Draft(NamedTuple):
    """A row of the table of stages in docs/pipeline.md."""

    name: Name
    commands: list[list[Any]]
    reads: list[Path]
    makes: list[Path]


def _stage(pipeline: PipelineSettings, draft: _Draft, config: Any, needs: list[str], words: Sequence[str]) -> Stage:
    name, folder = draft.name, pipeline.out / PIPELINE
    commands = [arguments(command) for command in draft.commands]

    def made_from() -> MadeFrom:
        read = {str(place): input_digest(place) for place in draft.reads}
        parts = {"commands": commands, "settings": to_tree(config), "read": read}
        return MadeFrom(parts, {"settings": type(config)}, digests=["read"])

    def work() -> dict[str, Any]:
        run_commands(commands)
        return {}

    def profile(common: SlurmProfile) -> SlurmProfile:
        tree = to_tree(common) | pipeline.resources.get(name, {})
        sized = from_tree(SlurmProfile, tree, f"resources.{name}")
        return sized if parallel else sized.for_one_process()

    parallel = name in _PARALLEL
    start = [sys.executable, "-m", "moce_ds", "pipeline", *words, "--stage", name]
    return Stage(
        name,
        StageFile(folder / f"{name}.json"),
        folder / f".{name}.lock",
        made_from,
        work,
        share=partial(run_commands, commands) if parallel else None,
        outputs=draft.makes,
        needs=needs,
        processes=pipeline.processes if parallel else 1,
        launch=Launch(start) if parallel else None,
        commands=commands,
        config=config,
        profile=profile,
    )


def _configs(pipeline: PipelineSettings) -> dict[Name, Any]:
    """The settings of every stage's verbs. Raises ConfigError, which lists every fault."""
    found: dict[Name, Any] = {}
    faults = []
    for name, cls in _SETTINGS.items():
        if name == "dense" and not pipeline.dense:
            continue
        try:
            found[name] = read_settings(cls, pipeline.words_of(name), origin=f"settings.{name} and words.{name}")
        except ConfigError as error:
            faults.append(f"{name}: {error}")
    faults += [
        f"{name}: model.arch is {found[name].model.arch}; expected {archs}"
        for name, archs in _ARCHS.items()
        if name in found and found[name].model_kind.has_experts != (name == "moce")
    ]
    if pipeline.tasks and "moce" in found:
        experts, by_cluster = found["moce"].experts, found["moce"].model_kind.routes_by_cluster
        if experts.k > 1 or experts.shared_expert or not by_cluster:
            faults.append(
                "tasks: no expert can be exported with experts.k=2, shared_expert=true or model.arch=token_moe"
            )
    if faults:
        raise ConfigError("Nothing was run. " + "\n".join(faults))
    return found


def _drafts(pipeline: PipelineSettings, drawn: bool) -> Iterator[_Draft]:
    """The name, commands, inputs and outputs of every stage; `drawn`: with pictures of reconstructions."""
    out, more, shards = pipeline.out, pipeline.words_of, pipeline.shard_set
    mae, features, clusters, moce = (out / name for name in ("mae", "features", "clusters", "moce"))
    baseline = pipeline.baseline
    if pipeline.images:
        yield _Draft("shards", [["shards", pipeline.images, shards, *more("shards")]], [], [shards])
    yield _Draft("mae", [["pretrain", *more("mae")]], [shards], [mae])
    yield _Draft("features", [["features", mae, shards, features, *more("features")]], [shards, mae], [features])
    clustering = ["cluster", features, clusters, "--shards", shards, *more("clusters")]
    yield _Draft("clusters", [clustering], [shards, features], [clusters])
    yield _Draft("moce", [["pretrain", *more("moce")]], [shards, mae, clusters], [moce])
    if pipeline.dense:
        yield _Draft("dense", [["pretrain", *more("dense")]], [shards, mae], [baseline])

    results, report = out / RESULTS, out / "report.html"
    given = [folder / part for folder in pipeline.tasks.values() for part in _PARTS]
    splits = [_split(pipeline, task)[part] for task in pipeline.tasks for part in _PARTS]
    experts = [out / "experts" / task for task in pipeline.tasks]
    exporting = [command for task in pipeline.tasks for command in _export(pipeline, task)]
    evaluating = [command for task in pipeline.tasks for command in _evaluate(pipeline, task, drawn)]
    if pipeline.tasks:
        yield _Draft("export", exporting, [moce, *given], [*splits, *experts, results])
    if pipeline.heldout:
        evaluating.append(_reconstruct(pipeline, "held out", pipeline.heldout, drawn))
    heldout = [pipeline.heldout] if pipeline.heldout else []
    made = [results, report] if evaluating else [report]
    yield _Draft("evaluation", [*evaluating, ["report", out]], [baseline, moce, *splits, *experts, *heldout], made)


def _split(pipeline: PipelineSettings, task: str) -> dict[str, Path]:
    """The shard sets of a task's training and test images, given or made by the pipeline."""
    given = {part: pipeline.tasks[task] / part for part in _PARTS}
    made = pipeline.out / "tasks" / task
    return {part: place if ShardSet.recognises(place) else made / part for part, place in given.items()}


def _export(pipeline: PipelineSettings, task: str) -> Iterator[list[Any]]:
    """Select and export a task's expert."""
    moce, split = pipeline.out / "moce", _split(pipeline, task)
    for part, shards in split.items():
        if shards != (images := pipeline.tasks[task] / part):
            yield ["shards", images, shards, *pipeline.words_of("shards")]
    more = ["--data", split["train"], *pipeline.words_of("export")]
    exporting = ["--export", pipeline.out / "experts" / task, "--replace"]
    yield ["select", moce, "--task", task, "--results", pipeline.out / RESULTS, *exporting, *more]


def _evaluate(pipeline: PipelineSettings, task: str, drawn: bool) -> Iterator[list[Any]]:
    """Measure a task's expert and the dense MAE."""
    out, split = pipeline.out, _split(pipeline, task)
    more = ["--train", split["train"], "--test", split["test"], "--task", task, "--results", out / RESULTS]
    for model, encoder in (("dense", pipeline.baseline), ("expert", out / "experts" / task)):
        for verb in ("knn", "probe"):
            yield [verb, encoder, "--model", model, *more, *pipeline.words_of("evaluation")]
    if pipeline.reconstruction:
        yield _reconstruct(pipeline, task, split["test"], drawn)


def _reconstruct(pipeline: PipelineSettings, name: str, images: Path, drawn: bool) -> list[Any]:
    """Measure the reconstruction of held-out images."""
    out = pipeline.out
    picture = ["--picture", out / PICTURES / f"{name}.png"] if drawn else []
    named = ["--data", images, "--dense", pipeline.baseline, "--task", name, "--results", out / RESULTS, *picture]
    return ["evaluate", out / "moce", *named, *pipeline.words_of("evaluation")]


def check_batches(stages: Sequence[Stage], processes: int) -> None:
    """Check that `processes` can share the batches of pre-training. Raises ConfigError."""
    for stage in stages:
        if isinstance(stage.config, PretrainSettings):
            try:
                batch_arithmetic(stage.config.optim, processes, stage.config.ep_size)
            except ConfigError as error:
                raise ConfigError(f"{stage.name}: {error}") from None


def check_folders(pipeline: PipelineSettings, stages: Sequence[Stage]) -> None:
    """Check that all given paths exist, and that no run folder holds another run.

    Raises:
        ConfigError: lists every missing path, or the settings in which an existing run differs.
    """
    given = {f"tasks.{name}": [folder / part for part in _PARTS] for name, folder in pipeline.tasks.items()}
    given |= {"images": [pipeline.images]} if pipeline.images else {}
    given |= {"shards": [pipeline.shards / MANIFEST]} if pipeline.shards else {}
    given |= {"heldout": [pipeline.heldout]} if pipeline.heldout else {}
    check_there(given)
    for stage in stages:
        if isinstance(stage.config, PretrainSettings) and not stage.is_done():
            from moce_ds.training.run_checks import RequestedRun  # imports torch

            RequestedRun(stage.config).check_folder()
