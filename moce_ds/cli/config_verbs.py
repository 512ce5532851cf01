"""`moce config ...`: show settings with their origins, and write a file to start from."""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from moce_ds.cli.options import PATH, SETTINGS
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import say

_ENCODE = "moce_ds.encoders.settings:EncodeSettings"


@dataclass(frozen=True)
class Kind:
    """A kind of settings file.

    Attributes:
        settings: the settings class as module:name; it is imported on use.
        read_by: the command that reads such a file.
        by_options: settings that the command takes as arguments and options. A starter file omits them.
    """

    settings: str
    read_by: str
    by_options: frozenset[str] = frozenset()

    def load(self) -> Any:
        """The settings class."""
        module, name = self.settings.split(":")
        return getattr(importlib.import_module(module), name)


def _tuning(settings: str, verb: str, *paths: str) -> Kind:
    given = ("run.out", *(f"data.{path}" for path in ("encoder", "train", "val", "test", *paths)))
    return Kind(settings, f"moce {verb}", frozenset(given))


KINDS = {
    "shards": Kind("moce_ds.data.shard_writer:ShardSettings", "moce shards"),
    "dataset": Kind("moce_ds.data.sources.public.datasets:DatasetSettings", "moce dataset"),
    "pretrain": Kind("moce_ds.training.settings:PretrainSettings", "moce pretrain, moce plan"),
    "features": Kind("moce_ds.encoders.settings:FeatureSettings", "moce features"),
    "cluster": Kind("moce_ds.clustering.settings:ClusterSettings", "moce cluster"),
    "select": Kind(_ENCODE, "moce select"),
    "export": Kind(_ENCODE, "moce export"),
    "evaluate": Kind(_ENCODE, "moce evaluate"),
    "knn": Kind("moce_ds.evaluation.settings:KnnSettings", "moce knn"),
    "probe": Kind("moce_ds.evaluation.settings:ProbeSettings", "moce probe"),
    "finetune": _tuning("moce_ds.tuning.settings:FinetuneSettings", "finetune", "val_share"),
    "detect": _tuning("moce_ds.tuning.settings:DetectSettings", "detect", "images", "eval_images"),
    "segment": _tuning("moce_ds.tuning.settings:SegmentSettings", "segment"),
    "pipeline": Kind("moce_ds.cli.workflow.pipeline:PipelineSettings", "moce pipeline"),
    "study": Kind("moce_ds.cli.workflow.study_grid:StudySettings", "moce study"),
    "task": Kind("moce_ds.cli.workflow.transfer_tasks:TaskSettings", "moce transfer --tasks"),
    "slurm": Kind("moce_ds.cli.launch.slurm_profile:SlurmProfile", "moce launch slurm"),
    "device": Kind("moce_ds.forecast.devices:Device", "moce plan --device"),
}
"""Every kind of settings file, by the word that names it on the command line."""


@dataclass(frozen=True)
class ArchNeed:
    """The contents of a starter file for one value of `model.arch`.

    Attributes:
        groups: groups of settings of this model that not all models have.
        required: settings that this model requires.
    """

    groups: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


ARCH_NEEDS = {
    "mae": ArchNeed(),
    "moce": ArchNeed(("experts",), ("experts.clusters",)),
    "token_moe": ArchNeed(("experts", "token_moe")),
    "sdr": ArchNeed(("experts", "sdr"), ("experts.clusters", "run.init_from")),
}
_ARCH_GROUPS = {group for need in ARCH_NEEDS.values() for group in need.groups}


@click.group()
def config() -> None:
    """Show the settings of a verb with their origins, or write a YAML file to start from."""


_kind = click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")


def _lists_kinds(command: Any) -> Any:
    command.epilog = f"Kinds: {', '.join(KINDS)}."
    return command


@_lists_kinds
@config.command("show")
@_kind
@click.argument("words", nargs=-1, metavar=SETTINGS)
def show_settings(kind: str, words: Sequence[str]) -> None:
    """Print the settings of KIND with all bases merged and the origin of each value.

    The output is a YAML file, which can be saved and read again.
    """
    from moce_ds.common.config.command_line import settings_layers
    from moce_ds.common.config.printing import explained
    from moce_ds.common.config.settings import partial_tree

    cls = KINDS[kind].load()
    layers = settings_layers(cls, words)
    say(*explained(cls, partial_tree(cls, layers), layers))


@_lists_kinds
@config.command("new")
@_kind
@click.argument("words", nargs=-1, metavar="[FILE.yaml] [key=value ...]")
def new_file(kind: str, words: Sequence[str]) -> None:
    """Write FILE with every setting of KIND, its help and its default.

    Without FILE the text is printed. Settings given as key=value are written with their values: pretrain
    model.arch=moce gives a file for a model with experts. Required settings that are not given are marked REQUIRED. An
    existing FILE is never replaced.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"Got several words that are not key=value: {' '.join(files)}; expected one file at most.")
    text = starter_text(kind, [word for word in words if "=" in word])
    if files:
        _write_new(PATH.convert(files[0], None, None), text)
        say(f"{files[0]}: written, for {KINDS[kind].read_by}")
    else:
        say(*text.splitlines())


def starter_text(kind: str, pairs: Sequence[str]) -> str:
    """The text of the file that `moce config new KIND` writes. Raises ConfigError if a `key=value` is invalid."""
    from moce_ds.common.config.printing import DEFAULT, origin_of, starter
    from moce_ds.common.config.settings import keys, partial_tree, translated, words_layer

    cls = KINDS[kind].load()
    layers = translated(cls, [words_layer(pairs)])
    tree = partial_tree(cls, layers)
    given = {key: _value(tree, key) for key, _ in keys(cls) if origin_of(key, layers) != DEFAULT}
    without, required = KINDS[kind].by_options - set(given), set[str]()
    if kind == "pretrain":
        need = ARCH_NEEDS[tree["model"]["arch"]]
        without, required = frozenset(_ARCH_GROUPS - set(need.groups)), set(need.required)
    return starter(cls, [f"Settings of {KINDS[kind].read_by}."], given, without, required)


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _write_new(path: Path, text: str) -> None:
    """Write a new file. Raises ConfigError if it exists, ArtefactError if it cannot be written."""
    from moce_ds.common.storage.files import atomic_file, writes_to

    with writes_to(path):
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already: give another name, or remove it first.")
        with atomic_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
