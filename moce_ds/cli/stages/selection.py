"""The verbs about experts for a task: select finds them, export writes them as a dense ViT."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moce_ds.cli.next_step import beside, conclude, conclude_encoder
from moce_ds.cli.options import PATH, Verb, no_cache_option, words
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.host.program import say, show

if TYPE_CHECKING:
    from moce_ds.exporting.request import Target

_logger = logging.getLogger(__name__)


@click.command(cls=Verb, settings="moce_ds.encoders.settings:EncodeSettings")
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, required=True, help="Images of the task: shards, a folder, or a saved data set.")
@click.option("--task", default=None, help="Name of the task in results (default: from --data).")
@click.option("--results", type=PATH, help="A results.json to add the record to.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Number of routes in the table.")
@click.option("--picture", type=PATH, help="Write a PNG: images of the task and of the expert.")
@click.option("--export", "out", type=PATH, help="Also export the winning route to this folder.")
@click.option("--format", default="timm", show_default=True, help="Format of the export, as in moce export.")
@click.option("--part", default="encoder", show_default=True, help="Part to export: encoder, or full.")
@click.option("--replace", is_flag=True, help="Replace an earlier export.")
@no_cache_option()
@words()
def select(
    run: Path,
    data: Path,
    task: str | None,
    results: Path | None,
    top: int,
    picture: Path | None,
    words: Sequence[str],
    **export: Any,
) -> None:
    """Find the route through the experts of RUN that serves a task's images best.

    Also reports how typical the images are of the training data.
    """
    from moce_ds.data.task_images import opened_images, task_of
    from moce_ds.distributed.runtime import lone_device
    from moce_ds.encoders.settings import EncodeSettings
    from moce_ds.evaluation.results_file import add_record, known_by
    from moce_ds.exporting.request import summary
    from moce_ds.exporting.write import export_route
    from moce_ds.selection.routes import choose_selected, routes_of
    from moce_ds.selection.run_clusters import run_clusters
    from moce_ds.selection.selection_report import selection_report, write_picture
    from moce_ds.selection.vote import select_route

    config, target, name = read_settings(EncodeSettings, words), _target(**export), task or task_of(data)
    _check_outputs(target, picture, results)
    checkpoint, clusters = run_clusters(run)
    fixed = checkpoint.folder  # to one step, even if the run is still training
    with opened_images(data) as images:
        selection, fingerprint = select_route(fixed, images, config, lone_device()), images.fingerprint
        show(selection_report(selection, name, routes_of(checkpoint), top))
        if picture:
            note = write_picture(picture, images, name, selection, checkpoint)
            say(f"{picture}: written. {note or ''}".rstrip())
    record = selection.record(name)
    add_record(results, record | known_by(checkpoint, fingerprint))
    if target:
        experts, extra = choose_selected(checkpoint, selection), {"votes": record}
        provenance = export_route(checkpoint, clusters, experts, target.out, extra, target.format, target.replace)
        say(summary(target.out, provenance))
        _conclude_export(target, data)
    else:
        conclude(results or picture, "export", run, beside(run, f"expert-{name}"), "--data", data)


def _conclude_export(target: "Target", data: Path | None) -> None:
    if target.format.is_encoder_folder:
        conclude_encoder(target.out, data)
    else:
        conclude(target.out)


def _target(out: Path | None, format: str, part: str, replace: bool) -> "Target | None":
    """Where and how `--export` writes; None without this option. Raises ConfigError if there is no such format."""
    from moce_ds.exporting.formats.registry import find_format
    from moce_ds.exporting.request import Target

    found = find_format(format, part)
    return Target(out, found, replace) if out else None


def _check_outputs(target: "Target | None", picture: Path | None, results: Path | None) -> None:
    """Check that the outputs can be written, before any image is read. Raises ConfigError and ArtefactError."""
    from moce_ds.common.storage.files import PICTURE_MARK, check_output
    from moce_ds.evaluation.results_file import check_results
    from moce_ds.exporting.existing_export import check_free

    if target:
        check_free(target.out, target.replace)
    if picture:
        check_output(picture, "a picture", PICTURE_MARK)
    check_results(results)


@click.command(cls=Verb, settings="moce_ds.encoders.settings:EncodeSettings")
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--data",
    type=PATH,
    help="Images of a task, whose votes choose the route: shards, or what `shards` reads.",
)
@click.option("--cluster", type=int, help="Export the route of one cluster.")
@click.option("--route", help="Export these experts, one per layer: 3-5; or auto: choose by --data.")
@click.option("--expert", type=int, help="Export the most frequent route through this expert of the last expert layer.")
@click.option("--all", is_flag=True, help="Export every route in use, each to a folder in OUT.")
@click.option("--average", help="Export the average of all experts: uniform, or weighted by --data or training images.")
@click.option(
    "--format",
    default="timm",
    show_default=True,
    help="timm, hf-vit, hf-vitmae, onnx, detectron2, mmdet, mmseg or mmpretrain.",
)
@click.option(
    "--part", default="encoder", show_default=True, help="encoder, or full: with the decoder (timm, hf-vitmae)."
)
@click.option("--replace", is_flag=True, help="Replace an earlier export in OUT.")
@no_cache_option()
@words()
def export(run: Path, out: Path, format: str, part: str, replace: bool, words: Sequence[str], **request: Any) -> None:
    """Write experts of RUN as a dense ViT to OUT.

    The encoder of a dense RUN needs no choice of experts. docs/export.md describes the options and formats.
    """
    from moce_ds.data.task_images import task_of
    from moce_ds.distributed.runtime import lone_device
    from moce_ds.encoders.settings import EncodeSettings
    from moce_ds.exporting.formats.registry import find_format
    from moce_ds.exporting.request import Request, Target, export_requested, summary

    config, target = read_settings(EncodeSettings, words), Target(out, find_format(format, part), replace)
    task = task_of(request["data"]) if request["data"] else None
    for folder, provenance in export_requested(run, Request(**request), target, config, lone_device(), task):
        say(summary(folder, provenance))
    if request["all"]:
        conclude(out)
    else:
        _conclude_export(target, request["data"])


VERBS = (select, export)
