"""moce_ds: masked autoencoders with a mixture of cluster-conditional experts, trained with DeepSpeed."""

from typing import TYPE_CHECKING, Any

from moce_ds import old_names

if TYPE_CHECKING:
    from moce_ds.api import Clusters, load_expert

__version__ = "0.1.0"
__all__ = ["Clusters", "__version__", "load_expert"]

old_names.install()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The Python API is imported when it is used: `import moce_ds` alone loads no torch."""
    if name not in ("Clusters", "load_expert"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moce_ds import api

    return getattr(api, name)
