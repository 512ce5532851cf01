"""The kinds of model: their names in `model.arch`, manifests and tables, now and in earlier versions.

`models/build.py` maps each kind to its class; this module needs no torch, so that settings and reports can use it.

In earlier versions TokenMoE and SDR were `model.arch=moce` with `experts.gate=token` and `experts.gate=path`, and their
own settings were in the group `experts`. Only this module knows those names. It translates YAML files, words of a
command line, and what run folders, checkpoints, pipelines and studies have recorded.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from moce_ds.common.config.composition import Layer
from moce_ds.common.config.values import opened
from moce_ds.common.config.yaml_text import Section
from moce_ds.common.errors import ConfigError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelKind:
    """A kind of model.

    Attributes:
        arch: its value of `model.arch`.
        title: its name in tables.
        gate: the name of its gate in the manifest of a checkpoint; None for a dense model.
        routes_by_cluster: whether the cluster of an image decides its experts. Such a model is built from clusters, and
            each of its routes is a dense ViT that can be exported.
        splits_mlp: whether its experts are groups of the hidden units of one MLP, not whole MLPs that can be averaged.
        distils: whether the dense MAE that initialises it can also be its teacher.
    """

    arch: str
    title: str
    gate: str | None
    routes_by_cluster: bool
    splits_mlp: bool = False
    distils: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether it has expert layers."""
        return self.gate is not None


MAE = ModelKind("mae", "MAE", gate=None, routes_by_cluster=False)
TOKEN_MOE = ModelKind("token_moe", "TokenMoE", gate="token", routes_by_cluster=False)
SDR = ModelKind("sdr", "SDR", gate="path", routes_by_cluster=True, splits_mlp=True, distils=True)
RANDOM_MOCE = ModelKind("moce", "MoCE, random gate", gate="random", routes_by_cluster=True)
MOCE = ModelKind("moce", "MoCE", gate="cluster", routes_by_cluster=True)

MODEL_KINDS = (MAE, TOKEN_MOE, SDR, RANDOM_MOCE, MOCE)
"""All kinds, in the order of tables."""

_BY_GATE = {kind.gate: kind for kind in MODEL_KINDS}
_BY_ARCH = {MAE.arch: MAE, TOKEN_MOE.arch: TOKEN_MOE, SDR.arch: SDR}  # the gate distinguishes the two kinds of MoCE


def model_kind_by_gate(gate: str | None) -> ModelKind:
    """The kind of model whose manifests name this gate; None means dense."""
    return _BY_GATE[gate]


def model_kind_of_settings(arch: str, gate: str) -> ModelKind:
    """The kind of model of `model.arch` and `experts.gate`. The gate decides only for `moce`."""
    return _BY_ARCH.get(arch) or _BY_GATE.get(gate, MOCE)


def model_kind_of_tree(config: Mapping[str, Any]) -> ModelKind:
    """The kind of model of a run by its recorded settings (`config.yaml`), which may be incomplete."""
    model, experts = _group(config, "model"), _group(config, "experts")
    return model_kind_of_settings(str(model.get("arch", MAE.arch)), str(experts.get("gate")))


MOVED = {
    "experts.token_balance_weight": "token_moe.balance_weight",
    "experts.stages": "sdr.stages",
    "experts.common": "sdr.common",
    "experts.distillation_weight": "sdr.distillation_weight",
}
"""Old key of a setting: new key. The new group has the name of the `model.arch` that uses it."""

_ARCH_NOW = {
    ("moce", "token"): "token_moe",
    ("moce", "path"): "sdr",
    **{
        (arch, gate): arch
        for arch, gate in (("token_moe", "token"), ("sdr", "path"), ("mae", "token"), ("mae", "path"))
    },
}
"""`model.arch` by the earlier pair of `model.arch` and `experts.gate`. A dense model ignores the gate."""

_GROUPS = ("model", "experts", "token_moe", "sdr")


def translate_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of pre-training settings with the names of this version; a notice lists the changes.

    A moved setting that the model does not use is dropped, as it had no effect.

    Raises:
        ConfigError: a layer gives a setting by its old key and by its new one.
    """
    translated, changes = _translate(layers)
    for origin, names in changes.items():
        if names:
            _notice(f"Settings of an earlier version in {origin}: {'; '.join(names)}.")
    return translated


def translate_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded tree of settings with the names of this version. Logs nothing, because records are never edited."""
    (layer,), _ = _translate([Layer("the record", dict(tree))])
    return {key: dict(value) if isinstance(value, Section) else value for key, value in layer.tree.items()}


@cache
def _notice(text: str) -> None:
    """Log a text once in this process."""
    _logger.info(text)


def _translate(layers: Sequence[Layer]) -> tuple[list[Layer], dict[str, list[str]]]:
    """The translated layers, and the changes by origin. The last layer that names a setting decides its value."""
    layers = [layer._replace(tree=_with_groups(layer.tree)) for layer in layers]
    changes: dict[str, list[str]] = {layer.origin: [] for layer in layers}
    before, gate = _last(layers, "model", "arch", "mae"), _last(layers, "experts", "gate", "cluster")
    now = _ARCH_NOW.get((before, gate))
    for layer in layers:
        if now is not None:
            changes[layer.origin] += _move_gate(layer.tree, before, now)
        changes[layer.origin] += _move_settings(layer.tree, now or before, layer.origin)
    return layers, changes


def _with_groups(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy whose translated groups are mappings, even if a word gives a group as text."""
    copy = tree.copy()
    for group in _GROUPS:
        if isinstance(found := opened(copy.get(group), group), dict):
            copy[group] = found.copy()
    return copy


def _group(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    group = tree.get(name)
    return group if isinstance(group, dict) else {}


def _last(layers: Sequence[Layer], group: str, name: str, default: str) -> str:
    trees = [layer.tree for layer in layers]
    found = [str(_group(tree, group)[name]) for tree in trees if name in _group(tree, group)]
    return found[-1] if found else default


def _move_gate(tree: dict[str, Any], before: str, now: str) -> list[str]:
    """Replace the earlier pair of arch and gate in one layer, in place; returns the changes."""
    model, experts = _group(tree, "model"), _group(tree, "experts")
    if str(model.get("arch")) == before:
        model["arch"] = now
    if (before, str(experts.get("gate"))) not in _ARCH_NOW:
        return []
    gate = experts.pop("gate")
    return [f"experts.gate={gate} {f'is model.arch={now} now' if before != 'mae' else 'has no effect'}"]


def _move_settings(tree: dict[str, Any], arch: str, origin: str) -> list[str]:
    """Move the settings of one layer to their new groups, in place; returns the changes."""
    changes = []
    for old, new in MOVED.items():
        experts, (group, name), before = _group(tree, "experts"), new.split("."), old.removeprefix("experts.")
        if before not in experts:
            continue
        value, given = experts.pop(before), _group(tree, group)
        if name in given:
            raise ConfigError(f"{origin}: {old} is the earlier name of {new}: give {new} alone.")
        if used := group == arch:
            tree[group] = {**given, name: value}
            if isinstance(experts, Section):  # messages name the line of the earlier name
                lines = given.lines if isinstance(given, Section) else {}
                tree[group] = Section(tree[group], {**lines, name: experts.lines.get(before, 0)})
        changes.append(f"{old} is {new} now" if used else f"{old} has no effect with model.arch={arch}")
    return changes
