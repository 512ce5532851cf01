"""The verbs that read what other verbs wrote: report, inspect."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from moce_ds.cli.next_step import conclude
from moce_ds.cli.options import PATH
from moce_ds.common.host.program import say, show


@click.command()
@click.argument("folders", type=PATH, nargs=-1, required=True, metavar="FOLDER...")
@click.option("--out", type=PATH, help="File of the page (default: FOLDER/report.html, if there is one FOLDER).")
@click.option("--figures", type=PATH, help="Also write every plot to this folder, as SVG and its numbers as CSV.")
def report(folders: Sequence[Path], out: Path | None, figures: Path | None) -> None:
    """Write one self-contained HTML page about runs, folders of runs, or a study.

    The page compares all runs of all folders, and also shows the results.json of each folder.
    """
    from moce_ds.report.build import build_report

    page = build_report(*folders, out=out, figures=figures)
    say(str(page))
    conclude(page)


@click.command()
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read all files and compare checksums.")
def inspect(path: Path, verify: bool) -> None:
    """Describe what moce wrote to PATH, and verify its checksums.

    PATH holds shards, features, clusters, a run, a checkpoint, an encoder, an export, results, a study or a pipeline.
    """
    from moce_ds.inspection.inspection import describe, findings

    checked = findings(path) if verify else None
    unverified = ["These parts cannot be verified:", *checked.unverified] if checked and checked.unverified else []
    if checked and checked.faults:  # the description may fail because of them
        say(*checked.faults, *unverified)
        sys.exit(1)
    show(describe(path))
    if checked:
        say(*(["No fault found.", *unverified] if unverified else ["Verified: everything is as it was written."]))


VERBS = (report, inspect)
