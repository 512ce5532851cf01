"""Experts of a run: the route that serves a task, and its dense ViT on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moce_ds.api.given import AnyPath, as_path, settings_of
from moce_ds.common.host.program import python_call
from moce_ds.data.task_images import opened_images, task_of
from moce_ds.distributed.runtime import lone_device
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.exporting.formats.registry import find_format
from moce_ds.exporting.request import Request, Target, export_requested
from moce_ds.selection.vote import Selection, select_route


@python_call()
def select(run: AnyPath, data: AnyPath, **settings: Any) -> Selection:
    """The route through the experts of a run that serves a task's images best, as `moce select`.

    Args:
        run: a run with experts, or one of its checkpoints.
        data: images of the task: a shard set, or what `moce shards` reads.
        settings: of `moce select`, such as `batch_size=64`.

    Returns:
        The vote: `route`, one expert for each expert layer, its `share` of the votes, all `routes`, the share of the
        images in each of the `clusters`, and the `typicality` of the images.

    Raises:
        ConfigError: a setting is not allowed.
        ArtefactError: the run has no routes, or is damaged.
        DataError: there are no images in `data`, or one is damaged.

    Example::

        found = moce_ds.select("runs/moce", "task/train")
        print(found.route, found.share)
        print(found.typicality.verdict)
    """
    config = settings_of(EncodeSettings, settings)
    with opened_images(as_path(data)) as images:
        return select_route(as_path(run), images, config, lone_device())


@python_call()
def export(
    run: AnyPath,
    out: AnyPath,
    *,
    data: AnyPath | None = None,
    cluster: int | None = None,
    route: str | Sequence[int] | None = None,
    expert: int | None = None,
    all: bool = False,
    average: str | None = None,
    format: str = "timm",
    part: str = "encoder",
    replace: bool = False,
    **settings: Any,
) -> dict[Path, dict[str, Any]]:
    """Write experts of a run as a dense ViT, as `moce export`; a complete export of the same request is kept.

    Args:
        run, out: a run, or one of its checkpoints; and the folder to write.
        data, cluster, route, expert, all, average, format, part, replace: the options of `moce export`
            (docs/export.md); a route also as a list, such as `[3, 5]`. A dense run needs none.
        settings: how the images of `data` are encoded, such as `batch_size=64`.

    Returns:
        The provenance of each written folder: run, route, and the difference from the trained model.

    Raises:
        ConfigError, ArtefactError, DataError: as the verb.

    Example::

        [(folder, provenance)] = moce_ds.export("runs/moce", "expert", data="task/train").items()
    """
    config, images = settings_of(EncodeSettings, settings), None if data is None else as_path(data)
    experts = route if route is None or isinstance(route, str) else ",".join(map(str, route))
    request = Request(images, cluster, experts, expert, all, average)
    target, task = Target(as_path(out), find_format(format, part), replace), None if images is None else task_of(images)
    return dict(export_requested(as_path(run), request, target, config, lone_device(), task))
