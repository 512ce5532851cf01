"""Every verb with a damaged copy of each artefact, set or file that it reads: one message that names the copy, status
1, and nothing under the output's name.

What a checksum finds in every single file is in tests/test_every_harm.py.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moce_ds.common.storage.checksums import CHECKSUM
from tests.examples.dense_sets import write_ade, write_coco
from tests.examples.moce_command import TINY, refused
from tests.examples.public_folders import cifar10

SMALL = "model.image_size=32 model.channels=8"
COMMANDS = (
    "pretrain {config} data.shards={shards} run.out={out}",
    "pretrain {config} data.shards={shards} model.depth=2 run.init_from={run} run.out={out}",
    "pretrain {config} data.shards={shards} model.depth=2 model.arch=moce experts.num=4 "
    "experts.clusters={clusters} run.out={out}",
    "plan {config} data.shards={shards} run.out=none --device {device} --json {out}",
    "features {encoder} {shards} {out} threads=1",
    "features {run} {shards} {out} threads=1",
    "cluster {features} {out} num_clusters=4 --shards {shards}",
    "select {moce} --data {shards} --results {out}",
    "export {moce} {out} --cluster 0",
    "export {moce} {out} --data {shards}",
    "knn {encoder} --train {shards} --test {shards} --results {out}",
    "probe {encoder} --train {shards} --test {shards} --results {out}",
    "knn {encoder} --train {shards} --test {shards} --results {results}",
    "evaluate {moce} --data {shards} --dense {run} --results {out}",
    "finetune {encoder} --train {shards} --test {shards} --out {out} --results {results}",
    "detect {encoder} --train {coco} --images {images} --test {coco} --out {out} " + SMALL,
    "segment {encoder} --train {ade} --test {ade} --out {out} data.classes=2 " + SMALL,
    "transfer {moce} --tasks {task} --config {settings} --out {out}",
    "report {told} --out {out}",
    "report {evaluated} --out {out}",
    "report {study} --out {out}",
    "study {study_config} pretrain={config} out={out}",
    "study {study_config} pretrain={config} out={cells} --list",
    "pipeline {pipeline_config} mae={config} moce={config} out={out}",
    "pipeline {pipeline_config} mae={config} moce={config} out={stages} --list",
    "dataset cifar10 {dataset} {out} workers=1",
    "launch slurm {profile} pretrain {config} data.shards=set run.out={out}",
)
"""What each verb is told; each word in braces but `out` is an input, which is damaged while the others are whole."""

ARTEFACTS = {
    "shards": "shards", "features": "features", "clusters": "clusters", "run": "dense run", "moce": "moce run",
    "told": "moce run", "encoder": "encoder", "results": "results", "evaluated": "pipeline", "stages": "pipeline",
    "study": "study", "cells": "study",
}  # fmt: skip
"""Which of the fixture's artefacts an input is; one artefact is several inputs where verbs read other parts of it."""

PARTS: dict[str, list[tuple[str, str]]] = {
    "shards": [("shards.json", "json"), ("samples.npy", "bulk"), ("*.tar", "bulk")],
    "features": [("features.json", "json"), ("*.npy", "bulk")],
    "clusters": [("clusters.json", "json"), ("*.npy", "bulk")],
    "run": [("checkpoints/*/manifest.json", "json"), ("checkpoints/*/weights/*", "bulk")],
    "moce": [
        ("checkpoints/*/manifest.json", "json"), ("checkpoints/*/weights/*", "bulk"),
        ("clusters/clusters.json", "json"),
    ],
    "encoder": [("config.json", "json"), ("*.safetensors", "bulk")],
    "told": [("config.yaml", "yaml"), ("routing.safetensors", "bulk")],
    "evaluated": [("results.json", "json")],
    "study": [("study.json", "json"), ("cells/*/cell.json", "json")],
    "cells": [("cells/*/cell.json", "json")],
    "stages": [("pipeline/*.json", "json")],
    "images": [("*.png", "bulk")],
    "ade": [("annotations/*.png", "bulk"), ("images/*.jpg", "bulk")],
    "dataset": [("*/test_batch.bin", "bulk"), ("*/data_batch_5.bin", "bulk")],
    "results": [("", "json")],
    "coco": [("", "json")],
}  # fmt: skip
"""Of inputs that are no YAML files: patterns of files, of which the largest is damaged, and how."""


@pytest.fixture(scope="module")
def inputs(artefacts: dict[str, Path], tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole inputs of all verbs."""
    root = tmp_path_factory.mktemp("inputs")
    coco, images = write_coco(root / "coco")
    shards = artefacts["shards"]
    for split in ("train", "test"):
        (root / "tasks" / "kinds").mkdir(parents=True, exist_ok=True)
        (root / "tasks" / "kinds" / split).symlink_to(shards)
    trees: dict[str, dict[str, Any]] = {
        "task": {"data": str(root / "tasks" / "kinds")},
        "settings": {"knn": {"k": 5}},
        "device": {"bf16": 3e14, "fp32": 2e13, "memory": 8e10, "bandwidth": 2e12, "inside": 3e11, "across": 2e10},
        "profile": {"partition": "gpu"},
        "study_config": {"set": [f"data.shards={shards}"], "grid": {"run.seed": [0]}},
        "pipeline_config": {"images": str(tiny_images), "words": {"moce": ["model.arch=moce", "experts.num=4"]}},
    }
    files = {name: root / f"{name}.yaml" for name in trees}
    for name, tree in trees.items():
        files[name].write_text(yaml.safe_dump(tree))
    cifar10(root / "cifar")
    found = {name: artefacts[kind] for name, kind in ARTEFACTS.items()}
    return (
        found
        | files
        | {"config": TINY, "dataset": root / "cifar", "coco": coco, "images": images, "ade": write_ade(root / "ade")}
    )


Damage = Callable[[Path], object]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


def _holds(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def _exchange_values(path: Path) -> None:
    """Leave the keys of JSON, with values of no type that is expected, and no checksum that would tell."""
    content = json.loads(path.read_text())
    changed = {key: "?" for key in content if key != CHECKSUM} if isinstance(content, dict) else ["?"]
    path.write_text(json.dumps(changed))


DAMAGES: dict[str, dict[str, Damage]] = {
    "json": {
        "cut": _cut,
        "empty": _holds(b""),
        "no text": _holds(b"\xff\x00\xfe"),
        "deep": _holds(b"[" * 100_000),
        "long number": _holds(b'{"step": ' + b"9" * 5000 + b"}"),
        "text": _holds(b'"a text"'),
        "list": _holds(b"[3]"),
        "values": _exchange_values,
    },
    "yaml": {
        "cut": _holds(b"model: {vit: ["),
        "no text": _holds(b"\xff\x00\xfe"),
        "deep": _holds(b"[" * 1500),
        "list": _holds(b"- 3\n"),
        "number": _holds(b"3\n"),
        "values": _holds(b"out: {a: [1]}\nrun: 3\ndata: [x]\nknn: 3\n"),
    },
    "bulk": {"cut": _cut, "empty": _holds(b"")},
}


def damages_of(kind: str) -> list[tuple[str, str, Damage]]:
    """Damages to an input of a kind: the pattern of the file, a name, what is done to it."""
    parts = PARTS.get(kind, [("", "yaml")])
    return [(pattern, name, damage) for pattern, group in parts for name, damage in DAMAGES[group].items()]


def damaged(whole: Path, pattern: str, damage: Damage, out: Path) -> Path:
    """A copy of an input of which one file is damaged."""
    if whole.is_file():
        copy = Path(shutil.copy(whole, out.with_suffix(whole.suffix)))
        damage(copy)
        return copy
    shutil.copytree(whole, out, symlinks=True)
    damage(max(out.glob(pattern), key=lambda path: (path.stat().st_size, path)))
    return out


NOT_READ = {("plan", "shards"): "*.tar", ("cluster", "shards"): "*.tar"}
"""What a verb does not look into."""

CASES = {
    (command.split()[0], place, kind): command
    for command in reversed(COMMANDS)  # what several lines read alike is damaged in the first
    for place, kind in enumerate(re.findall(r"{(\w+)}", command))
    if kind != "out"
}


@pytest.mark.parametrize(("verb", "place", "kind"), CASES)
def test_a_damaged_input(inputs: dict[str, Path], tmp_path: Path, verb: str, place: int, kind: str) -> None:
    out, command = tmp_path / "out", CASES[verb, place, kind]
    given = [out if name == "out" else inputs[name] for name in re.findall(r"{(\w+)}", command)]
    for pattern, name, damage in damages_of(kind):
        if NOT_READ.get((verb, kind)) == pattern:
            continue
        copy = damaged(inputs[kind], pattern, damage, tmp_path / f"{re.sub('[*./]', ' ', pattern)} {name}")
        paths = iter([*given[:place], copy, *given[place + 1 :]])
        words = re.sub(r"{\w+}", "{}", command).split()
        told = refused(*[word.format(next(paths)) if "{}" in word else word for word in words])
        assert str(copy) in told, told
        left = [path for path in (out, *out.rglob("*")) if path.is_file() and path.suffix != ".lock"]
        assert left == [], copy
