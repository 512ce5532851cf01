"""The Python API: what the verbs of `moce` do, one call each (docs/api.md).

A name is imported from its module when it is used, so that `load_expert` does not wait for what training needs.
"""

import importlib
from typing import Any

from moce_ds.common.host import gpus

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
