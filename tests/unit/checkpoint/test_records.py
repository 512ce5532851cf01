"""A manifest whose content is not what this program writes, whoever made its checksum, is refused by every reader."""

import copy
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from moce_ds.checkpoint.format import FORMAT, Checkpoint, _digest, step_folder
from moce_ds.common.errors import ArtefactError
from tests.examples.moce_command import run_here


def rewritten(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Edit the manifest of the run's checkpoint, with a checksum that fits."""
    path = step_folder(run, 5) / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({**content, "sha256": _digest(content)}))
    return path


def as_earlier_version(content: dict[str, Any]) -> None:
    """An edit: tables of routes in the manifest."""
    routing = {"expert_ML": [[0, 1]] * 6, "cluster_share_M": [1 / 6] * 6}
    content |= {"format": "moce_ds checkpoint 2", "routing": routing}
    del content["files"]["routing.safetensors"]


def put(*keys: str, value: object) -> Callable[[dict[str, Any]], object]:
    """An edit: another value under nested keys."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


WRONG = {
    "step is text": put("step", value="many"),
    "step is negative": put("step", value=-1),
    "files is a list": put("files", value=[1]),
    "a file without size": put("files", value={"weights/shared.safetensors": {"xxh3": "0"}}),
    "config is text": put("config", value="none"),
    "model is a list": put("model", value=[]),
    "experts is a number": put("model", "experts", value=3),
    "gate is unknown": put("model", "experts", "gate", value="door"),
    "routing is text": put("routing", value="none"),
    "no experts on the routes": put("routing", "expert_ML", value=[[]] * 6),
    "experts beyond the model's": put("routing", "expert_ML", value=[[0, 99]] * 6),
    "another number of clusters": put("routing", "expert_ML", value=[[0, 1]]),
    "routes are text": put("routing", "expert_ML", value=[["a", "b"]] * 6),
    "shares are null": put("routing", "cluster_share_M", value=None),
    "no routes": put("routing", value={}),
    "routes of an unknown file": put("routing", value={"file": "routes.safetensors"}),
    "placement is a list": put("placement", value=[0]),
    "ep_size is 0": put("placement", "ep_size", value=0),
    "dealt_by is a number": put("dealt_by", value=7),
    "read images are text": put("images_read", value="all"),
}


@pytest.fixture
def run(tiny_moce_run: Callable[..., Path]) -> Path:
    return tiny_moce_run()


def test_what_is_written_is_read(run: Path) -> None:
    rewritten(run, lambda content: content)
    assert run_here("inspect", step_folder(run, 5)).status == 0


def test_every_wrong_entry_is_refused(run: Path) -> None:
    path = step_folder(run, 5) / "manifest.json"
    right = path.read_text()
    for name, change in WRONG.items():
        path.write_text(right)
        rewritten(run, as_earlier_version)
        rewritten(run, change)
        with pytest.raises(ArtefactError) as caught:
            Checkpoint.open(step_folder(run, 5))
        assert str(caught.value).startswith(f"{path} is damaged (") and "moce pretrain" in str(caught.value), name


KEYS = ("skipped", "images_read", "config", "model", "clusters_hash", "shards_fingerprint", "routing", "placement")


@pytest.mark.parametrize("value", ["missing", "null"])
def test_no_verb_trips_over_an_entry_that_is_not_there(run: Path, tiny_images: Path, value: str) -> None:
    path = step_folder(run, 5) / "manifest.json"
    right = path.read_text()
    verbs = {
        "export": ("export", run, run / "out", "--cluster", 0),
        "evaluate": ("evaluate", run, "--data", tiny_images / "digits"),
        "inspect": ("inspect", path.parent),
    }
    needs = {"export": {"model", "routing", "clusters_hash"}, "inspect": set[str](), "evaluate": {"config"}}
    for verb, key in [*product(("export", "inspect"), KEYS), ("evaluate", "config")]:
        path.write_text(right)
        rewritten(run, (lambda content, key=key: content.pop(key)) if value == "missing" else put(key, value=None))
        shutil.rmtree(run / "out", ignore_errors=True)
        said = run_here(*verbs[verb])
        assert "Traceback" not in said.err, said.err
        assert said.status == 0 or str(run) in said.err, (verb, key, said)
        assert said.status == int(key in needs[verb]) or value == "null", (verb, key, said)


def test_the_test_edits_what_is_there(run: Path) -> None:
    content = json.loads((step_folder(run, 5) / "manifest.json").read_text())
    assert content["format"] == FORMAT and set(KEYS) <= content.keys()
    as_earlier_version(content)
    for change in WRONG.values():
        other = copy.deepcopy(content)
        change(other)
        assert other != content
