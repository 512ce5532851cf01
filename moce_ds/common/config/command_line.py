"""The words of a command line that are settings: a YAML file, and `key=value`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moce_ds.common.config import settings as configuration
from moce_ds.common.config.composition import BASE, Layer, file_layers
from moce_ds.common.config.values import expanded
from moce_ds.common.errors import ConfigError

YAML = (".yaml", ".yml")


def read_settings(
    cls: type[configuration.T],
    given: Sequence[str],
    own: Mapping[str, Any] | None = None,
    origin: str = configuration.WORDS,
) -> configuration.T:
    """Settings from a verb's trailing words: a YAML file and `key=value`.

    Args:
        own: values by dotted key that the caller sets; they win.
        origin: the source of the words, for errors.

    Raises:
        ConfigError: a word is neither; the file cannot be read; or keys or values are not allowed (lists all faults).
    """
    return configuration.from_layers(cls, settings_layers(cls, given, own, origin))


def settings_layers(
    cls: Any, given: Sequence[str], own: Mapping[str, Any] | None = None, origin: str = configuration.WORDS
) -> list[Layer]:
    """The layers that `read_settings` reads: the bases of the file, the file, the words. Earlier names are replaced.
    Raises ConfigError."""
    known = {key for key, _ in configuration.keys(cls)} | _earlier_names(cls)
    if BASE not in known and any(word.startswith(f"{BASE}=") for word in given):
        raise ConfigError(f"{BASE} is a line of YAML files. As a word, name the file itself: OTHER.yaml key=value.")
    files = [word for word in given if _names_file(word, known)]
    pairs = [word for word in given if not _names_file(word, known)]
    if len(files) > 1:
        raise ConfigError(
            f"Got several words that are not key=value: {' '.join(files)}; expected one YAML file at most."
        )
    layers = [layer for file in files for layer in file_layers(_config_file(file, known), cls, file)]
    layers += [configuration.words_layer(pairs, origin), Layer(origin, configuration.nested(own or {}))]
    return configuration.translated(cls, layers)


def _earlier_names(cls: Any) -> set[str]:
    return {field.metadata["formerly"] for field in dataclasses.fields(cls) if "formerly" in field.metadata}


def is_config_word(word: str) -> bool:
    """Whether a word is a YAML file or `key=value`, not the name of a verb."""
    return "=" in word or word.endswith(YAML) or _existing(word) is not None


def _names_file(word: str, known: set[str]) -> bool:
    """Whether a word means a YAML file, existing or missing, rather than a setting."""
    key, groups = word.partition("=")[0], {name.partition(".")[0] for name in known}
    if "=" not in word or _existing(word) is not None:
        return True
    return "/" in key or key.endswith(YAML) or (word.endswith(YAML) and key.partition(".")[0] not in groups)


def _existing(word: str) -> Path | None:
    """The file that a word names, as typed or with `~` and variables expanded."""
    try:
        path = expanded(word)
        return path if path.is_file() else None
    except (ValueError, OSError):  # no such variable, or not a valid file name
        return None


def _config_file(word: str, known: set[str]) -> Path:
    if word in known and not Path(word).exists():
        raise ConfigError(f"{word} is a setting: give it a value, {word}=VALUE.")
    try:
        return expanded(word)
    except ValueError as error:
        raise ConfigError(f"{word}: {error}.") from None
