"""What the verbs share: words of settings on the command line, printing, and how errors are told.

A verb imports its stage inside the function, so that `moce --help` answers at once and a verb needs only its own
packages.
"""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Never, TypeVar

import click
from rich.console import Console
from rich.text import Text

from moce_ds import config as configuration
from moce_ds.errors import STOPPED, ConfigError, MoceError
from moce_ds.interrupts import interruptible, outlive_readers
from moce_ds.machine import machine_fault
from moce_ds.place import is_first
from moce_ds.text import hanging, printable, tolerate_any_text
from moce_ds.values import expanded
from moce_ds.yaml_text import read_yaml_text

T = TypeVar("T")


class _PathType(click.ParamType):
    """A path, in which `~` and variables of the environment mean what they mean in settings."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        try:
            return expanded(value)
        except ValueError as error:
            name = param.human_readable_name if param else "path"
            raise ConfigError(f"{name}: got {value!r}; {error}.") from None


PATH = _PathType()
FORCED, FORCE = "--force", "MOCE_FORCE"
"""The option by which a run starts that does not fit into memory, and the variable that says so to its processes."""

YAML = (".yaml", ".yml")
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
            formatter.write(
                f"\nSettings (key=default; values are read as docs/settings.md says):\n{configuration.help_text(cls)}\n"
            )


def words(required: bool = False) -> Any:
    """The trailing words of a verb: a YAML file and `key=value` settings."""
    return click.argument("words", nargs=-1, required=required, metavar=SETTINGS)


def heads_option() -> Any:
    """What a file of the public MAE does not say of an ENCODER."""
    return click.option(
        "--heads", type=click.IntRange(1), help="Attention heads of an ENCODER in a .pth file, if of an unusual size."
    )


def force_option() -> Any:
    """--force, which the processes that are started from here obey, too."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            os.environ[FORCE] = "1"

    what = "Start pre-training also where this machine's memory is too small for it."
    return click.option(FORCED, is_flag=True, expose_value=False, callback=remember, help=what)


def read_settings(
    cls: type[configuration.T],
    given: Sequence[str],
    own: Mapping[str, Any] | None = None,
    origin: str = configuration.WORDS,
) -> configuration.T:
    """Settings from a verb's trailing words: a YAML file and `key=value`.

    Args:
        own: values by dotted key that the caller sets; they win.
        origin: where the words are from, for errors.

    Raises:
        ConfigError: a word is neither; the file cannot be read; or keys or values are not allowed, all of them listed.
    """
    known = {key for key, _ in configuration.keys(cls)}
    files = [word for word in given if _names_file(word, known)]
    pairs = [word for word in given if not _names_file(word, known)]
    if len(files) > 1:
        raise ConfigError(
            f"Got several words that are not key=value: {' '.join(files)}; expected one YAML file at most."
        )
    layers = [(file, read_yaml_text(_config_file(file, known))) for file in files]
    layers += [configuration.words_layer(pairs, origin), (origin, configuration.nested(own or {}))]
    return configuration.from_layers(cls, layers)


def is_config_word(word: str) -> bool:
    """Whether a word is a YAML file or `key=value`, and no name of a verb."""
    return "=" in word or word.endswith(YAML) or _existing(word) is not None


def _names_file(word: str, known: set[str]) -> bool:
    """Whether a word means a YAML file: one that exists, or one that is missing rather than a setting."""
    key, groups = word.partition("=")[0], {name.partition(".")[0] for name in known}
    if "=" not in word or _existing(word) is not None:
        return True
    return "/" in key or key.endswith(YAML) or (word.endswith(YAML) and key.partition(".")[0] not in groups)


def _existing(word: str) -> Path | None:
    """The file that a word names, as typed or with `~` and variables expanded."""
    try:
        path = expanded(word)
        return path if path.is_file() else None
    except (ValueError, OSError):  # no such variable; a name that no file can have
        return None


def _config_file(word: str, known: set[str]) -> Path:
    if word in known and not Path(word).exists():
        raise ConfigError(f"{word} is a setting: give it a value, {word}=VALUE.")
    try:
        return expanded(word)
    except ValueError as error:
        raise ConfigError(f"{word}: {error}.") from None


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
