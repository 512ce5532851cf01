"""The Python API: what the verbs of `moce` do, one call each (docs/api.md).

A name is imported from its module when it is used, so that `load_expert` does not wait for what training needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moce_ds.common.host import gpus

if TYPE_CHECKING:
    from moce_ds.api.clusters import Clusters
    from moce_ds.api.expert_module import load_expert
    from moce_ds.api.experts import export, select
    from moce_ds.api.measures import evaluate, knn, probe
    from moce_ds.api.run import Run, open_run
    from moce_ds.api.stages import cluster, features, pretrain, shards

__all__ = [
    "Clusters",
    "Run",
    "cluster",
    "evaluate",
    "export",
    "features",
    "knn",
    "load_expert",
    "open_run",
    "pretrain",
    "probe",
    "select",
    "shards",
]

_MODULES = {
    "expert_module": ("load_expert",),
    "experts": ("export", "select"),
    "measures": ("evaluate", "knn", "probe"),
    "run": ("Run", "open_run"),
    "stages": ("cluster", "features", "pretrain", "shards"),
    "clusters": ("Clusters",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _MODULES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    gpus.apply_choice()  # before torch is imported
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
