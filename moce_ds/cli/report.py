"""The verbs that read what is on disk: report, inspect."""

import sys
from pathlib import Path

import click

from moce_ds.cli.options import PATH
from moce_ds.console import say, show


@click.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="The page (default: FOLDER/report.html).")
def report(folder: Path, out: Path | None) -> None:
    """Write one self-contained HTML page about a run, about a folder of runs and their results.json, or a study."""
    from moce_ds.report.build import build_report

    say(str(build_report(folder, out)))


@click.command()
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and compare checksums.")
def inspect(path: Path, verify: bool) -> None:
    """Say what PATH is (shards, features, clusters, run, checkpoint, encoder, results) and what it holds."""
    from moce_ds.report.inspection import describe, findings

    found = findings(path) if verify else None
    unverified = ["These parts cannot be verified:", *found.unverified] if found and found.unverified else []
    if found and found.faults:  # which the description may be refused for
        say(*found.faults, *unverified)
        sys.exit(1)
    show(describe(path))
    if found:
        say(*(["No fault found.", *unverified] if unverified else ["Verified: everything is as it was written."]))


VERBS = (report, inspect)
