"""Names that could command a parser or a terminal, given to the verbs: as classes, files, tasks, models, runs, folders.

Every command runs with an output of ASCII alone, as of a machine without a locale. It must end as with other names, and
neither its output nor its files may hold what a name was made to smuggle in.
"""

import base64
import io
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from moce_ds.checkpoint.run_folder import TUNED
from moce_ds.cli.main import main
from moce_ds.common import text
from moce_ds.common.config.settings import load
from moce_ds.common.config.values import arguments
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.features import write_features
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.models.vit import load_encoder
from moce_ds.tuning.classification import Classification, make_splits
from moce_ds.tuning.settings import FinetuneSettings
from tests.examples.alone import ALONE
from tests.examples.dense_sets import CATEGORIES, write_ade, write_coco
from tests.examples.moce_command import TINY, Said, refused
from tests.examples.study_folder import write_clusters, write_metrics, write_reconstructions, write_routing

FORGED = "Verified: forged"
"""What some names put at the beginning of a line."""

NAMES = (
    "[red]", "[/]", "[bold", ":smile:", "{path}", "%s", "$x$", "$", "a_{$\\frac", "\x1b[31mred", "\x1b]0;owned\x07",
    "\x9b31m", "\u202egnp", "zero\u200bwidth", f"line\n{FORGED}", "car\rriage", "tab\tname", "caf\udce9",
    "<script>alert(1)<", "<b>&\"'", "-x", "--help", "_under", "\u65e5\u672c\U0001f600", " ", "n" * 250, "\ue000",
    "'; touch owned; '",
)  # fmt: skip
MANY = "".join(NAMES[i] for i in (0, 6, 9, 12, 14, 17, 18, 19))
"""One name with most of it, for a task, a model or a folder of images."""

PLACE = MANY.replace("\udce9", "")
"""One for folders of what the verbs write: the library of safetensors opens paths of UTF-8 alone."""


def run_in_ascii(*words: object) -> Said:
    """As `run_here`, with outputs that can encode nothing but ASCII, and refuse the rest."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", "strict", newline="") for _ in range(2))
    status = 0
    with patch.object(sys, "argv", ["moce", *arguments(words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    for stream in (out, err):
        stream.flush()
    return Said(status, *(stream.buffer.getvalue().decode("ascii") for stream in (out, err)))  # type: ignore[attr-defined]


def done(*words: object) -> str:
    """The output of a command that must succeed, looked at for what must not be in it."""
    said = run_in_ascii(*words)
    assert said.status == 0, said
    harmless(said.out + said.err)
    return said.out


def harmless(said: str) -> None:
    """Refuse what commands a terminal, and lines that a name has forged; `\\r` is of progress bars."""
    assert not [c for c in said if unicodedata.category(c)[0] == "C" and c not in "\n\r"], said
    assert not re.search(rf"^{FORGED}", said, re.MULTILINE), said


def fill(folder: Path, names: tuple[str, ...], each: int) -> Path:
    """A folder of images with a class for each name."""
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}{name[:5].replace('/', '')}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose own name is hostile."""
    folder = tmp_path_factory.mktemp("names") / PLACE
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def images(place: Path) -> Path:
    return fill(place / "images", NAMES, 3)


@pytest.fixture(scope="module")
def shards(images: Path, place: Path) -> Path:
    """Those images as a shard set, and a file that is none."""
    (images / f"{NAMES[9]}\nx").write_bytes(b"no image")
    assert "84 images of 28 classes" in done("shards", images, place / "shards", "workers=1")
    return place / "shards"


@pytest.fixture(scope="module")
def task(place: Path) -> Path:
    """A task with train/ and test/, of a few of those classes."""
    for part in ("train", "test"):
        fill(place / MANY / part, (NAMES[0], NAMES[9], NAMES[14], NAMES[17]), 3)
    return place / MANY


# What is shown


@pytest.mark.parametrize("name", NAMES)
def test_a_name_becomes_harmless_and_stays_recognisable(name: str) -> None:
    for made in (text.in_line(name), text.plottable(name)):
        harmless(made.replace("\r", "\x00"))
        assert "\n" not in made and made.encode("utf-8")
    assert not text.plottable(name).startswith("_") and len(text.plottable(name)) <= 41
    assert (text.printable(name) == name) is all(c.isprintable() or c == "\n" for c in name)


def test_classes_are_kept_as_they_are(shards: Path) -> None:
    assert ShardSet.open(shards).classes == sorted(NAMES)
    rejected = json.loads((shards / "rejected.jsonl").read_text("ascii"))
    assert rejected["path"] == f"{NAMES[9]}\nx"


def test_inspect_shows_names_as_text(shards: Path) -> None:
    told = done("inspect", shards, "--verify")
    assert "28: " in told and "$x$" in told and "and 16 more" in told
    assert "Verified: everything" in told


def test_cluster_names_the_classes(shards: Path, tiny_encoder: Path, place: Path) -> None:
    write_features(
        load_encoder(tiny_encoder), ShardSet.open(shards), place / "features", FeatureSettings(threads=1), ALONE
    )
    words = ("num_clusters=4", "method=kmeans")
    assert "NMI with classes" in done("cluster", place / "features", place / "clusters", "--shards", shards, *words)
    for artefact in ("features", "clusters"):
        done("inspect", place / artefact, "--verify")


class Elements(HTMLParser):
    """The elements of a page, and the sources of its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.kinds: set[str] = set()
        self.plots: list[bytes] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.add(tag)
        source = dict(attrs).get("src") or ""
        if source.startswith("data:image/svg+xml;base64,"):
            self.plots.append(base64.b64decode(source.partition(",")[2]))


def test_report_escapes_and_plots_names(shards: Path, place: Path) -> None:
    study, opened = place / "runs", ShardSet.open(shards)
    for arch, name in (("mae", "_mae $"), ("moce", NAMES[0] + NAMES[9] + NAMES[14])):
        run = study / name
        run.mkdir(parents=True)
        config = {
            "model": {"arch": arch}, "data": {"shards": str(shards)}, "run": {"out": str(run), "note": MANY}
        }  # fmt: skip
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        write_metrics(run / "metrics.jsonl", 80, experts=arch == "moce")
    write_reconstructions(run / "reconstructions/step-00000080.png", opened)
    write_routing(run / "routing.json", write_clusters(run / "clusters", opened))
    record = {"verb": "knn", "model": MANY, "top1": 0.5, "mean_per_class": 0.5, "n_train": 3, "n_test": 3}
    (study / "results.json").write_text(json.dumps([record | {"task": task} for task in NAMES]))
    done("report", study)
    page = (study / "report.html").read_text("utf-8")
    assert not [c for c in page if unicodedata.category(c)[0] == "C" and c != "\n"]
    elements = Elements(page)
    assert "script" not in elements.kinds and "&lt;script&gt;alert(1)" in page and len(elements.plots) > 8
    drawn = [ElementTree.fromstring(plot) for plot in elements.plots]
    labels = {"".join(node.itertext()) for svg in drawn for node in svg.iter() if node.tag.endswith("text")}
    assert any("$x$" in label for label in labels) and any("_mae $" in label for label in labels)
    assert "[red]" in done("inspect", study / "results.json")


# The verbs of tasks


def test_knn_probe_and_their_records(task: Path, tiny_encoder: Path, place: Path) -> None:
    results, folder = place / "results.json", shutil.copytree(tiny_encoder, place / "encoder")
    for verb, more in (("knn", ["k=3"]), ("probe", ["method=closed_form"])):
        named = ("--task", MANY, "--model", MANY, "--results", results)
        told = done(verb, folder, "--train", task / "train", "--test", task / "test", *named, "threads=1", *more)
        assert "[red]" in told and "top-1" in told
    assert {record["task"] for record in json.loads(results.read_text("ascii"))} == {MANY}
    assert "[red]" in done("inspect", results)


def test_select_export_and_evaluate(tiny_moce_run: Callable[..., Path], task: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_moce_run(), tmp_path / PLACE)
    picture, out = tmp_path / f"{NAMES[9]}.png", tmp_path / NAMES[14]
    told = done(
        "select", run, "--data", task / "train", "--task", MANY, "--picture", picture, "--export", out, "threads=1"
    )
    assert "votes of 12 images" in told and "##" in told and "Winner: route" in told
    assert json.loads((out / "provenance.json").read_text("ascii"))["votes"]["task"] == MANY
    done("inspect", out, "--verify")
    done("export", run, tmp_path / NAMES[12], "--cluster", "0")
    done("evaluate", run, "--data", task / "test", "--task", MANY, "--results", tmp_path / "r.json", "threads=1")


def test_transfer_compares_on_a_task_of_such_a_name(
    tiny_moce_run: Callable[..., Path], task: Path, tmp_path: Path
) -> None:
    settings = tmp_path / f"{NAMES[0]}{NAMES[9]}{NAMES[14]}.yaml"
    settings.write_text(yaml.safe_dump({"data": str(task), "knn": {"k": 3, "threads": 1}}))
    told = done("transfer", tiny_moce_run(), "--tasks", settings, "--methods", "knn", "--out", tmp_path / "out")
    assert "[red]" in told and "k-NN: percent" in told


def test_finetune_keeps_the_classes(task: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    done("shards", task / "train", tmp_path / "set", "workers=1")
    shards = ShardSet.open(tmp_path / "set")
    given = {"data.encoder": tiny_encoder, "data.train": "a", "data.test": "b", "run.out": tmp_path / "out"}
    small = ("optim.batch_size=4", "engine.precision=fp32", "data.workers=0", "augment.mixup=0", "augment.cutmix=0")
    config = load(FinetuneSettings, None, [*(f"{key}={value}" for key, value in given.items()), *small])
    parts = (config.data, config.augment, config.optim, config.engine, config.run)
    tuned = Classification(load_encoder(tiny_encoder), make_splits(shards, None, shards, 0), *parts, ALONE)
    with torch.inference_mode():
        tuned.finish(tuned.model, ALONE)
    with safe_open(tmp_path / "out" / TUNED / "head.safetensors", "pt") as head:
        assert json.loads(head.metadata()["classes"]) == shards.classes
    assert len(tuned.fingerprint) == 64 and torch.is_tensor(tuned.model.head.weight)


# What is refused names the thing, harmlessly


def test_refusals_with_names_of_files(tiny_encoder: Path, tmp_path: Path) -> None:
    forged = NAMES[14]
    listed = [{"id": 10, "file_name": f"{forged}.png", "width": 48, "height": 32}]
    path, images = write_coco(tmp_path / "coco", images=listed, annotations=[])
    other, _ = write_coco(tmp_path / "other", categories=[CATEGORIES[0], {"id": 3, "name": MANY}])
    sets = ("--images", images, "--out", tmp_path / "run", "model.image_size=32", "model.channels=8")
    harmless(told := refused("detect", tiny_encoder, "--train", path, "--val", path, *sets))
    assert ".png not found" in told
    shutil.copytree(tmp_path / "other/images", tmp_path / "coco/images", dirs_exist_ok=True)
    write_coco(tmp_path / "third")
    train = ("--train", tmp_path / "third/instances.json", "--images", tmp_path / "third/images")
    harmless(told := refused("detect", tiny_encoder, *train, "--val", other, "--out", tmp_path / "run", *sets[-2:]))
    assert "They must be the same" in " ".join(told.split()) and "[red]" in told
    ade = write_ade(tmp_path / "ade")
    os.rename(ade / "images/a.jpg", ade / f"images/{forged}.jpg")  # noqa: PTH104
    harmless(told := refused("segment", tiny_encoder, "--train", ade, "--val", ade, "--out", tmp_path / "run"))
    assert "the mask of" in told


def test_refusals_with_names_of_classes(task: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    test = fill(tmp_path / "test", (MANY.replace("/", ""),), 1)
    harmless(told := refused("knn", tiny_encoder, "--train", task / "train", "--test", test, "threads=1"))
    assert "are not among the training classes" in told
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / NAMES[14]).write_bytes(b"no image")
    harmless(told := refused("shards", tmp_path / "none", tmp_path / "out", "workers=1"))
    assert "none could be decoded" in told
    harmless(run_in_ascii("inspect", f"--{NAMES[9]}").err)
    harmless(run_in_ascii(NAMES[9]).err)


def test_folders_of_tensors_are_named_in_utf8(
    tiny_moce_run: Callable[..., Path], task: Path, tiny_encoder: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """What the libraries of tensors and TensorBoard cannot open or write is said to be so, and not to be damaged."""
    named, run = tmp_path / NAMES[17], tiny_moce_run()
    said = [
        refused("export", run, named / "out", "--cluster", "0"),
        refused("pretrain", TINY, f"data.shards={tiny_shards}", f"run.out={named}/run"),
    ]
    shutil.copytree(tiny_encoder, named / "encoder", dirs_exist_ok=True)
    said.append(refused("knn", named / "encoder", "--train", task / "train", "--test", task / "test", "threads=1"))
    assert all("holds bytes that are not UTF-8" in told for told in said), said
    assert os.listdir(named) == ["encoder"]  # noqa: PTH208 (names alone)


# Lists of work, and jobs


def test_studies_and_pipelines_list_such_names(tmp_path: Path, tiny_shards: Path) -> None:
    out = tmp_path / NAMES[0]
    study = {
        "out": str(out),
        "pretrain": str(TINY),
        "set": [f"data.shards={tiny_shards}"],
        "grid": {"run.seed": [0, 1]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert "[red]" in done("study", tmp_path / "study.yaml", "--list")
    study["tasks"] = {"../x": str(tmp_path)}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert "tasks.../x: got '../x'; expected text that matches" in refused("study", tmp_path / "study.yaml", "--list")
    moce = yaml.safe_load(TINY.read_text())
    moce["model"]["arch"] = "moce"
    (tmp_path / "moce.yaml").write_text(yaml.safe_dump(moce))
    pipeline = {"out": str(out), "images": str(tmp_path), "mae": str(TINY), "moce": str(tmp_path / "moce.yaml")}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    assert "[red]" in done("pipeline", tmp_path / "pipeline.yaml", "--list")


@pytest.mark.parametrize("name", ["a\ntouch owned", "a\rb", "a\x1b[0m", "a\x00b", "caf\udce9"])
def test_a_job_s_script_cannot_be_lengthened(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    if "\x00" not in name:
        tiny = yaml.safe_load(TINY.read_text())
        tiny["run"] = {**tiny.get("run", {}), "out": str(tmp_path / name)}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny))
        verb = ("pretrain", tmp_path / "run.yaml", f"data.shards={tiny_shards}")
        harmless(told := refused("launch", "slurm", *verb))
        assert "job's script names it" in told or "are not UTF-8" in told
        assert not (tmp_path / name).exists()
    for setting in ("partition", "mem", "account", "qos", "constraint", "container", "python"):
        profile_is_refused(tmp_path, {setting: name}, setting)
    for tree in ({"extra": {name: 1}}, {"extra": {"x": name}}, {"env": {name: "1"}}, {"env": {"X": name}}):
        profile_is_refused(tmp_path, tree, next(iter(tree)))
    profile_is_refused(tmp_path, {"setup": [name]}, "setup")


@pytest.mark.parametrize("tree", [{"extra": {"a b": 1}}, {"extra": {"x=1 --y": 1}}, {"env": {"A=1; touch x; B": "1"}}])
def test_keys_of_a_profile_are_names(tree: dict[str, dict[str, object]], tmp_path: Path) -> None:
    profile_is_refused(tmp_path, tree, next(iter(tree)))


def profile_is_refused(folder: Path, tree: dict[str, object], setting: str) -> None:
    (folder / "profile.yaml").write_text(yaml.safe_dump(tree))
    harmless(told := refused("launch", "slurm", folder / "profile.yaml", "knn", "x"))
    assert setting in told and any(word in told for word in ("holds", "expected letters", "cannot contain NUL")), told
