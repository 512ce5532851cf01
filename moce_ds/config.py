"""Settings: defaults in dataclasses <- YAML file <- `key=value`, refused with a clear message when wrong.

What may not change when a run is resumed (it would be another experiment) is in the groups `model`, `experts`,
`data` and `optim`, except where `metadata` of a field says otherwise; `run` and `engine` may change. This module
holds the machinery; each stage's settings stand beside the stage, those of pre-training in `training/settings.py`.
"""

import dataclasses
import difflib
import reprlib
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

from moce_ds.errors import ConfigError

T = TypeVar("T")

# What PyYAML's safe loader was seen to raise on bad text; they have no common base. It makes nothing but plain data.
_YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

# A few kilobytes of YAML can name one list a billion times over: never print a value whole.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlevel = _short.maxlist = _short.maxtuple = _short.maxdict = 3


_HELP_WIDTH, _HELP_INDENT = 100, 41  # columns


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a group of settings: a frozen, validated dataclass that refuses unknown keys."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)  # type: ignore[return-value]


def load(cls: type[T], yaml_path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Settings of type `cls` from a YAML file and `key=value` words; later ones win.

    Keys are dotted (`optim.epochs=3`); values are YAML, so `[1, 2]`, `null` and `1e-4` mean what they look like.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not allowed; every fault is listed.
    """
    tree = read_yaml(yaml_path) if yaml_path else {}
    for word in overrides:
        _set_dotted(tree, word)
    return from_tree(cls, tree, source=str(yaml_path) if yaml_path else "the command line")


def from_tree(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Settings of type `cls` from nested dictionaries, `source` being named in errors. Raises ConfigError."""
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(cls, fault)}" for fault in error.errors())
        raise ConfigError(f"Settings refused ({source}):\n{faults}") from None


def to_tree(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of a settings object, as YAML and JSON can hold them."""
    tree: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return tree


def to_yaml(config: Any) -> str:
    """The YAML text of a settings object; `load` gives the same object back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def keys(cls: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every dotted key of a settings class with its field, groups opened."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


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


def help_text(cls: Any) -> str:
    """Every key with its default and the field's help, in lines of 100 columns at most where words allow."""
    lines = []
    for key, field in keys(cls):
        if field.default is not dataclasses.MISSING:
            default = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = _plain(field.default_factory())
        else:
            default = "(required)"
        lines += textwrap.wrap(
            field.metadata.get("help", ""),
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


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(_plain(item) for item in value) + "]"
    return str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """The `key: value` tree of a YAML file, unchecked; none for an empty one.

    Raises:
        ConfigError: the file cannot be read, or is no such tree.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"{path} not found: expected a YAML file of settings.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): make it readable.") from None
    except _YAML_FAULTS as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected `key: value` lines.")
    return tree


def _set_dotted(tree: dict[str, Any], word: str) -> None:
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise ConfigError(f"{word!r} is not a setting: expected key=value, such as optim.epochs=3.")
    try:
        value = yaml.safe_load(text)
    except _YAML_FAULTS as error:
        raise ConfigError(f"The value of {key} is not valid YAML: {_short.repr(text)} ({error}).") from None
    *groups, name = key.split(".")
    for group in groups:
        child = tree.setdefault(group, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {group} is a single setting and has no part {name!r}.")
        tree = child
    tree[name] = value


def _describe(cls: Any, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"] if part != "[key]")  # pydantic marks faults of a mapping's keys
    if fault["type"] == "unexpected_keyword_argument":
        return f"{key}: no such setting.{_suggestion(cls, key)}"
    if fault["type"] == "missing":
        return f"{', '.join(_required(cls, key))}: required, and not given."
    if fault["type"] == "dataclass_type" and key:
        return f"{key}: got {_short.repr(fault['input'])}; it is a group of settings, such as {key}.NAME=VALUE."
    message = fault["msg"].removeprefix("Value error, ")
    # A fault of a whole group names its keys itself; its input would be the whole group.
    given = (
        ""
        if isinstance(fault["input"], dict) or not key or isinstance(fault["input"], ArgsKwargs)
        else f"got {_short.repr(fault['input'])}; "
    )
    return f"{key + ': ' if key else ''}{given}{message}"


def _required(cls: Any, key: str) -> list[str]:
    """The settings without a default in the group `key`, or `key` itself where it is a single setting."""
    none = dataclasses.MISSING
    inside = [(name, field) for name, field in keys(cls) if name.startswith(f"{key}.")]
    return [name for name, field in inside if field.default is none and field.default_factory is none] or [key]


def _suggestion(cls: Any, key: str) -> str:
    known = [name for name, _ in keys(cls)]
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [by_last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.6)]
    return f" Did you mean {near[0]}?" if near else f" Known settings: {', '.join(known)}."
