"""The kinds of model that `model.arch` names, as settings, manifests and tables know them.

`models/build.py` maps each to its class; this table needs no torch, so that settings and reports can read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        arch: its value of `model.arch`.
        title: its name in tables.
        gate: what the manifest of a checkpoint calls its gate; None for a dense model.
        routes_by_cluster: whether the cluster of an image decides its experts. Such a model is built from clusters, and
            each of its routes is a dense ViT that can be exported.
        distils: whether the dense MAE that it starts from can teach it.
    """

    arch: str
    title: str
    gate: str | None
    routes_by_cluster: bool
    distils: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether it has expert layers."""
        return self.gate is not None


MAE = Family("mae", "MAE", gate=None, routes_by_cluster=False)
TOKEN_MOE = Family("token_moe", "TokenMoE", gate="token", routes_by_cluster=False)
SDR = Family("sdr", "SDR", gate="path", routes_by_cluster=True, distils=True)
RANDOM_MOCE = Family("moce", "MoCE, random gate", gate="random", routes_by_cluster=True)
MOCE = Family("moce", "MoCE", gate="cluster", routes_by_cluster=True)

FAMILIES = (MAE, TOKEN_MOE, SDR, RANDOM_MOCE, MOCE)
"""All of them, in the order of tables."""

_BY_GATE = {family.gate: family for family in FAMILIES}
_BY_ARCH = {MAE.arch: MAE, TOKEN_MOE.arch: TOKEN_MOE, SDR.arch: SDR}  # those of MoCE are told apart by their gate


def family_by_gate(gate: str | None) -> Family:
    """The family whose manifests name this gate; None: the dense one."""
    return _BY_GATE[gate]


def family_of_settings(arch: str, gate: str) -> Family:
    """The family of `model.arch` and `experts.gate`. The gate counts where `arch` is no other family's."""
    return _BY_ARCH.get(arch) or _BY_GATE.get(gate, MOCE)


def family_of_tree(config: Mapping[str, Any]) -> Family:
    """The family of a run by its recorded settings (`config.yaml`), which may be incomplete."""
    model, experts = config.get("model") or {}, config.get("experts") or {}
    return family_of_settings(str(model.get("arch", MAE.arch)), str(experts.get("gate")))
