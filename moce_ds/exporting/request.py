"""The options of `moce export`, and their execution."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moce_ds.checkpoint.format import Checkpoint, find
from moce_ds.common.config.model_kinds import model_kind_by_gate
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.files import atomic_folder, writes_to
from moce_ds.common.text import route_label
from moce_ds.data.clusters import Clusters
from moce_ds.data.task_images import opened_images
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.exporting.existing_export import ROUTE, check_free, refuse_other_routes
from moce_ds.exporting.formats.registry import TIMM, Format
from moce_ds.exporting.write import export_dense, export_route
from moce_ds.selection import routes as choosing
from moce_ds.selection.routes import AVERAGES, SelectedExperts
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.selection.vote import Selection, select_route

AUTO = "auto"
_OPTIONS = "--data, --cluster, --route, --expert, --all, --average"


@dataclass(frozen=True)
class Request:
    """The options as given; None or False if an option is absent."""

    data: Path | None = None
    cluster: int | None = None
    route: str | None = None
    expert: int | None = None
    all: bool = False
    average: str | None = None

    @property
    def choice(self) -> str | None:
        """The option that chooses the route (`--data` may stand alone). Raises ConfigError for contradictions."""
        options = [f"--{name}" for name, value in vars(self).items() if value is not None and value is not False]
        choosing = [option for option in options if option != "--data"]
        if len(choosing) > 1:
            raise ConfigError(f"Got {' and '.join(choosing)}: choose a route with one of {_OPTIONS}.")
        if self.route == AUTO and self.data is None:
            raise ConfigError("--route auto: the images of --data choose the route; name a shard set or a folder.")
        if self.data is not None and choosing and self.route != AUTO and self.average is None:
            raise ConfigError(f"--data: {choosing[0]} takes no images; use --data with --route auto or --average.")
        if self.average is not None and self.average not in AVERAGES:
            raise ConfigError(f"--average: got {self.average!r}; expected {' or '.join(AVERAGES)}.")
        return next(iter(choosing or options), None)


@dataclass(frozen=True)
class Target:
    """Where and how exports are written.

    Attributes:
        out: the folder.
        format: what is written into it.
        replace: replace an earlier export of another request.
    """

    out: Path
    format: Format = TIMM
    replace: bool = False


def export_requested(
    run: Path, request: Request, target: Target, config: EncodeSettings, device: torch.device, task: str | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write the requested exports that do not exist yet; yields each folder with its provenance.

    With `--all` the folders appear in `target.out` together, after the last one is complete.

    Args:
        config: how the images of `request.data` are encoded, on `device`.
        task: the name of the task of `request.data`.

    Raises:
        ConfigError: the options do not match the run, or `target.out` holds something else.
        ArtefactError: the run is damaged, or `target.out` cannot be written.
    """
    choice, checkpoint, out = request.choice, find(run), target.out
    check_free(out, target.replace)
    _check_choice(choice, checkpoint, run)
    if not checkpoint.experts:
        yield out, export_dense(checkpoint, out, target.format, target.replace)
        return
    run = checkpoint.folder  # fixed to one step, even if the run is still training
    checkpoint, clusters = run_clusters(run)
    if request.all:
        yield from _export_all(checkpoint, clusters, target)
        return
    selection = _selection(run, request.data, config, device)
    votes = {"votes": selection.record(task or "")} if selection else {}
    selected = _selected_experts(checkpoint, request, selection)
    yield out, export_route(checkpoint, clusters, selected, out, votes, target.format, target.replace)


def _export_all(checkpoint: Checkpoint, clusters: Clusters, target: Target) -> Iterator[tuple[Path, dict[str, Any]]]:
    out, format = target.out, target.format
    routes = {f"{ROUTE}{route_label(one.experts or ())}": one for one in choosing.choose_all(checkpoint)}
    if out.exists() and not target.replace:
        refuse_other_routes(out, set(routes))
        for name, selected in routes.items():
            yield out / name, export_route(checkpoint, clusters, selected, out / name, {}, format)
        return
    with writes_to(out), atomic_folder(out) as draft:
        for name, selected in routes.items():
            yield out / name, export_route(checkpoint, clusters, selected, draft / name, {}, format)


def _check_choice(choice: str | None, checkpoint: Checkpoint, run: Path) -> None:
    """Raise ConfigError if an option does not match the run."""
    if not checkpoint.experts:
        if choice:
            raise ConfigError(f"{choice}: {run} is a dense run, which has one encoder and no routes.")
    elif not choice:
        raise ConfigError(f"{run} has experts: choose a route with one of {_OPTIONS}.")
    elif choice == "--average" and model_kind_by_gate(checkpoint.entry("model", "experts", "gate")).splits_mlp:
        raise ConfigError(f"--average: {run} is an SDR, whose groups of hidden units cannot be averaged.")


def _selection(run: Path, data: Path | None, config: EncodeSettings, device: torch.device) -> Selection | None:
    if data is None:
        return None
    with opened_images(data) as images:
        return select_route(run, images, config, device)


def _selected_experts(checkpoint: Checkpoint, request: Request, selection: Selection | None) -> SelectedExperts:
    if request.average is not None:
        return choosing.choose_average(checkpoint, request.average, selection.clusters if selection else None)
    if selection is not None:
        return choosing.choose_selected(checkpoint, selection)
    if request.cluster is not None:
        return choosing.choose_cluster(checkpoint, request.cluster)
    if request.expert is not None:
        return choosing.choose_expert(checkpoint, request.expert)
    return choosing.choose_route(checkpoint, _experts(str(request.route)))


def _experts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", "-").split("-"))
    except ValueError:
        raise ConfigError(f"--route: got {text!r}; expected one expert per layer, such as 3-5.") from None


def summary(out: Path, provenance: dict[str, Any]) -> str:
    """A line for the terminal about an export."""
    route, back = provenance["route"], provenance["loaded_back"]
    what, twin = "dense encoder", "the trained model"
    if route:
        what = f"route {route_label(tuple(route))}"
    elif "average" in provenance:
        what, twin = f"{provenance['average']} average", "trained blocks around averaged experts"
    if back["library"]:
        check = f"loaded back by {back['library']}: {back['max_difference']:.1e}"
    else:
        check = f"not loaded back: {back['reason']}"
    return (
        f"{out}: {what} of step {provenance['step']} as {provenance['format']}, {provenance['part']}; differs from "
        f"{twin} by {provenance['max_difference']:.1e} (of the largest output); {check}"
    )
