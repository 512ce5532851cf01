"""Shared parts of the verbs: the type of paths, the trailing settings, and common options.

A verb imports its stage inside the function, so that `moce --help` answers at once and a verb needs only its own
packages.
"""

import os
from pathlib import Path
from typing import Any

import click

from moce_ds.common.config import settings as configuration
from moce_ds.common.config.values import expanded
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.rank import environment
from moce_ds.common.storage.cache import FOLDER, OFF

SETTINGS = "[CONFIG.yaml] [key=value ...]"
FORCED = "--force"
"""The option that starts a run although it does not fit into memory."""


class _PathType(click.ParamType):
    """A path, in which `~` and environment variables are expanded as in settings."""

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


class Verb(click.Command):
    """A command whose --help ends with its settings."""

    def __init__(self, *args: Any, settings: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List every setting with its default."""
        module, name = self.settings.split(":")
        cls = getattr(__import__(module, fromlist=[name]), name)
        heading = "Settings (key=default; docs/settings.md describes how values are read):"
        formatter.write(f"\n{heading}\n{configuration.help_text(cls)}\n")


def words(required: bool = False) -> Any:
    """The trailing arguments of a verb: a YAML file and `key=value` settings."""
    return click.argument("words", nargs=-1, required=required, metavar=SETTINGS)


def heads_option() -> Any:
    """The option for the number of heads, which a file of the public MAE does not contain."""
    return click.option(
        "--heads", type=click.IntRange(1), help="Attention heads of an ENCODER in a .pth file of unusual size."
    )


def force_option() -> Any:
    """The option `--force`, which also applies to child processes."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            from moce_ds.forecast.preflight import FORCE

            os.environ[FORCE] = "1"

    what = "Start pre-training even if this machine has too little memory."
    return click.option(FORCED, is_flag=True, expose_value=False, callback=remember, help=what)


def no_cache_option() -> Any:
    """The option `--no-cache`, for the length of a verb and the processes that it starts."""

    def apply(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.with_resource(environment({FOLDER: OFF}))

    what = 'Decode and encode all images, and keep nothing (docs/select.md, "The cache").'
    return click.option("--no-cache", is_flag=True, expose_value=False, callback=apply, help=what)
