"""All verbs of single stages, and a function that runs one of them in this process, for workflows."""

from collections.abc import Iterable
from typing import Any

import click

from moce_ds.cli.stages import bench, data, doctor, evaluation, pretraining, reports, selection, tuning
from moce_ds.common.config.values import arguments

_MODULES = (data, pretraining, selection, evaluation, tuning, reports, bench, doctor)
STAGE_VERBS: dict[str, click.Command] = {str(verb.name): verb for module in _MODULES for verb in module.VERBS}


def run_verb(words: Iterable[Any]) -> None:
    """Run a verb with its arguments in this process. Raises the errors of the verb, and SystemExit if it ends the
    process."""
    verb, *rest = arguments(words)
    STAGE_VERBS[verb](rest, prog_name=f"moce {verb}", standalone_mode=False)
