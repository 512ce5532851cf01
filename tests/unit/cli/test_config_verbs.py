"""`moce config show` and `moce config new`: composed settings with origins, and starters that the verbs read."""

import re
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from moce_ds.cli.config_verbs import ARCH_NEEDS, KINDS, starter_text
from moce_ds.cli.main import moce
from moce_ds.cli.options import Verb
from moce_ds.common.config.settings import keys, load, plain_default
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import refused, run_here

REQUIRED: dict[str, list[str]] = {
    "pretrain": ["data.shards=s", "run.out=r"],
    "finetune": [f"{key}=p" for key in ("data.encoder", "data.train", "data.test", "run.out")],
    "detect": [f"{key}=p" for key in ("data.encoder", "data.train", "data.images", "data.val", "run.out")],
    "segment": [f"{key}=p" for key in ("data.encoder", "data.train", "data.val", "run.out")],
    "pipeline": ["out=o", "images=i", "mae=a.yaml", "moce=b.yaml"],
    "study": ["out=o", "pretrain=a.yaml"],
    "task": ["data=d"],
    "device": [f"{key}=1e12" for key in ("bf16", "fp32", "memory", "bandwidth", "inside", "across")],
}
"""What each kind requires; that of the kinds which are not here is nothing."""

ARCH_REQUIRED = {"moce": ["experts.clusters=c"], "sdr": ["experts.clusters=c", "run.init_from=m"]}


def uncommented(text: str) -> str:
    """A starter in which every setting that is commented out is given its default."""
    return re.sub(r"^( *)#(\w+:)", r"\1\2", text.replace("#base: ", "# base: "), flags=re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_starter_is_read_as_the_defaults_once_the_required_settings_are_given(kind: str, tmp_path: Path) -> None:
    file, cls, required = tmp_path / f"{kind}.yaml", KINDS[kind].load(), REQUIRED.get(kind, [])
    said = run_here("config", "new", kind, file)
    assert said.status == 0 and said.out == f"{file}: written, for {KINDS[kind].read_by}\n"
    text = file.read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert load(cls, file, required) == load(cls, None, required)
    file.write_text(uncommented(text))
    assert load(cls, file, required) == load(cls, None, required)


@pytest.mark.parametrize("kind", KINDS)
def test_a_starter_has_every_setting_with_its_help_and_marks_what_is_required(kind: str) -> None:
    text = starter_text(kind, [])
    tree = yaml.safe_load(uncommented(text)) or {}
    found = dict(leaves(tree, dict(keys(KINDS[kind].load()))))
    unused = {"experts", "token_moe", "sdr"} if kind == "pretrain" else set()
    wanted = {
        key: field
        for key, field in keys(KINDS[kind].load())
        if key not in KINDS[kind].by_options and key.split(".")[0] not in unused
    }
    assert list(found) == list(wanted)
    one_line = re.sub(r"\n {40} # ", " ", text)
    for field in wanted.values():
        assert field.metadata["help"] in one_line
    given = {word.partition("=")[0] for word in REQUIRED.get(kind, [])} - KINDS[kind].by_options
    missing = {key for key, field in wanted.items() if plain_default(field) is MISSING}
    assert missing <= given and text.count("# REQUIRED: ") == len(missing)


def leaves(tree: Any, known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a tree that are settings."""
    for name, value in tree.items():
        if f"{prefix}{name}" in known:
            yield f"{prefix}{name}", value
        else:
            yield from leaves(value, known, f"{prefix}{name}.")


@pytest.mark.parametrize("arch", ARCH_NEEDS)
def test_a_starter_of_pre_training_is_for_one_kind_of_model(arch: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    assert run_here("config", "new", "pretrain", file, f"model.arch={arch}").status == 0
    text, need = file.read_text(), ARCH_NEEDS[arch]
    assert f"\n  arch: {arch} " in text
    groups = {group for other in ARCH_NEEDS.values() for group in other.groups}
    assert {group for group in groups if f"\n{group}:\n" in text} == set(need.groups)
    given = [*REQUIRED["pretrain"], *ARCH_REQUIRED.get(arch, [])]
    assert {word.partition("=")[0] for word in ARCH_REQUIRED.get(arch, [])} == set(need.required)
    assert load(PretrainSettings, file, given) == load(PretrainSettings, None, [f"model.arch={arch}", *given])
    for word in given:
        message = refused("pretrain", file, "--dry-run", *(other for other in given if other != word))
        assert f"{word.partition('=')[0]}: required" in message
    assert text.count("# REQUIRED: ") == len(given)


def test_there_is_a_starter_for_every_value_of_arch() -> None:
    arch = next(field for key, field in keys(PretrainSettings) if key == "model.arch")
    assert set(ARCH_NEEDS) == set(arch.type.__args__)


def verbs(group: click.Group) -> Iterator[Verb]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from verbs(command)
        elif isinstance(command, Verb):
            yield command


def test_every_verb_with_settings_has_a_kind() -> None:
    for verb in verbs(moce):
        assert any(verb.settings == kind.settings for kind in KINDS.values()), verb.name
        if verb.name in KINDS:
            assert KINDS[verb.name].settings == verb.settings


def test_given_settings_stand_in_the_starter(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    words = ["nodes=4", "env.A=x y", "setup=[module load cuda]"]
    assert run_here("config", "new", "slurm", file, *words).status == 0
    assert yaml.safe_load(file.read_text()) == {"nodes": 4, "env": {"A": "x y"}, "setup": ["module load cuda"]}
    assert "nodes: got 'x'" in refused("config", "new", "slurm", tmp_path / "other.yaml", "nodes=x")
    assert not (tmp_path / "other.yaml").exists()


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    for file in (tmp_path / "mine.yaml", tmp_path):
        (tmp_path / "mine.yaml").write_text("nodes: 3\n")
        assert refused("config", "new", "slurm", file) == (
            f"{file} exists already: give another name, or remove it first.\n"
        )
    assert (tmp_path / "mine.yaml").read_text() == "nodes: 3\n"
    assert "expected one file at most" in refused("config", "new", "slurm", tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_without_a_file_the_starter_is_printed() -> None:
    said = run_here("config", "new", "slurm", "nodes=2")
    assert said.status == 0 and said.out == starter_text("slurm", ["nodes=2"])


def test_show_prints_composed_settings_that_can_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model:\n  vit: vit_small_patch16_224\n  depth: 3\nrun:\n  out: runs/a\n")
    Path("mine.yaml").write_text("base: base.yaml\nmodel:\n  depth: 6\n")
    said = run_here("config", "show", "pretrain", "mine.yaml", "data.shards=s")
    assert said.status == 0 and max(map(len, said.out.splitlines())) <= 100
    lines = {line.split("#")[0].strip(): line.split("#")[1].strip() for line in said.out.splitlines() if "#" in line}
    origins = {"vit: vit_small_patch16_224": "base.yaml:2", "depth: 6": "mine.yaml:3", "out: runs/a": "base.yaml:5"}
    origins |= {"shards: s": "the command line", "seed: 0": "default"}
    assert lines.items() >= origins.items()
    Path("shown.yaml").write_text(said.out)
    assert load(PretrainSettings, Path("shown.yaml")) == load(PretrainSettings, Path("mine.yaml"), ["data.shards=s"])
    dry = run_here("pretrain", "mine.yaml", "data.shards=s", "--dry-run")
    assert dry.out.endswith(said.out)


def test_show_names_what_is_missing_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    said = run_here("config", "show", "finetune", "optim.epochs=3")
    assert said.status == 0 and re.search(r"^  # encoder: +# required, not given$", said.out, re.MULTILINE)
    assert re.search(r"^  epochs: 3.0 +# the command line$", said.out, re.MULTILINE)
    assert "optim.epoch: no such setting" in refused("config", "show", "finetune", "optim.epoch=3")
    assert "model.mask_ratio: 0.999 leaves" in refused(
        "config", "show", "pretrain", "data.shards=s", "run.out=r", "model.mask_ratio=0.999"
    )
    assert run_here("config", "show", "fine").status == 2
