"""The last line of a verb: what it has written, and a command that continues from there.

The line goes to standard error; `--quiet` hides it, and only the first process logs it. Words in capitals, such as
FOLDER, stand for what only the user knows.
"""

import logging
import shlex
from pathlib import Path

import click

from moce_ds.common.config.values import arguments
from moce_ds.common.text import in_line

_logger = logging.getLogger(__name__)


def conclude(written: Path | None, *command: object) -> None:
    """Log what was written, and the next command: `moce` with these words.

    A verb that a workflow runs says nothing: the workflow knows what follows.

    Args:
        written: None: the result is on standard output.
        command: a verb with its arguments; nothing if none follows.
    """
    if click.get_current_context().parent is None:
        return
    result = [f"Wrote {in_line(written)}."] if written is not None else []
    following = [f"Next: {quoted(*command)}"] if command else []
    if parts := result + following:
        _logger.info(" ".join(parts))


def quoted(*command: object) -> str:
    """The command `moce` with these words, as a shell reads it, on one line."""
    return in_line(shlex.join(["moce", *arguments(command)]))


def conclude_encoder(encoder: Path, data: Path | None) -> None:
    """As `conclude`, for an encoder that other verbs read: the next one measures it on the images that chose it.

    Args:
        data: these images; None: unknown.
    """
    test = data.parent / "test" if data and data.name == "train" else None
    splits = ("--train", data or "TRAIN", "--test", test if test and test.exists() else "TEST")
    conclude(encoder, "knn", encoder, *splits)


def beside(path: Path, name: str) -> Path:
    """A name in the folder of `path`, for the output of the next command."""
    return path.parent / name
