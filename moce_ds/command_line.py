"""What the verbs share: words of settings on the command line, printing, and how errors are told.

A verb imports its stage inside the function, so that `moce --help` answers at once and a verb needs only its own
packages.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import click
from rich.console import Console
from rich.text import Text

from moce_ds import config as configuration
from moce_ds.errors import STOPPED, ConfigError, MoceError
from moce_ds.interrupts import interruptible, outlive_readers
from moce_ds.machine import machine_fault
from moce_ds.place import is_first
from moce_ds.text import printable, tolerate_any_text

PATH = click.Path(path_type=Path)
SETTINGS = "[CONFIG.yaml] [key=value ...]"


class Verb(click.Command):
    """A command whose --help ends with its settings."""

    def __init__(self, *args: Any, settings: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List every setting with its default."""
        if self.settings:
            module, name = self.settings.split(":")
            cls = getattr(__import__(module, fromlist=[name]), name)
            formatter.write(f"\nSettings (key=default):\n{configuration.help_text(cls)}\n")


def words(required: bool = False) -> Any:
    """The trailing words of a verb: a YAML file and `key=value` settings."""
    return click.argument("words", nargs=-1, required=required, metavar=SETTINGS)


def heads_option() -> Any:
    """What a file of the public MAE does not say of an ENCODER."""
    return click.option(
        "--heads", type=click.IntRange(1), help="Attention heads of an ENCODER in a .pth file, if of an unusual size."
    )


def read_settings(cls: type[configuration.T], given: Sequence[str]) -> configuration.T:
    """Settings from a verb's trailing words. Raises ConfigError."""
    files = [word for word in given if "=" not in word]
    if len(files) > 1:
        raise ConfigError(
            f"Got several words that are not key=value: {' '.join(files)}; expected one YAML file at most."
        )
    pairs = [word for word in given if "=" in word]
    return configuration.load(cls, Path(files[0]) if files else None, pairs)


class _PlainConsole(Console):
    """A console to which text is text: no markup, no emoji codes, nothing that commands the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how | {"markup": False, "emoji": False})


def show(renderable: Any, width: int = 100) -> None:
    """Print a table or text: as wide as the terminal, or `width` columns into a file."""
    _PlainConsole(width=None if sys.stdout.isatty() else width, soft_wrap=False).print(renderable)


def say(text: str, err: bool = False) -> None:
    """Print lines, which may hold foreign names, to standard output or error."""
    print(printable(text), file=sys.stderr if err else sys.stdout, flush=True)


def warn(text: str) -> None:
    """Say something that is no result on standard error, once for all processes of a run."""
    if is_first():
        say(text, err=True)


def run_command(command: click.Command, name: str) -> None:
    """Run a command with the words of this process: errors of the user and of the machine in one message and their
    status, signals without a traceback and with status STOPPED."""
    outlive_readers()
    tolerate_any_text()
    try:
        with interruptible():
            command(prog_name=name, standalone_mode=False)
    except MoceError as error:
        _end_with(error)
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        say(told.getvalue().rstrip("\n"), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if is_first():
            click.echo("Interrupted.", err=True)
        sys.exit(STOPPED)
    except (OSError, MemoryError, RuntimeError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        _end_with(fault)


def _end_with(error: MoceError) -> Never:
    if error.every_process or is_first():
        say(f"Error: {error}", err=True)
    sys.exit(error.status)
