"""The verbs that read what other verbs wrote: report, inspect."""

import sys
from pathlib import Path

import click

from moce_ds.cli.next_step import conclude
from moce_ds.cli.options import PATH
from moce_ds.common.host.program import say, show


@click.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="File of the page (default: FOLDER/report.html).")
def report(folder: Path, out: Path | None) -> None:
    """Write one self-contained HTML page about a run, a folder of runs, or a study.

    The page of a folder also shows its results.json.
    """
    from moce_ds.report.build import build_report

    page = build_report(folder, out)
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
