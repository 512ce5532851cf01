"""moce_ds: masked autoencoders with a mixture of cluster-conditional experts, trained with DeepSpeed."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

from moce_ds import moved_modules

if TYPE_CHECKING:
    from moce_ds.api.clusters import Clusters
    from moce_ds.api.expert_module import load_expert
    from moce_ds.api.experts import export, select
    from moce_ds.api.measures import evaluate, knn, probe
    from moce_ds.api.run import Run, open_run
    from moce_ds.api.stages import cluster, features, pretrain, shards

__version__ = "0.1.0"
__all__ = [
    "Clusters",
    "Run",
    "__version__",
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

moved_modules.install()


class _BeforeDeepSpeed(importlib.abc.MetaPathFinder):
    """DeepSpeed chooses its device when it is imported; `common.compat` chooses before it, whoever imports it first."""

    def find_spec(self, fullname: str, *place: object) -> importlib.machinery.ModuleSpec | None:
        """Find nothing: the next finder does."""
        if fullname == "deepspeed":
            importlib.import_module("moce_ds.common.compat")
        return None


sys.meta_path.insert(0, _BeforeDeepSpeed())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The Python API is imported when it is used: `import moce_ds` alone loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moce_ds import api

    return getattr(api, name)
