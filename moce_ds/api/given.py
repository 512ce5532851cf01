"""What callers of the Python API give: paths, and settings as a file, as values, or as an object."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from moce_ds.common.config.composition import Layer, file_layers
from moce_ds.common.config.settings import checked_settings, device_of, keywords_layer, to_tree
from moce_ds.common.config.values import expanded
from moce_ds.common.errors import ConfigError
from moce_ds.training.settings import PretrainSettings  # imports no torch

T = TypeVar("T")

AnyPath = str | PathLike[str]
"""A path. In text, `~` and variables of the environment are expanded; relative paths begin at the current folder."""

Configuration = AnyPath | Mapping[str, Any] | PretrainSettings
"""The settings of a run: a YAML file, values by group or dotted key, or an object."""


def as_path(path: AnyPath) -> Path:
    """The path that a caller means. Raises ConfigError if it is empty or names an unknown variable."""
    if not isinstance(path, str):
        return Path(path)
    try:
        return expanded(path)
    except ValueError as error:
        raise ConfigError(f"path: got {path!r}; {error}.") from None


def settings_of(cls: type[T], overrides: Mapping[str, Any], config: Configuration | None = None) -> T:
    """Settings of type `cls` from a configuration and keyword arguments, which win.

    Raises:
        ConfigError: the file cannot be read, or keys or values are not allowed; every fault is listed.
    """
    layers = [*_layers(cls, config), keywords_layer(overrides)]
    _refuse_late_choice(layers)
    return checked_settings(cls, layers)


def _refuse_late_choice(layers: Sequence[Layer]) -> None:
    """Raise ConfigError for `engine.device=cpu` in a process that has found GPUs: they can no longer be hidden."""
    from torch import cuda  # here: paths need no torch

    if device_of(layers) == "cpu" and cuda.is_available():
        raise ConfigError(
            "engine.device=cpu: this process has found GPUs already. Set MOCE_DEVICE=cpu in the environment before "
            "Python starts, or start `moce pretrain`."
        )


def _layers(cls: type, config: Configuration | None) -> list[Layer]:
    if config is None:
        return []
    if isinstance(config, str | PathLike):
        return file_layers(as_path(config), cls)
    return [keywords_layer(config if isinstance(config, Mapping) else to_tree(config), "the configuration")]
