"""What a program prints, and how its errors end it: foreign names are made fit to show, and no traceback is."""

import io
import sys
from collections.abc import Callable
from typing import Any, Never, TypeVar

import click
from rich.console import Console
from rich.text import Text

from moce_ds.errors import STOPPED, MoceError
from moce_ds.host.interrupts import interruptible, outlive_readers
from moce_ds.host.machine import machine_fault
from moce_ds.host.place import is_first
from moce_ds.text import hanging, printable, tolerate_any_text

T = TypeVar("T")


class _PlainConsole(Console):
    """A console to which text is text: no markup, no emoji codes, nothing that commands the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how | {"markup": False, "emoji": False})


def show(renderable: Any, width: int = 100) -> None:
    """Print a table or text: as wide as the terminal, or `width` columns into a file."""
    _PlainConsole(width=None if sys.stdout.isatty() else width, soft_wrap=False).print(renderable)


def say(*texts: str, err: bool = False) -> None:
    """Print texts, which may hold foreign names, to standard output or error; each begins a line, and it alone does."""
    for text in texts:
        print(hanging(text), file=sys.stderr if err else sys.stdout, flush=True)


def warn(text: str) -> None:
    """Say something that is no result on standard error, once for all processes of a run."""
    if is_first():
        say(text, err=True)


def run_command(command: click.Command, name: str) -> None:
    """Run a command with the words of this process, as `run_main`."""
    run_main(lambda: command(prog_name=name, standalone_mode=False))


def run_main(main: Callable[[], T]) -> T:
    """Run the main function of a program and return what it returns.

    Errors of the user and of the machine end the process with one message and their status, and signals with status
    STOPPED; neither shows a traceback.
    """
    outlive_readers()
    tolerate_any_text()
    try:
        with interruptible():
            return main()
    except MoceError as error:
        _end_with(error)
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        say(*told.getvalue().splitlines(), err=True)
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
