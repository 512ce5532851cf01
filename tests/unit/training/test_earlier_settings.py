"""Settings by the names of earlier versions are read as what they meant, wherever they stand.

`fixtures/earlier_settings` holds the config.yaml of a run of each kind, as commit f58ac09 wrote it.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moce_ds.checkpoint.format import step_folder, write_checkpoint
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.cli.workflow.study_grid import StudySettings, cells_of
from moce_ds.common.config import model_kinds
from moce_ds.common.config.command_line import read_settings, settings_layers
from moce_ds.common.config.printing import origin_of
from moce_ds.common.config.settings import completed, differences, from_tree, keys, load, to_tree
from moce_ds.common.errors import ConfigError
from moce_ds.models.build import VARIANTS
from moce_ds.report.build import read_runs
from moce_ds.training.run_checks import RequestedRun
from moce_ds.training.settings import PretrainSettings, settings_of_run
from tests.examples.moce_command import run_here

EARLIER = Path(__file__).parents[2] / "fixtures" / "earlier_settings"
TINY = [
    "model.patch_size=4", "model.width=16", "model.depth=3", "model.heads=2", "model.decoder_width=16",
    "model.decoder_depth=1", "model.decoder_heads=2", "optim.epochs=2", "optim.batch_size=12", "optim.base_lr=2e-2",
    "optim.warmup_epochs=0.2", "data.shards=shards", "data.image_size=16", "data.threads=1", "engine.precision=fp32",
    "run.out=run",
]  # fmt: skip
NOW = {
    "mae": "experts.num=6",
    "moce": "model.arch=moce experts.clusters=clusters experts.num=4",
    "token_moe": "model.arch=token_moe experts.num=4 token_moe.balance_weight=0.01",
    "sdr": "model.arch=sdr experts.clusters=clusters experts.num=4 sdr.stages=1 sdr.common=0.25 "
    "sdr.distillation_weight=0.5 run.init_from=dense",
}
"""The words of this version for the same runs."""


def now(kind: str, *words: str) -> PretrainSettings:
    return load(PretrainSettings, None, [*TINY, *NOW[kind].split(), *words])


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The notices logged so far. What other tests have logged is forgotten."""
    model_kinds._notice.cache_clear()
    caplog.set_level(logging.INFO, "moce_ds")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("kind", NOW)
def test_a_file_of_each_kind_means_what_it_meant(kind: str) -> None:
    assert load(PretrainSettings, EARLIER / f"{kind}.yaml") == now(kind)


@pytest.mark.parametrize("kind", NOW)
def test_an_earlier_run_folder_is_resumed(kind: str, tmp_path: Path, notices: Callable[[], list[str]]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(EARLIER / f"{kind}.yaml", run / "config.yaml")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    config = now(kind, f"run.out={run}")
    manifest = {"step": 1, "config": tree, "model": config.model_spec.to_tree()}
    write_checkpoint(step_folder(run, 1), {}, {}, manifest)
    assert settings_of_run(run / "config.yaml", PretrainSettings) == now(kind)
    RequestedRun(config).check_folder()
    RequestedRun(config).check_newest_checkpoint()
    assert notices() == [], "nobody is asked to edit what a run has written"
    with pytest.raises(ConfigError, match=r"experts.num: [46] -> 2"):
        RequestedRun(now(kind, f"run.out={run}", "experts.num=2")).check_folder()


def test_a_changed_setting_that_has_moved_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(EARLIER / "sdr.yaml", run / "config.yaml")
    with pytest.raises(ConfigError, match=r"sdr.common: 0.25 -> 0.5"):
        RequestedRun(now("sdr", f"run.out={run}", "sdr.common=0.5")).check_folder()


def test_words_are_translated_with_one_notice(notices: Callable[[], list[str]]) -> None:
    words = [*TINY, "model.arch=moce", "experts.gate=token", "experts.num=4", "experts.token_balance_weight=0.01"]
    assert read_settings(PretrainSettings, words) == read_settings(PretrainSettings, words) == now("token_moe")
    (notice,) = notices()
    assert notice == (
        "Settings of an earlier version in the command line: experts.gate=token is model.arch=token_moe now; "
        "experts.token_balance_weight is token_moe.balance_weight now."
    )


@pytest.mark.parametrize(
    ("file", "words", "arch"),
    [
        ({"model": {"arch": "moce"}, "experts": {"gate": "path"}}, ["experts.gate=cluster"], "moce"),
        ({"model": {"arch": "moce"}, "experts": {"gate": "token"}}, ["model.arch=mae"], "mae"),
        ({"model": {"arch": "moce"}}, ["experts.gate=token"], "token_moe"),
        ({"experts": {"gate": "token"}}, ["model.arch=moce"], "token_moe"),
        ({"experts": {"gate": "token"}}, [], "mae"),
        ({"model": {"arch": "moce"}}, ["experts={gate: token, token_balance_weight: 1}"], "token_moe"),
        ({"model": {"arch": "moce"}, "experts": {"gate": "path"}}, ["model.arch=sdr"], "sdr"),
    ],
)
def test_later_places_win_as_ever(tmp_path: Path, file: dict[str, Any], words: list[str], arch: str) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(file))
    more = [*TINY, "model.depth=4", "run.init_from=dense"] + ["experts.clusters=c"] * (
        "experts={" not in " ".join(words)
    )
    assert load(PretrainSettings, path, [*more, *words]).model.arch == arch


def test_a_word_replaces_the_moved_setting_of_a_file(tmp_path: Path) -> None:
    old = EARLIER / "sdr.yaml"
    assert load(PretrainSettings, old, ["sdr.stages=2"]).sdr.stages == 2
    assert load(PretrainSettings, old, ["experts.stages=3"]).sdr.stages == 3


def test_the_origin_of_a_moved_setting_is_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text("model:\n  arch: moce\nexperts:\n  gate: path\n  stages: 2\n")
    layers = settings_layers(PretrainSettings, [str(path), "experts.common=0.25"])
    origins = {key: origin_of(key, layers) for key in ("model.arch", "sdr.stages", "sdr.common", "experts.gate")}
    assert origins == {
        "model.arch": f"{path}:2",
        "sdr.stages": f"{path}:5",
        "sdr.common": "the command line",
        "experts.gate": "default",
    }


def test_every_kind_of_model_is_registered() -> None:
    archs = next(field.type for key, field in keys(PretrainSettings) if key == "model.arch").__args__
    assert set(archs) == set(VARIANTS) == {kind.arch for kind in model_kinds.MODEL_KINDS} == set(NOW)
    for kind in NOW:
        config = now(kind)
        assert config.model_kind is config.model_spec.model_kind and config.model_kind.arch == kind


def test_what_had_no_effect_is_left_out(notices: Callable[[], list[str]]) -> None:
    words = [*TINY, "model.arch=moce", "experts.clusters=c", "experts.stages=2"]
    assert read_settings(PretrainSettings, words).sdr.stages == 4
    assert notices()[0].endswith("experts.stages has no effect with model.arch=moce.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.arch=sdr", "sdr.stages=1", "experts.stages=2"], "experts.stages is the earlier name of sdr.stages"),
        (["model.arch=sdr", "experts.gate=token"], "experts.gate: got 'token'; expected 'cluster' or 'random'"),
        (["model.arch=moce", "experts.gate=path", "experts.stages=no"], "sdr.stages: got 'no'; expected"),
        (["experts.stage=2"], "experts.stage: no such setting."),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PretrainSettings, None, [*TINY, "experts.clusters=c", *words])
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", NOW)
def test_what_a_stage_has_recorded_is_what_it_is_compared_with(kind: str) -> None:
    recorded = yaml.safe_load((EARLIER / f"{kind}.yaml").read_text())
    assert differences(completed(recorded, PretrainSettings), to_tree(now(kind))) == {}


def test_a_study_has_the_cells_that_it_had(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"arch": "moce"}, "experts": {"clusters": "c"}}))
    grid = {"experts.gate": ["cluster", "path"], "experts.stages": [1, 2]}
    tree = {"out": str(tmp_path / "study"), "pretrain": str(base), "set": [*TINY[:-1], "run.init_from=d"], "grid": grid}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    cells = cells_of(load(StudySettings, tmp_path / "study.yaml"))
    assert [cell.name for cell in cells][2:] == ["gate=path,stages=1", "gate=path,stages=2"]
    assert [cell.at["experts.stages"] for cell in cells] == [1, 2, 1, 2]
    assert [cell.config().model.arch for cell in cells] == ["moce", "moce", "sdr", "sdr"]
    assert [cell.config().sdr.stages for cell in cells[2:]] == [1, 2]
    assert from_tree(StudySettings, to_tree(load(StudySettings, tmp_path / "study.yaml")), "a record") is not None


def test_the_report_and_inspect_name_the_kind(tmp_path: Path) -> None:
    for kind in NOW:
        (tmp_path / kind).mkdir()
        shutil.copy(EARLIER / f"{kind}.yaml", tmp_path / kind / "config.yaml")
    runs = {run.name: run.model_kind.title for run in read_runs(tmp_path).runs}
    assert runs == {"mae": "MAE", "moce": "MoCE", "sdr": "SDR", "token_moe": "TokenMoE"} and next(iter(runs)) == "mae"
    said = run_here("inspect", tmp_path / "sdr")
    assert said.status == 0 and "sdr" in said.out


def test_the_teacher_of_an_earlier_run_is_missed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(EARLIER / "sdr.yaml", run / "config.yaml")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for weight, wanted in ((0.5, True), (0.0, False)):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        tree["experts"]["distillation_weight"] = weight
        manifest = {"step": 1, "config": tree, "model": now("sdr").model_spec.to_tree()}
        write_checkpoint(step_folder(run, 1), {}, {}, manifest)
        assert any("teacher" in fault for fault in RunFolder.open(run).verify().faults) == wanted
