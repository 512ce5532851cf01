"""Settings: defaults in dataclasses <- YAML files <- `key=value`, refused with a clear message when wrong.

A resumed run may not change its groups `model`, `experts`, `token_moe`, `sdr`, `data` and `optim`, except fields whose
`metadata` allows it; `run` and `engine` may change. `values.py` defines what text means, and `composition.py` how YAML
files build on one another. Each stage declares its settings in its own package: pre-training in `training/settings.py`.
"""

import dataclasses
import logging
import math
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from moce_ds.common.config import model_kinds
from moce_ds.common.config.composition import Layer, fault_message, file_layers, together
from moce_ds.common.config.values import Misread, Reading, opened, path_text, read, resolved
from moce_ds.common.config.yaml_text import Plain, read_yaml_text
from moce_ds.common.errors import ConfigError
from moce_ds.common.host import gpus

T = TypeVar("T")

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

WORDS, KEYWORDS = "the command line", "keyword arguments"
_log = logging.getLogger(__name__)
_HELP_WIDTH, _HELP_INDENT = 100, 41  # columns


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a group of settings: a frozen, validated dataclass that refuses unknown keys."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)  # type: ignore[return-value]


def load(cls: type[T], yaml_path: Path | None = None, overrides: Sequence[str] = (), origin: str = WORDS) -> T:
    """Settings of type `cls` from a YAML file with its bases, and `key=value` words; later ones win (docs/settings.md).

    Keys are dotted (`optim.epochs=3`); a value is read as the type of its setting.

    Args:
        origin: the source of the words, for errors.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not allowed; every fault is listed.
    """
    layers = file_layers(yaml_path, cls) if yaml_path else []
    return from_layers(cls, [*layers, words_layer(overrides, origin)])


def words_layer(words: Sequence[str], origin: str = WORDS) -> Layer:
    """A tree of text from `key=value` words. Raises ConfigError for any other word."""
    tree: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise ConfigError(f"{word!r} is not a setting: expected key=value, such as optim.epochs=3.")
        tree = _merged(tree, nested({key: Plain(text)}), origin)
    return Layer(origin, tree)


def keywords_layer(values: Mapping[str, Any], origin: str = KEYWORDS) -> Layer:
    """A tree of values given in Python: by group, `optim={"epochs": 3}`, by dotted key, or both. Raises ConfigError."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        part = keywords_layer(value, origin).tree if isinstance(value, Mapping) else value
        tree = _merged(tree, nested({key: part}), origin)
    return Layer(origin, tree)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tree built from dotted keys and their values."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return tree


def from_tree(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Settings of type `cls` from nested dictionaries; errors name `source`. Raises ConfigError."""
    return from_layers(cls, [Layer(source, tree)])


def from_layers(cls: type[T], layers: Sequence[Layer]) -> T:
    """Settings of type `cls` from trees; later ones override earlier ones: mappings by key, other values as a whole.

    Raises:
        ConfigError: a key or value is not allowed; every fault is listed under its layer.
    """
    layers, tree = _merged_layers(cls, layers)
    try:
        return TypeAdapter(cls).validate_python(read(cls, tree, ""))
    except ValidationError as error:
        raise ConfigError(fault_message(dict(keys(cls)), error, layers)) from None


def checked_settings(cls: type[T], layers: Sequence[Layer]) -> T:
    """The settings of a run from their layers. If they contain `engine.device=cpu`, all GPUs are hidden first, because
    the check of a model's size imports torch, and torch then finds the GPUs.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    gpus.apply_choice(device_of(layers))
    return from_layers(cls, layers)


def device_of(layers: Sequence[Layer]) -> str:
    """`engine.device` in the layers, before they are checked; "auto" if none has it."""
    engines = [layer.tree["engine"] for layer in layers if isinstance(layer.tree.get("engine"), dict)]
    devices = [engine["device"] for engine in engines if "device" in engine]
    return str(devices[-1]) if devices else "auto"


def partial_tree(cls: Any, layers: Sequence[Layer]) -> dict[str, Any]:
    """As `to_tree(from_layers(cls, layers))`, without the settings that are required and not given.

    Raises:
        ConfigError: a key or value is not allowed. Rules between settings are checked only when none is missing.
    """
    layers, tree = _merged_layers(cls, layers)
    given = read(cls, tree, "")
    try:
        return to_tree(TypeAdapter(cls).validate_python(given))
    except ValidationError as error:
        if any(fault["type"] != "missing" for fault in error.errors()):
            raise ConfigError(fault_message(dict(keys(cls)), error, layers)) from None
    return _partial(cls, given)


def _partial(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            tree[field.name] = _partial(field.type, given.get(field.name, {}))
        elif field.name in given:
            kind: Any = field.type
            adapter = TypeAdapter(kind)
            tree[field.name] = _plain_data(adapter.dump_python(adapter.validate_python(given[field.name])))
        elif (default := plain_default(field)) is not dataclasses.MISSING:
            tree[field.name] = default
    return tree


def _merged_layers(cls: Any, layers: Sequence[Layer]) -> tuple[list[Layer], dict[str, Any]]:
    """The layers that are not empty, with current names of settings, and the merged tree."""
    layers = translated(cls, [layer for layer in layers if layer.tree] or layers[:1])
    tree: dict[str, Any] = {}
    for number, layer in enumerate(layers, 1):
        tree = _merged(tree, layer.tree, together(layers[:number]))
    return layers, tree


def translated(cls: Any, layers: Sequence[Layer]) -> list[Layer]:
    """The layers with current names of settings; logs each renamed setting. Raises ConfigError."""
    layers = [_renamed(cls, layer) for layer in layers]
    return model_kinds.translate_layers(layers) if _is_of_pretraining(cls) else layers


def _renamed(cls: Any, layer: Layer) -> Layer:
    """A layer with current names for settings that have a `formerly` name."""
    for field in dataclasses.fields(cls):
        if (earlier := field.metadata.get("formerly")) not in layer.tree:
            continue
        if field.name in layer.tree:
            raise ConfigError(f"{layer.origin}: {earlier} is the earlier name of {field.name}: give one of them.")
        _log.warning("%s: the setting %s is now called %s.", layer.origin, earlier, field.name)
        layer = layer._replace(tree={field.name if key == earlier else key: part for key, part in layer.tree.items()})
    return layer


def _is_of_pretraining(cls: Any) -> bool:
    """Whether a settings class has the settings that `model_kinds` translates."""
    return "model.arch" in dict(keys(cls))


def _merged(below: dict[str, Any], above: dict[str, Any], origins: str, prefix: str = "") -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        key, old = f"{prefix}{name}", below.get(name)
        if isinstance(old, dict) and isinstance(value, Plain) and value.lstrip().startswith("{"):
            value = opened(value, key)
        if isinstance(value, dict):
            old = opened(old, key)
            if isinstance(old, str | list):
                raise ConfigError(f"{key}: given as a whole and in parts ({origins}); give it once, or all its parts.")
            value = _merged(old or {}, value, origins, f"{key}.")
        if value is not None or not isinstance(old, dict):  # a heading with nothing under it changes nothing
            merged[name] = value
    return merged


def to_tree(config: Any) -> dict[str, Any]:
    """A settings object as nested dictionaries that YAML and JSON can hold; `from_tree` is the inverse."""
    tree: dict[str, Any] = _plain_data(TypeAdapter(type(config)).dump_python(config))
    return tree


def _plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain_data(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(part) for part in value]
    if isinstance(value, Path):
        return path_text(value)
    return str(value) if isinstance(value, str) else value


def to_yaml(config: Any) -> str:
    """The YAML text of a settings object; `load` reads it back as an equal object."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def keys(cls: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every dotted key of a settings class with its field; groups are replaced by their keys."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def completed(tree: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """A recorded tree of settings of type `cls` with the names of this version, and the defaults of settings that the
    record does not have."""
    tree = model_kinds.translate_tree(tree) if _is_of_pretraining(cls) else tree
    whole = dict(tree)
    for field in dataclasses.fields(cls):
        below = tree.get(field.name, {} if dataclasses.is_dataclass(field.type) else None)
        if dataclasses.is_dataclass(field.type) and isinstance(below, dict):
            whole[field.name] = completed(below, field.type)
        elif field.name not in tree and (default := plain_default(field)) is not dataclasses.MISSING:
            whole[field.name] = default
    return whole


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a setting, or MISSING if it is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def plain_default(field: dataclasses.Field[Any]) -> Any:
    """The default of a setting as plain data, or MISSING if it is required."""
    default = _default(field)
    return default if default is dataclasses.MISSING else _plain_data(default)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two trees differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found


def described_keys(cls: Any) -> Iterator[tuple[str, str, str]]:
    """Every key with its default, as it is typed, and its help."""
    for key, field in keys(cls):
        default = "(required)" if (known := _default(field)) is dataclasses.MISSING else _typed(known)
        yield key, default, field.metadata.get("help", "")


def help_text(cls: Any) -> str:
    """Every key with its default and help, wrapped at 100 columns."""
    lines = []
    for key, default, text in described_keys(cls):
        lines += textwrap.wrap(
            text,
            _HELP_WIDTH,
            initial_indent=f"  {key + '=' + default:<{_HELP_INDENT - 3}} ",
            subsequent_indent=" " * _HELP_INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [f"  {key}={default}"]
    return "\n".join(lines)


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """A field with a line of help; without a default the setting is required."""
    metadata["help"] = help
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def word(key: str, value: Any) -> str:
    """A word `key=value` that `load` reads as exactly this value, to pass to another process."""
    return f"{key}={path_text(value) if isinstance(value, Path) else _typed(value)}"


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(_quoted(item) if isinstance(item, str) else _typed(item) for item in value) + "]"
    return str(value)


def _quoted(text: str) -> str:
    """Text within a list of YAML's flow style."""
    if re.fullmatch(r"[\w./=+][\w./=+-]*", text, re.ASCII):
        return text
    return yaml.safe_dump(text, default_style='"', width=math.inf).removesuffix("\n")


def read_yaml(path: Path) -> dict[str, Any]:
    """The `key: value` tree of a YAML file, read without types of settings: numbers, booleans and null follow YAML 1.2.
    Empty for an empty file. Raises ConfigError if `read_yaml_text` does."""
    tree: dict[str, Any] = resolved(read_yaml_text(path))
    return tree


@dataclasses.dataclass(frozen=True)
class KeysOf(Reading):
    """Marks a mapping whose keys, dotted or in groups, are those of another settings class. Each value, or each item of
    a list of `several` values, is read as the type of its key.

    Attributes:
        own: further keys, whose values are integers.
    """

    cls: Any
    several: bool = False
    own: tuple[str, ...] = ()

    def read(self, value: Any, key: str) -> Any:
        """Dotted keys with values of plain data; unreadable values stay text; the caller rejects them."""
        value = opened(value, key)
        if not isinstance(value, dict):
            return value
        types = {name: field.type for name, field in keys(self.cls)} | dict.fromkeys(self.own, int)
        types |= {old: types[new] for old, new in model_kinds.MOVED.items() if new in types}
        flat: dict[str, Any] = {}
        for name, part in value.items():
            inside = isinstance(part, dict) and any(known.startswith(f"{name}.") for known in types)
            flat |= {f"{name}.{last}": one for last, one in part.items()} if inside else {name: part}
        return {name: self._one(types.get(name, Any), part, f"{key}.{name}") for name, part in flat.items()}

    def _one(self, kind: Any, value: Any, key: str) -> Any:
        values = opened(value, key)
        if self.several and isinstance(values, list):
            return [_as_typed(read(kind, each, key), each) for each in values]
        return values if self.several else _as_typed(read(kind, value, key), value)


def _as_typed(found: Any, value: Any) -> Any:
    """A read value as plain data, with numbers as typed, because the names of cells of studies contain them."""
    if isinstance(found, list) and isinstance(value, list):
        return [_as_typed(*pair) for pair in zip(found, value, strict=True)]
    if isinstance(found, float) and isinstance(value, str):
        number = resolved(Plain(value))
        return number if isinstance(number, int) or "." in value else str(value)
    if isinstance(found, Misread | Path):
        return str(value) if isinstance(value, str | Path) else value
    return found
