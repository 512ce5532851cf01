"""Foreign text, made suitable for its output: names of files, classes, tasks and runs can be arbitrary.

A name may contain escape sequences, line breaks, bytes that are not UTF-8 (Python keeps them as lone surrogates), the
markup of a library, or characters that an output cannot encode. Text keeps its true form in memory and on disk; these
functions change only what is shown.
"""

import codecs
import io
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

MARK = "\ufffd"
"""Replaces every character that cannot be shown."""

_PLAIN = {"…": "~", "–": "-", "—": "-", "→": "->", "±": "+-", "≥": ">=", "·": ".", "“": '"', "”": '"', MARK: "?"}
_BLOCKS = range(0x2580, 0x25A0)  # characters of progress bars
_ON_TERMINAL = "moce_ds.on_terminal"


def printable(text: str) -> str:
    """Text with a mark for every character that could control the terminal or reorder a line; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else MARK for c in text)


def in_line(name: object) -> str:
    """A name inside a sentence: as `printable`, but line breaks are marked too."""
    return printable(str(name)).replace("\n", MARK)


def hanging(text: str) -> str:
    """As `printable`, with all lines but the first indented, so that a line break in a name cannot start another
    message."""
    return re.sub(r"\n(?!  )", "\n  ", printable(text))


def shortened(name: object, length: int) -> str:
    """A name of at most `length` characters; its end is kept, because names in one folder differ there."""
    shown = in_line(name)
    return shown if len(shown) <= length else f"…{shown[1 - length :]}"


def plottable(name: object, length: int = 40) -> str:
    """A short name for a plot: matplotlib hides labels that begin with an underscore."""
    shown = shortened(name, length)
    return f" {shown}" if shown.startswith("_") else shown


def encoded(text: str) -> bytes:
    """UTF-8 of any text, for digests; also encodes lone surrogates, which UTF-8 itself refuses."""
    return text.encode("utf-8", "surrogatepass")


def counted(count: int, noun: str, several: str = "") -> str:
    """A number with its noun: 1 shard, 2 shards, 1 class, 2 classes (`several`)."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def part_of(part: int, whole: int, noun: str, verb: tuple[str, str] = ("is", "are")) -> str:
    """A part of a number of things with the right verb form: 1 of 9 files is, 5 of 9 files are."""
    return f"{part} of {counted(whole, noun)} {verb[part != 1]}"


def listed(lines: Sequence[str], count: int) -> str:
    """The first lines of a list of `count`, one below the other under a message, and how many follow."""
    more = f"\n  and {count - len(lines)} more" if lines and count > len(lines) else ""
    return "".join(f"\n  {line}" for line in lines) + more


def is_utf8(name: object) -> bool:
    """Whether a name can be encoded as UTF-8; libraries outside Python refuse other paths."""
    return not any(unicodedata.category(c) == "Cs" for c in str(name))


def route_label(route: Sequence[int]) -> str:
    """A route as people read and type it: 3-5 is expert 3 in the first expert layer, 5 in the second."""
    return "-".join(map(str, route))


def script_fault(text: str) -> str | None:
    """Why a text cannot be one line of a shell script, even in quotes; None if it can."""
    if any(unicodedata.category(c) == "Cc" and c != "\t" for c in text):
        return "holds a line break or another control character"
    if not is_utf8(text):
        return "holds bytes that are not UTF-8"
    return None


def tolerate_any_text() -> None:
    """Let standard output and error replace characters that their encoding lacks, such as ASCII's, by plainer ones."""
    for stream in (sys.stdout, sys.stderr):
        _tolerate(stream)


def _tolerate(stream: TextIO) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_ON_TERMINAL)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs` for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_in_ascii(character) for character in lost), error.end


def _in_ascii(character: str) -> str:
    if ord(character) in _BLOCKS:
        return "#"
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_ON_TERMINAL, _plainer)


def without_home(text: str) -> str:
    """Text, such as a command or a path, without the names of home folders."""
    home = "|".join([r"(?:/[\w.-]+)*?/(?:home|users|Users)/[^/\s'\",\]]+", r"/root(?=/|\b)"])
    return re.sub(rf"(?<![\w.~-])(?:{home})", "~", text)
