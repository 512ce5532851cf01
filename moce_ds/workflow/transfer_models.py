"""The models that the transfer protocol compares: runs, their names, and the encoder that each gives a task."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moce_ds.checkpoint.format import Checkpoint, find, steps_of
from moce_ds.data.shards import ShardSet
from moce_ds.errors import ArtefactError
from moce_ds.export.routes import choose_selected
from moce_ds.export.select import run_clusters, select_route
from moce_ds.export.write import export_route
from moce_ds.models.encode import open_encoder
from moce_ds.models.token_encoder import token_encoder
from moce_ds.models.vit import Encoder, load_encoder
from moce_ds.workflow.transfer_tasks import Task

_logger = logging.getLogger(__name__)

_BY_GATE = {"cluster": "MoCE", "random": "MoCE, random gate", "token": "TokenMoE", "path": "SDR"}
_ORDER = ("MAE", "TokenMoE", "SDR", "MoCE, random gate", "MoCE")


@dataclass(frozen=True)
class Subject:
    """A run, and the name it has in tables."""

    name: str
    run: Path
    checkpoint: Checkpoint

    @property
    def by_token(self) -> bool:
        """Whether every token chooses its experts, so that there is no route, and no dense ViT to cut out."""
        experts = self.checkpoint.experts
        return experts is not None and experts["gate"] == "token"

    def open(self, encoder: Path, device: torch.device) -> Encoder:
        """The model behind what `encoder_for` gave. Raises ArtefactError."""
        return token_encoder(self.checkpoint, device) if self.by_token else open_encoder(encoder, device)

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name)


def find_subjects(places: list[Path]) -> list[Subject]:
    """The runs that `places` are, or hold: dense ones first, each named by its settings.

    Raises:
        ArtefactError: a place is neither a run nor a folder of runs.
    """
    runs = list(dict.fromkeys(run for place in places for run in _runs(place)))
    checkpoints = {run: find(run) for run in runs}
    names = {run: _model_name(checkpoint) for run, checkpoint in checkpoints.items()}
    runs.sort(key=lambda run: _ORDER.index(names[run]))
    alike = list(names.values())
    return [
        Subject(names[run] if alike.count(names[run]) == 1 else f"{names[run]} ({run})", run, checkpoints[run])
        for run in runs
    ]


def _runs(place: Path) -> list[Path]:
    if steps_of(place) or not place.is_dir():
        return [place]
    return sorted(path for path in place.iterdir() if path.is_dir() and steps_of(path)) or [place]


def _model_name(checkpoint: Checkpoint) -> str:
    experts = checkpoint.experts
    return _BY_GATE[experts["gate"]] if experts else "MAE"


def encoder_for(
    subject: Subject, task: Task, images: ShardSet, out: Path, device: torch.device
) -> tuple[Path, dict[str, Any] | None]:
    """The encoder that serves a task, and how it was selected: the run itself where it is dense or routes by token,
    else its expert for the task's training images, exported to `out` unless it is there.

    Raises:
        MoceError: as `moce select` and `moce export`.
    """
    if subject.by_token or not subject.checkpoint.experts:
        return subject.run, None
    checkpoint, clusters = run_clusters(subject.run)
    expert = out / subject.slug / task.name
    made_from = {"step": checkpoint.step, "clusters_hash": clusters.hash, "task_images": images.fingerprint}
    if expert.exists():
        provenance = _whole(expert)
        if provenance and all(provenance.get(key) == value for key, value in made_from.items()):
            return expert, dict(provenance["votes"])
        shutil.rmtree(expert)  # of an earlier step of the run, or of other images, or damaged
    selection = select_route(subject.run, images, task.config.knn, device)
    votes = selection.record(task.name)
    export_route(checkpoint, clusters, choose_selected(checkpoint, selection), expert, {**made_from, "votes": votes})
    return expert, votes


def _whole(expert: Path) -> dict[str, Any] | None:
    """Where an exported expert comes from; None, which is said, where it is damaged: whoever exported it can again."""
    try:
        return load_encoder(expert).provenance
    except ArtefactError as error:
        _logger.warning(f"{error} It is exported again.")
        return None
