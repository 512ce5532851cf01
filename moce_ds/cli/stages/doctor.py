"""`moce doctor`: the command line of the checks of this machine."""

import json
import logging
import sys
from pathlib import Path

import click

from moce_ds.cli.options import PATH
from moce_ds.common.host.program import say, show
from moce_ds.common.text import counted

_logger = logging.getLogger(__name__)


@click.command()
@click.option(
    "--folder", type=PATH, default=Path(), help="Measure the disk of this folder (default: the working directory)."
)
@click.option("--json", "as_document", is_flag=True, help="Print one JSON document.")
def doctor(folder: Path, as_document: bool) -> None:
    """Check this machine and installation, and print what to fix.

    A fault makes verbs fail, and ends the command with status 1; a warning concerns some verbs, or their speed. Every
    check ends after a limited time. Nothing is changed or left in FOLDER.
    """
    from moce_ds.doctor.checkup import as_json, findings

    _logger.info("Checking this machine; processes that import the libraries take some seconds each.")
    found = []
    for finding in findings(folder):
        found.append(finding)
        if not as_document:
            show(finding.row())
    document = as_json(found)
    faults, warnings = document["faults"], document["warnings"]
    if as_document:
        say(json.dumps(document, indent=2))
    else:
        say("", f"{counted(faults, 'fault')}, {counted(warnings, 'warning')}.")
    sys.exit(1 if faults else 0)


VERBS = (doctor,)
