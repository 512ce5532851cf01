"""Standard output, standard error and logging of every program of this package.

Results (tables, figures, the line that names what was written) go to standard output, with `say` and `show`. All else
goes to standard error: progress, notices and warnings through Python's `logging`, below the logger "moce_ds", and the
message of a fatal error. Text may hold foreign names, so everything is made printable before it reaches a terminal.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypeVar

import click
from rich.console import Console
from rich.text import Text

from moce_ds.common.errors import STOPPED, ConfigError, MoceError
from moce_ds.common.host.interrupts import interruptible, outlive_readers
from moce_ds.common.host.machine import machine_fault
from moce_ds.common.host.rank import is_first
from moce_ds.common.text import hanging, in_line, printable, tolerate_any_text

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

LOG = "MOCE_LOG"
"""Environment variable of the log level. Child processes inherit it."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_logger = logging.getLogger("moce_ds")


class _PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, no control sequences."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


def show(renderable: Any, width: int = 100) -> None:
    """Print a result, a table or text: as wide as the terminal, or `width` columns into a file."""
    _PlainConsole(width=None if sys.stdout.isatty() else width, soft_wrap=False).print(renderable)


def say(*texts: str) -> None:
    """Print results, one per line. Further lines of a text are indented, so that only a text itself begins a line."""
    for text in texts:
        print(hanging(text), flush=True)


def say_error(*texts: str) -> None:
    """Print the message of a fatal error to standard error. `--quiet` does not hide it."""
    for text in texts:
        print(hanging(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Log a warning that every process of a run would repeat: only rank 0 logs it.

    A warning about one rank alone goes through `logging.getLogger(__name__).warning`.
    """
    if is_first():
        _logger.warning(text, stacklevel=2)


def progress_bar(*args: Any, disable: bool | None = False, **options: Any) -> "tqdm[Any]":
    """A progress bar of tqdm on standard error; `--quiet` hides it.

    Args:
        args, options: as of `tqdm.tqdm`.
        disable: hide the bar; None: hide it unless standard error is a terminal, or the output of a notebook's cell.
    """
    from tqdm import tqdm

    hidden = not _is_watched() if disable is None else disable
    make: Callable[..., tqdm[Any]] = tqdm  # its overloads accept no **options
    return make(*args, disable=hidden or not _logger.isEnabledFor(logging.INFO), **options)


def _is_watched() -> bool:
    """Whether a person sees standard error as it is written, and a line can replace the one before it."""
    return sys.stderr.isatty() or type(sys.stderr).__module__ == "ipykernel.iostream"


@contextmanager
def shared_bar(own: int, left: int, desc: str, done: int = 0, **options: Any) -> Iterator[Callable[[int], None]]:
    """A progress bar of work that the processes share in equal parts; yields what advances it. Rank 0 shows it.

    It shows the work of all processes, and takes the others to be as far as this one.

    Args:
        own: units of this process.
        left: units of all processes.
        done: units that were done before.
        options: as of `progress_bar`.
    """
    counted = 0
    options = {"disable": not is_first(), "delay": 2, "dynamic_ncols": True, **options}
    with progress_bar(total=done + left, initial=done, desc=desc, **options) as bar:

        def advance(units: int) -> None:
            nonlocal counted
            counted += units
            bar.update(done + left * min(counted, own) // own - bar.n)

        yield advance


def shared_progress(items: Iterable[T], own: int, left: int, desc: str, **options: Any) -> Iterator[T]:
    """`items`, `own` of them, with a `shared_bar` of a unit for each."""
    with shared_bar(own, left, desc, **options) as advance:
        for item in items:
            yield item
            advance(1)


class _Formatter(logging.Formatter):
    """INFO as plain text, warnings with a prefix, those of ranks other than 0 with their rank. With debug output on,
    every record shows time, rank, level and module."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        rank = os.environ.get("RANK", "0")
        if _logger.isEnabledFor(logging.DEBUG):
            time = self.formatTime(record, "%H:%M:%S")
            return f"{time} [rank {in_line(rank)}] {record.levelname} {record.module}: {text}"
        prefix = "" if is_first() else f"[rank {in_line(rank)}] "
        return f"{prefix}{record.levelname}: {text}" if record.levelno >= logging.WARNING else f"{prefix}{text}"


class _StderrHandler(logging.Handler):
    """Writes to the standard error of the moment, which tests and `outlive_readers` replace. INFO is for rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter())

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno != logging.INFO or is_first() or _logger.isEnabledFor(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. Raises OSError, as of a full disk, which `run_main` reports."""
        print(hanging(self.format(record)), file=sys.stderr, flush=True)


def command_of_process() -> list[str]:
    """The words of this process's command, such as ["moce", "pretrain", "config.yaml"], made printable.

    The path of the program is left out.
    """
    program = Path(sys.argv[0]).name
    return [in_line(word) for word in ("moce" if program == "__main__.py" else program, *sys.argv[1:])]


def configure_logging() -> None:
    """Send the records of this package to standard error, at the level that MOCE_LOG names (default: info).

    Every program calls it once at its start; the library alone configures no logging.

    Raises:
        ConfigError: MOCE_LOG names no level.
    """
    level = os.environ.get(LOG) or "info"
    if level not in LEVELS:
        raise ConfigError(f"{LOG} is {level!r}, expected one of {', '.join(LEVELS)}.")
    _logger.setLevel(LEVELS[level])
    _logger.propagate = False  # other packages add handlers to the root logger, which would repeat each record
    if not any(isinstance(handler, _StderrHandler) for handler in _logger.handlers):
        _logger.addHandler(_StderrHandler())


@contextmanager
def python_call() -> Iterator[None]:
    """The frame of a function of the Python API, as `run_main` is that of a command; use it as a decorator.

    Notices and progress are shown as by a command (MOCE_LOG), unless the caller has configured the logger "moce_ds".
    Faults of the machine, such as a full disk, become a MoceError with the message of the command.
    """
    by_caller, excepthook = _logger.level != logging.NOTSET or bool(_logger.handlers), sys.excepthook
    if not by_caller:
        configure_logging()
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        raise fault from error
    finally:
        sys.excepthook = excepthook  # a process group leaves one that writes its rank before each line
        if not by_caller:
            _logger.handlers.clear()
            _logger.setLevel(logging.NOTSET)
            _logger.propagate = True


def set_log_level(level: str) -> None:
    """Log at one of `LEVELS` in this process, until `run_main` ends, and in the processes that it starts."""
    os.environ[LOG] = level
    configure_logging()


@contextmanager
def _restored_log_level() -> Iterator[None]:
    before, level = os.environ.get(LOG), _logger.level
    try:
        yield
    finally:
        os.environ.pop(LOG, None)
        if before is not None:
            os.environ[LOG] = before
        _logger.setLevel(level)


def run_command(command: click.Command, name: str) -> None:
    """Run a command with the arguments of this process, as `run_main`."""
    run_main(lambda: command(prog_name=name, standalone_mode=False))


def run_main(main: Callable[[], T]) -> T:
    """Run the main function of a program and return what it returns.

    Errors of the user and of the machine end the process with one message and their status, and signals with status
    STOPPED. None of them shows a traceback, unless debug output is on.
    """
    outlive_readers()
    tolerate_any_text()
    with _restored_log_level():
        return _run_reported(main)


def _run_reported(main: Callable[[], T]) -> T:
    try:
        with interruptible():
            configure_logging()
            return main()
    except MoceError as error:
        _end_with(error)
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        say_error(*message.getvalue().splitlines())
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if is_first():
            say_error("Interrupted.")
        sys.exit(STOPPED)
    except (OSError, MemoryError, RuntimeError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        _end_with(fault)


def _end_with(error: MoceError) -> Never:
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("The error was raised here:", exc_info=error)
    if error.every_process or is_first():
        say_error(f"Error: {error}")
    sys.exit(error.status)
