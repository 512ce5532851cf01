"""Every YAML of ours is accepted by its verb and repeats nothing, and those of pre-training can be planned."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import moce_ds.cli.workflow
from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.main import moce
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, stages_of
from moce_ds.cli.workflow.study_grid import StudySettings, cells_of, check_settings
from moce_ds.cli.workflow.submit import queued_stages
from moce_ds.cli.workflow.transfer_tasks import TaskSettings
from moce_ds.clustering.build import ClusterSettings
from moce_ds.common.config.settings import from_tree, load, to_tree, to_yaml
from moce_ds.common.errors import ConfigError
from moce_ds.data.sources.public.datasets import NAMES
from moce_ds.training.settings import PretrainSettings

CONFIGS = Path(__file__).parent.parent / "configs"
INSTALLED = Path(moce_ds.cli.workflow.__file__).parent / "configs"
ALL = sorted({path.resolve() for folder in (CONFIGS, INSTALLED) for path in folder.rglob("*.y*ml")})
PRETRAIN = [path for path in ALL if "run" in yaml.safe_load(path.read_text())]
STUDIES = sorted((CONFIGS / "studies").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "imagenet").glob("*.yaml"))
PIPELINES = [path for path in ALL if "mae" in yaml.safe_load(path.read_text()) or path in RECIPES]
BY_FOLDER = {"studies": StudySettings, "slurm": SlurmProfile, "demo": ClusterSettings, "tasks": TaskSettings}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS if path.is_relative_to(CONFIGS) else INSTALLED))


def kind(path: Path) -> Any:
    """The settings class of a file."""
    special = dict.fromkeys(PRETRAIN, PretrainSettings) | dict.fromkeys(PIPELINES, PipelineSettings)
    return special.get(path) or BY_FOLDER[path.parent.name]


def test_there_are_configs_of_both_kinds() -> None:
    archs = {load(PretrainSettings, path).model.arch for path in PRETRAIN}
    assert archs == {"mae", "moce", "sdr"}


@pytest.mark.parametrize("path", ALL, ids=name)
def test_config_loads_and_comes_back(path: Path, tmp_path: Path) -> None:
    cls = kind(path)
    config = load(cls, path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load(cls, resolved) == config
    # A file says only what differs from the defaults, so what it says is found in the result.
    given = yaml.safe_load(path.read_text())
    tree = to_tree(config)
    for group, values in given.items():
        if cls is PipelineSettings and group == "settings":
            continue  # read as dotted keys; test_an_imagenet_recipe_resolves has them
        for key, value in values.items() if isinstance(values, dict) else ():
            assert tree[group][key] == value, f"{group}.{key}"


@pytest.mark.parametrize("path", [path for path in ALL if CONFIGS / "imagenet" not in path.parents], ids=name)
def test_composed_settings_are_those_before_files_had_bases(path: Path) -> None:
    """The trees were written by the last version whose files had no `base`; that of ImageNet came later, and so did
    the demo's `reconstruction`."""
    trees = json.loads((Path(__file__).parent / "fixtures/composed_configs.json").read_text())
    tree = trees[name(path).replace("tasks/", "transfer/")]
    assert len(trees) == len([one for one in ALL if CONFIGS / "imagenet" not in one.parents])
    assert load(kind(path), path) == from_tree(kind(path), tree, "the recorded tree")


def test_no_file_repeats_a_model() -> None:
    models = {name(path): yaml.safe_load(path.read_text()).get("model", {}) for path in PRETRAIN}
    for one, other in combinations(models, 2):
        repeated = models[one].items() & models[other].items() - {("vit", "vit_tiny_patch16_224")}
        assert len(repeated) < 3, f"{one} and {other}: {repeated}; let one be the base of the other"


def plan(path: Path, processes: int) -> dict[str, str]:
    """The table that `moce pretrain --dry-run` prints, by row."""
    result = CliRunner().invoke(moce, ["pretrain", str(path), "--dry-run", "--processes", str(processes)])
    assert result.exit_code == 0, result.output
    rows: dict[str, str] = {}
    for line in result.output.splitlines():
        if line.startswith("│"):
            row, text = (cell.strip() for cell in line.split("│")[1:3])
            row = row or list(rows)[-1]  # a long text goes on in the next line
            rows[row] = f"{rows.get(row, '')} {text}".strip()
    return rows


@pytest.mark.parametrize("path", PRETRAIN, ids=name)
def test_config_can_be_planned(path: Path) -> None:
    config = load(PretrainSettings, path)
    processes = config.experts.ep_size if config.model_kind.has_experts else 2
    rows = plan(path, processes)
    assert rows["batch"].startswith(f"{config.optim.batch_size} = {processes} processes x ")
    sizes = re.match(r"total ([\d.]+) ([KM]), active ([\d.]+) ([KM])", rows["parameters"])
    assert sizes
    total, active = (
        float(size) * {"K": 1e3, "M": 1e6}[unit] for size, unit in (sizes.groups()[:2], sizes.groups()[2:])
    )
    if config.model_kind.has_experts:
        assert total > active
        assert rows["experts"].startswith(f"{config.experts.num} in each of blocks")
        assert f"rank {processes - 1}: " in rows["experts"]
    else:
        assert total == active and "experts" not in rows


def test_the_base_size_is_that_of_the_public_model() -> None:
    """111.9 M parameters, of which its files count 0.25 M of fixed positions; the encoder is timm's ViT-B/16."""
    rows = plan(CONFIGS / "vit_base_mae.yaml", 1)
    assert rows["parameters"].startswith("total 111.7 M, active 111.7 M, encoder 85.6 M")


@pytest.mark.parametrize(("study", "count", "sizes"), [("experts", 15, {2}), ("scaling", 7, {1, 2, 4, 8})])
def test_every_cell_of_a_study_is_accepted(
    study: str, count: int, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    assert [path.stem for path in STUDIES] == ["experts", "scaling"]
    cells = cells_of(load(StudySettings, CONFIGS / "studies" / f"{study}.yaml"))
    check_settings(cells)
    assert len(cells) == count and {cell.world_size for cell in cells} == sizes


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_every_stage_of_a_pipeline_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    pipeline = load(PipelineSettings, path)
    stages = stages_of(pipeline)
    check_batches(stages, pipeline.processes)
    names = ["shards", "mae", "features", "clusters", "moce", "dense", "export", "evaluation"]
    without = {"dense"} if not pipeline.dense else set() if pipeline.tasks else {"export"}
    assert [stage.name for stage in stages] == [name for name in names if name not in without]
    for stage, changes in pipeline.resources.items():
        from_tree(SlurmProfile, changes, f"resources.{stage}")


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_an_imagenet_recipe_resolves_and_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one box and on four nodes, whose SLURM profiles it fits."""
    monkeypatch.chdir(CONFIGS.parent)
    pipeline = load(PipelineSettings, path)
    configs = {stage.name: stage.config for stage in stages_of(pipeline)}
    runs = [configs[stage] for stage in ("mae", "moce", "dense")]
    size = next(size for size in ("small", "large", "base") if size in path.stem or size == "base")
    assert {config.model.vit for config in runs} == {f"vit_{size}_patch16_224"}
    assert len({config.vit_shape for config in runs}) == 1 and len({config.model.decoder for config in runs}) == 1
    assert (runs[1].optim.epochs, runs[1].optim.base_lr) == (runs[2].optim.epochs, runs[2].optim.base_lr)
    assert (runs[0].run.init_from is not None) == ("public" in path.stem)
    assert ({config.data.order for config in runs} == {"blocks"}) == (path.stem == "imagenet22k")
    assert len({load(PipelineSettings, other).out for other in RECIPES}) == len(RECIPES)
    for profile in (CONFIGS / "imagenet/slurm").glob("*.yaml"):
        queued_stages(stages_of(pipeline), load(SlurmProfile, profile))
    planned = CliRunner().invoke(moce, ["pipeline", str(path), "--plan", "h100", "--nodes", "4", "--images", "1281167"])
    assert planned.exit_code == 0 and re.search(r"moce +│ +\d", planned.output), planned.output
    assert "do not fit" not in planned.output


def test_the_plan_of_a_pipeline_needs_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    planned = CliRunner().invoke(moce, ["pipeline", "configs/imagenet/vit_base.yaml", "--plan", "h100"])
    assert isinstance(planned.exception, ConfigError) and "--images: " in str(planned.exception)


def test_the_eleven_tasks_have_their_metrics() -> None:
    tasks = {path.stem: load(TaskSettings, path) for path in (INSTALLED / "tasks").glob("*.yaml")}
    public = {name: config for name, config in tasks.items() if config.dataset}
    assert sorted(public) == NAMES and set(tasks) - set(public) == {"digits", "textiles"}
    assert all((config.dataset, config.data) == (name, Path("tasks") / name) for name, config in public.items())
    per_class = {name for name, config in public.items() if config.metric == "mean_per_class"}
    assert per_class == {"aircraft", "caltech101", "flowers102", "pets"}
    assert [name for name, config in public.items() if config.metric == "map11"] == ["voc2007"]
