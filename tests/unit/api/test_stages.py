"""The stages as functions: settings in every form, the same artefacts as the verbs', and the verbs' messages."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moce_ds
from moce_ds.api.given import settings_of
from moce_ds.common.config.settings import load, to_tree
from moce_ds.common.errors import ArtefactError, ConfigError, MoceError
from moce_ds.common.host.program import python_call
from moce_ds.data.clusters import Clusters
from moce_ds.data.feature_store import FeatureSet
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import TINY, refused

MakeRun = Callable[..., Path]


def test_settings_in_every_form_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load(PretrainSettings, TINY, ["data.shards=s", "run.out=r", "optim.epochs=3", "optim.base_lr=1e-4"])
    optim, paths = {"epochs": 3}, {"data.shards": "s", "run.out": Path("r")}
    dotted = {"optim.epochs": 3, "optim.base_lr": 1e-4, **paths}
    base = load(PretrainSettings, TINY, ["data.shards=s", "run.out=elsewhere"])
    given = [
        settings_of(PretrainSettings, dotted, TINY),
        settings_of(PretrainSettings, {"optim": optim, "optim.base_lr": 1e-4, **paths}, str(TINY)),
        settings_of(PretrainSettings, {"optim.base_lr": "1e-4", "optim": optim, **paths}, TINY),
        settings_of(PretrainSettings, {"run": {"out": "r"}, **dotted}, base),
        settings_of(PretrainSettings, {"run": {"out": "r"}}, to_tree(base) | {"optim": to_tree(expected)["optim"]}),
    ]
    assert given == [expected] * len(given)
    assert optim == {"epochs": 3}, "what the caller holds is unchanged"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epochs": 3}, "keyword arguments.*\n  epochs: no such setting. Did you mean optim.epochs?"),
        ({"optim": {"epochs": -1}}, "optim.epochs: got -1; "),
        ({"optim": 3}, "optim: got 3; it is a group of settings"),
        ({"data.shards": "$NO_SUCH_VARIABLE/s"}, "the environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_settings_that_are_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        moce_ds.pretrain(TINY, **{"data.shards": "s", "run.out": "r"} | given)


def test_features_and_clusters_are_those_of_the_verbs(
    tiny_encoder: Path, tiny_shards: Path, tiny_clusters: Path, tmp_path: Path
) -> None:
    found = moce_ds.features(tiny_encoder, str(tiny_shards), tmp_path / "features", threads=1)
    assert (found.all() == FeatureSet.open(tiny_clusters.parent / "features").all()).all()
    clusters = moce_ds.cluster(tmp_path / "features", tmp_path / "clusters", num_clusters=6)
    assert clusters.clusters.hash == Clusters.open(tiny_clusters).hash
    assert os.fspath(clusters) == str(tmp_path / "clusters")
    quality = clusters.quality(tiny_shards)
    assert quality.num_images == 60 and quality.classes is not None and clusters.quality().classes is None
    with pytest.raises(ArtefactError, match=r"settings\.num_clusters: 6 there, 5 now"):
        moce_ds.cluster(tmp_path / "features", tmp_path / "clusters", num_clusters=5)


def test_messages_are_those_of_the_verbs(
    tiny_mae_run: Path, tiny_moce_run: MakeRun, tiny_images: Path, tmp_path: Path
) -> None:
    moce, none = tiny_moce_run(), tmp_path / "none"
    calls: list[tuple[Callable[[], object], tuple[object, ...]]] = [
        (lambda: moce_ds.select(tiny_mae_run, tiny_images), ("select", tiny_mae_run, "--data", tiny_images)),
        (lambda: moce_ds.select(moce, none), ("select", moce, "--data", none)),
        (
            lambda: moce_ds.evaluate(moce, tiny_images, dense=moce),
            ("evaluate", moce, "--data", tiny_images, "--dense", moce),
        ),
        (lambda: moce_ds.export(moce, none), ("export", moce, none)),
        (lambda: moce_ds.export(moce, none, route=[9, 9]), ("export", moce, none, "--route", "9,9")),
        (lambda: moce_ds.export(moce, none, format="hf"), ("export", moce, none, "--format", "hf")),
        (
            lambda: moce_ds.knn(none, tiny_images, tiny_images),
            ("knn", none, "--train", tiny_images, "--test", tiny_images),
        ),
        (lambda: moce_ds.shards(none, tmp_path / "out"), ("shards", none, tmp_path / "out")),
    ]
    for call, words in calls:
        with pytest.raises(MoceError) as error:
            call()
        assert refused(*words) == f"{error.value}\n"
    assert not none.exists()


def test_an_expert_is_selected_exported_and_measured(moce_run: moce_ds.Run, tiny_images: Path, tmp_path: Path) -> None:
    run = moce_run
    vote = moce_ds.select(run, tiny_images / "digits")
    [(folder, provenance)] = moce_ds.export(run, tmp_path / "expert", data=tiny_images / "digits").items()
    assert folder == tmp_path / "expert" and provenance["route"] == list(vote.route)
    assert provenance["votes"]["task"] == "digits"
    assert moce_ds.load_expert(folder).num_features == 16
    assert len(moce_ds.export(run, tmp_path / "all", all=True)) == len(set(run.routes.routes))
    score = moce_ds.knn(folder, tiny_images, tiny_images, k=1)
    assert score.figures["top1"] == 1 and score.n_test == 60, "each image is its own neighbour"
    assert moce_ds.probe(folder, tiny_images, tiny_images, method="closed_form").n_train == 60
    assert moce_ds.evaluate(run, tiny_images).n_images == 60


def test_an_interrupt_stops_with_a_checkpoint_and_the_same_call_resumes(tiny_shards: Path, tmp_path: Path) -> None:
    """Two runs in one process, one after the other: the second gets process groups of its own."""
    given = {"data.shards": tiny_shards, "run.out": tmp_path / "run", "model.depth": 2}

    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("step 2/"):
                signal.raise_signal(signal.SIGINT)

    handler = Interrupt()
    logging.getLogger("moce_ds").addHandler(handler)
    try:
        run = moce_ds.pretrain(TINY, **given)
    finally:
        logging.getLogger("moce_ds").removeHandler(handler)
    assert 2 <= run.step < 8 and run.steps == 8 and not run.complete
    run = moce_ds.pretrain(TINY, **given)
    assert run.complete and run.column("loss")[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(ConfigError, match=r"optim\.base_lr"):
        moce_ds.pretrain(TINY, **given, optim={"base_lr": 1.0})


def test_a_call_shows_notices_and_leaves_logging_as_it_was() -> None:
    """In a process that has configured nothing, as a notebook's; a caller's own level stays."""
    code = """
import logging, sys
from moce_ds.common.errors import MoceError
from moce_ds.common.host.program import python_call
logger = logging.getLogger("moce_ds")
@python_call()
def call():
    logger.info("notice")
    raise OSError(28, "No space left on device", "file")
for level in (logging.NOTSET, logging.ERROR):
    logger.setLevel(level)
    try:
        call()
    except MoceError as error:
        print(error, level == logger.level, logger.handlers, logger.propagate)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stderr == "notice\n", done.stderr
    assert [line.endswith(" True [] True") and "file" in line for line in done.stdout.splitlines()] == [True, True]


def test_a_defect_keeps_its_class() -> None:
    @python_call()
    def call() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        call()
