"""The meaning of the text of a setting, which depends only on the declared type of the setting.

The same rule holds for YAML files and for `key=value` (docs/settings.md). Text and paths are taken as typed; numbers
are decimal; booleans are true or false; a list or mapping on the command line is YAML's flow style.
"""

import dataclasses
import math
import os
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from moce_ds.common.config.yaml_text import Plain, read_flow

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
NULLS = ("null", "Null", "NULL")
"""The spellings of null in YAML."""

_LONGEST = 100  # characters of a number; a million digits would take long to read
_VARIABLE = re.compile(r"\$(?:\$|(\w+)|\{(\w+)\})", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Misread:
    """Replaces a value that cannot be read as its setting's type, so that validation lists it with all other faults."""

    given: Any
    expected: str


class Reading(ABC):
    """An annotation of a type that defines how its values are read."""

    @abstractmethod
    def read(self, value: Any, key: str) -> Any:
        """Convert a value before validation."""


def read(kind: Any, value: Any, key: str) -> Any:
    """Read `value`, from a YAML file, a word or a program, as the type `kind`; returns `Misread` if that fails.

    Values other than text are left to validation. Raises ConfigError for a malformed list or mapping in a word.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        own = next((mark for mark in arguments[1:] if isinstance(mark, Reading)), None)
        return own.read(value, key) if own else read(arguments[0], value, key)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, key)
    if dataclasses.is_dataclass(kind) or origin in (list, tuple, dict):
        return _read_parts(kind, opened(value, key), key)
    if origin is Literal:
        return _read_literal(arguments, value)
    reader = _READERS.get(kind)
    if reader is not None:
        return reader(value)
    return str(value) if isinstance(value, Plain) else value


def opened(value: Any, key: str) -> Any:
    """`value`, or the list or mapping if its text is one in YAML's flow style."""
    return read_flow(value, key) if isinstance(value, Plain) and value.lstrip()[:1] in ("[", "{") else value


def resolved(value: Any) -> Any:
    """A value without a declared type, by YAML 1.2's core schema: null, booleans, decimal numbers, else text."""
    if isinstance(value, dict):
        return {name: resolved(part) for name, part in value.items()}
    if isinstance(value, list):
        return [resolved(part) for part in value]
    if not isinstance(value, Plain):
        return value
    if value in NULLS or value in _BOOLEANS:
        return _BOOLEANS.get(value)
    if (number := _decimal(value)) is None:
        return str(value)
    return int(value) if value.lstrip("+-").isdigit() else float(number)


def _read_union(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if type(None) in kinds and (value is None or (isinstance(value, Plain) and value in NULLS)):
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return read(kinds[0], value, key)
    found = resolved(value)
    return str(value) if isinstance(value, Plain) and type(found) not in kinds else found


def _read_parts(kind: Any, value: Any, key: str) -> Any:
    """Read the parts of a group, list, tuple or mapping; anything else is left to validation."""
    if dataclasses.is_dataclass(kind):
        if value is None or value in NULLS:
            return {}  # a heading in a YAML file without settings
        if not isinstance(value, dict):
            return value
        fields = {field.name: field for field in dataclasses.fields(kind)}
        of = {name: field.type for name, field in fields.items()}
        named = {name: part for name, part in value.items() if part is not None or not _required(fields.get(name))}
        return {name: read(of.get(name, Any), part, _dotted(key, name)) for name, part in named.items()}
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {name: read(arguments[1], part, _dotted(key, name)) for name, part in value.items()}
    if typing.get_origin(kind) is not dict and isinstance(value, list | tuple):
        if typing.get_origin(kind) is list or ... in arguments:
            arguments = arguments[:1] * len(value)
        kinds = [*arguments, *[Any] * len(value)]  # validation refuses a tuple with too many values
        return [read(kinds[number], part, _dotted(key, str(number))) for number, part in enumerate(value)]
    return value


def _required(field: "dataclasses.Field[Any] | None") -> bool:
    """Whether a setting is required: its key without a value does not count as one."""
    if field is None or dataclasses.is_dataclass(field.type):
        return False
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def _read_literal(choices: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, bool) and value not in [choice for choice in choices if isinstance(choice, bool)]:
        return Misread(value, f"expected {' or '.join(map(repr, choices))}")
    if not isinstance(value, str):
        return value
    number = _read_int(value) if any(type(choice) is int for choice in choices) else None
    return number if type(number) is int else str(value)


def _read_bool(value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text in _BOOLEANS:
        return _BOOLEANS[text]
    return value if isinstance(value, bool) else Misread(value, "expected true or false")


def _read_int(value: Any) -> Any:
    """A whole number, which may be written as 1e3 or 8.0."""
    found = _decimal(value)
    if found is not None and found == found.to_integral_value() and abs(found) < Decimal(10) ** _LONGEST:
        return int(found)
    wrong = isinstance(value, str | bool)
    return Misread(value, "expected a whole number, such as 16") if wrong else value


def _read_float(value: Any) -> Any:
    found = _decimal(value)
    if found is None:
        wrong = isinstance(value, str | bool)
        return Misread(value, "expected a number, such as 0.5 or 1e-4") if wrong else value
    number = float(found)
    if math.isinf(number) or (number == 0) != (found == 0):
        return Misread(value, "expected a number that 64 bits can hold")
    return int(found) if value.strip().isdigit() else number  # errors show "got 2", as typed


def _decimal(value: Any) -> Decimal | None:
    text = value.strip() if isinstance(value, str) else ""
    return Decimal(text) if len(text) <= _LONGEST and _NUMBER.fullmatch(text) else None


def _read_text(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def _read_path(value: Any) -> Any:
    if not isinstance(value, str):
        return Path(value) if isinstance(value, os.PathLike) else value
    try:
        return expanded(value)
    except ValueError as error:
        return Misread(str(value), str(error))


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_text,
    Path: _read_path,
}


def is_number(text: str) -> bool:
    """Whether text reads as a number."""
    return _decimal(text) is not None


def expanded(text: str, folder: Path | None = None) -> Path:
    """The path that text means: a leading `~` or `~user` is a home folder, `$NAME` and `${NAME}` are variables of the
    environment, and `$$` is a dollar sign. Variables are not replaced in a path that exists as typed in `folder`
    (default: the working directory).

    Raises:
        ValueError: the text is empty, or names a user or a variable that does not exist.
    """
    if not text or "\0" in text:
        raise ValueError("expected a path, and . for the current folder" if not text else "a path cannot contain NUL")
    if "$" in text and os.path.lexists(folder / text if folder else text):
        return Path(text)
    head, _, rest = text.partition("/")
    if not text.startswith("~"):
        return Path(_VARIABLE.sub(_variable, text))
    try:
        home = Path(head).expanduser()
    except RuntimeError:
        raise ValueError(f"the home folder of {head} is unknown; write ./{head} for a file of that name") from None
    return home / _VARIABLE.sub(_variable, rest).lstrip("/")


def _variable(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if name is None:
        return "$"
    if not os.environ.get(name):
        how = "empty" if name in os.environ else "not set"
        raise ValueError(f"the environment variable {name} is {how}; write $$ for a dollar sign in a name")
    return os.environ[name]


def path_text(path: Path) -> str:
    """The text that `expanded` reads as exactly this path."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def recorded_path(text: str) -> Path:
    """The path whose `path_text` is in a record. An earlier version recorded paths unescaped, with any `$`."""
    try:
        return expanded(text)
    except ValueError:
        return Path(text)


def arguments(words: Iterable[object]) -> list[str]:
    """The words of a command for another process, which reads exactly these paths, and none of them as an option."""
    texts = ((path_text(word) if isinstance(word, Path) else str(word), word) for word in words)
    return [f"./{text}" if isinstance(word, Path) and text.startswith("-") else text for text, word in texts]
