"""A pipeline on paper: its settings, its stages as commands of `moce`, and what can be refused before any is run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from moce_ds.clustering.settings import ClusterSettings
from moce_ds.config.settings import KeysOf, option, settings, word
from moce_ds.config.values import arguments
from moce_ds.config.words import read_settings
from moce_ds.data.shard_writer import ShardSettings
from moce_ds.errors import ConfigError
from moce_ds.launch.slurm_profile import SlurmProfile
from moce_ds.models.encode_settings import EncodeSettings, FeatureSettings
from moce_ds.training.settings import Positive, PretrainSettings, batch_arithmetic
from moce_ds.workflow.stage import Name, Stage
from moce_ds.workflow.study_grid import TaskName, check_there

_SETTINGS: dict[Name, type[Any]] = {
    "shards": ShardSettings,
    "mae": PretrainSettings,
    "features": FeatureSettings,
    "clusters": ClusterSettings,
    "moce": PretrainSettings,
    "export": EncodeSettings,
    "evaluation": EncodeSettings,
}
_PARTS = ("train", "test")


@settings
class PipelineSettings:
    """The settings of `moce pipeline`."""

    out: Path = option(help="folder of everything that the stages write")
    images: Path | None = option(None, "folder of images to pre-train on, of which shards are made")
    shards: Path | None = option(None, "instead of images: a shard set that is there already")
    mae: Path = option(help="YAML file of `moce pretrain` for the dense MAE")
    moce: Path = option(help="YAML file of `moce pretrain` for the model with experts")
    words: dict[Name, list[str]] = option({}, "for each stage, more words for its verbs: key=value, or a YAML file")
    tasks: dict[TaskName, Path] = option(
        {}, "name and folder of tasks; a folder holds train/ and test/, of images or of shards"
    )
    heldout: Path | None = option(None, "held-out images, for the reconstruction error of the experts")
    processes: Positive = option(2, "processes that share pre-training and features on this machine")
    resources: dict[Name, Annotated[dict[str, Any], KeysOf(SlurmProfile)]] = option(
        {}, "for each stage, keys in which its job differs from the profile"
    )

    def __post_init__(self) -> None:
        if (self.images is None) == (self.shards is None):
            raise ValueError("images, shards: give one of them, a folder of images or a shard set")
        for stage in ("mae", "moce"):
            own = {text.partition("=")[0] for text in self.chosen(stage)}
            if taken := own & {text.partition("=")[0] for text in self.words.get(stage, [])}:
                raise ValueError(f"words.{stage}: the pipeline itself chooses {', '.join(sorted(taken))}")

    @property
    def shard_set(self) -> Path:
        """The shards to pre-train on."""
        return self.shards or self.out / "shards"

    def chosen(self, stage: Literal["mae", "moce"]) -> list[str]:
        """Settings of a pre-training that follow from the pipeline."""
        own = {"data.shards": self.shard_set, "run.out": self.out / stage}
        if stage == "moce":
            own |= {"experts.clusters": self.out / "clusters", "run.init_from": self.out / "mae"}
        return [word(key, path) for key, path in own.items()]

    def words_of(self, stage: Name) -> list[str]:
        """The settings of a stage's verbs, as words."""
        given = self.words.get(stage, [])
        if stage == "mae" or stage == "moce":
            return [*arguments([self.mae if stage == "mae" else self.moce]), *given, *self.chosen(stage)]
        return given


def stages_of(pipeline: PipelineSettings) -> list[Stage]:
    """The stages in order; those that have nothing to do are left out.

    Raises:
        ConfigError: a fault in the settings of any stage; every one is listed.
    """
    configs, folder = _configs(pipeline), pipeline.out / "pipeline"
    return [
        Stage(name, folder, configs[name], [arguments(command) for command in commands], reads, makes)
        for name, commands, reads, makes in _drafts(pipeline)
    ]


def _configs(pipeline: PipelineSettings) -> dict[Name, Any]:
    """The settings of every stage's verbs. Raises ConfigError, listing every fault."""
    found: dict[Name, Any] = {}
    faults = []
    for name, cls in _SETTINGS.items():
        try:
            found[name] = read_settings(cls, pipeline.words_of(name), origin=f"words.{name}")
        except ConfigError as error:
            faults.append(f"{name}: {error}")
    faults += [
        f"{name}: model.arch is {found[name].model.arch}; expected {name}"
        for name in ("mae", "moce")
        if name in found and found[name].model.arch != name
    ]
    if pipeline.tasks and "moce" in found:
        experts = found["moce"].experts
        if experts.k > 1 or experts.shared_expert or experts.gate == "token":
            faults.append("tasks: no expert can be exported with experts.k=2, shared_expert=true or gate=token")
    if faults:
        raise ConfigError("Nothing was run. " + "\n".join(faults))
    return found


_Draft = tuple[Name, list[list[Any]], list[Path], list[Path]]


def _drafts(pipeline: PipelineSettings) -> Iterator[_Draft]:
    """Name, commands, reads and makes of every stage."""
    out, more, shards = pipeline.out, pipeline.words_of, pipeline.shard_set
    mae, features, clusters, moce = (out / name for name in ("mae", "features", "clusters", "moce"))
    if pipeline.images:
        yield "shards", [["shards", pipeline.images, shards, *more("shards")]], [], [shards]
    yield "mae", [["pretrain", *more("mae")]], [shards], [mae]
    yield "features", [["features", mae, shards, features, *more("features")]], [shards, mae], [features]
    clustering = ["cluster", features, clusters, "--shards", shards, *more("clusters")]
    yield "clusters", [clustering], [shards, features], [clusters]
    yield "moce", [["pretrain", *more("moce")]], [shards, mae, clusters], [moce]

    results, report = out / "results.json", out / "report.html"
    given = [folder / part for folder in pipeline.tasks.values() for part in _PARTS]
    splits = [_split(pipeline, task)[part] for task in pipeline.tasks for part in _PARTS]
    experts = [out / "experts" / task for task in pipeline.tasks]
    exporting = [command for task in pipeline.tasks for command in _export(pipeline, task)]
    evaluating = [command for task in pipeline.tasks for command in _evaluate(pipeline, task)]
    if pipeline.tasks:
        yield "export", exporting, [moce, *given], [*splits, *experts, results]
    if pipeline.heldout:
        options = ["--data", pipeline.heldout, "--dense", mae, "--task", "held out", "--results", results]
        evaluating.append(["evaluate", moce, *options, *more("evaluation")])
    heldout = [pipeline.heldout] if pipeline.heldout else []
    made = [results, report] if evaluating else [report]
    yield "evaluation", [*evaluating, ["report", out]], [mae, moce, *splits, *experts, *heldout], made


def _split(pipeline: PipelineSettings, task: str) -> dict[str, Path]:
    """Shards of a task's training and test images: given as such, or to be made."""
    given = {part: pipeline.tasks[task] / part for part in _PARTS}
    made = pipeline.out / "tasks" / task
    return {part: place if (place / "shards.json").exists() else made / part for part, place in given.items()}


def _export(pipeline: PipelineSettings, task: str) -> Iterator[list[Any]]:
    """Select and export a task's expert."""
    moce, split = pipeline.out / "moce", _split(pipeline, task)
    for part, shards in split.items():
        if shards != (images := pipeline.tasks[task] / part):
            yield ["shards", images, shards, *pipeline.words_of("shards")]
    more = ["--data", split["train"], *pipeline.words_of("export")]
    exporting = ["--export", pipeline.out / "experts" / task, "--replace"]
    yield ["select", moce, "--task", task, "--results", pipeline.out / "results.json", *exporting, *more]


def _evaluate(pipeline: PipelineSettings, task: str) -> Iterator[list[Any]]:
    """Measure a task's expert beside the dense MAE."""
    out, split = pipeline.out, _split(pipeline, task)
    more = ["--train", split["train"], "--test", split["test"], "--task", task, "--results", out / "results.json"]
    for model, encoder in (("dense", out / "mae"), ("expert", out / "experts" / task)):
        for verb in ("knn", "probe"):
            yield [verb, encoder, "--model", model, *more, *pipeline.words_of("evaluation")]


def check_batches(stages: Sequence[Stage], processes: int) -> None:
    """Check that so many processes can share the batches of pre-training. Raises ConfigError."""
    for stage in stages:
        if isinstance(stage.config, PretrainSettings):
            try:
                batch_arithmetic(stage.config, processes)
            except ConfigError as error:
                raise ConfigError(f"{stage.name}: {error}") from None


def check_folders(pipeline: PipelineSettings, stages: Sequence[Stage]) -> None:
    """Check that what is given is there, and that no run folder holds another run.

    Raises:
        ConfigError: every missing place is listed; or the settings in which a run that is there differs.
    """
    given = {f"tasks.{name}": [folder / part for part in _PARTS] for name, folder in pipeline.tasks.items()}
    given |= {"images": [pipeline.images]} if pipeline.images else {}
    given |= {"shards": [pipeline.shards / "shards.json"]} if pipeline.shards else {}
    given |= {"heldout": [pipeline.heldout]} if pipeline.heldout else {}
    check_there(given)
    for stage in stages:
        if isinstance(stage.config, PretrainSettings) and not stage.is_done():
            from moce_ds.training.run_checks import check_run  # brings DeepSpeed along

            check_run(stage.config)
