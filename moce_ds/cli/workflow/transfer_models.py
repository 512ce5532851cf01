"""The models that the transfer protocol compares: runs, their names, and the encoder of each for a task."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moce_ds.checkpoint.format import Checkpoint, find, steps_of
from moce_ds.cli.workflow.stage import Stage, StageRecord
from moce_ds.cli.workflow.transfer_tasks import Task
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.model_kinds import MODEL_KINDS, ModelKind, model_kind_by_gate
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.encoder_folder import PROVENANCE
from moce_ds.common.storage.files import read_json
from moce_ds.data.shards import ShardSet
from moce_ds.encoders.from_checkpoint import token_encoder
from moce_ds.encoders.open import open_encoder
from moce_ds.exporting.write import export_route
from moce_ds.models.vit import Encoder, load_encoder
from moce_ds.selection.routes import choose_selected
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.selection.vote import select_route

_logger = logging.getLogger(__name__)

_ORDER = [kind.title for kind in MODEL_KINDS]


@dataclass(frozen=True)
class Subject:
    """A run, its name in tables, and the checkpoint that is compared, even if the run is still training."""

    name: str
    run: Path
    checkpoint: Checkpoint

    @property
    def has_routes(self) -> bool:
        """Whether a task selects one of its experts; else its encoder is the run itself."""
        return bool(self.checkpoint.experts) and not self.by_token

    @property
    def by_token(self) -> bool:
        """Whether every token chooses its experts; then there are no routes and no dense ViT to export."""
        model_kind = _model_kind(self.checkpoint)
        return model_kind.has_experts and not model_kind.routes_by_cluster

    def open(self, encoder: Path, device: torch.device) -> Encoder:
        """The model of an encoder: an exported expert, or the run's checkpoint. Raises ArtefactError."""
        if self.by_token:
            return token_encoder(self.checkpoint, device)
        return open_encoder(encoder if self.has_routes else self.checkpoint.folder, device)

    @property
    def slug(self) -> str:
        """The name as the name of a folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name)


def find_subjects(places: list[Path]) -> list[Subject]:
    """The runs at or in `places`, dense ones first, each named by its settings.

    Raises:
        ArtefactError: a place is neither a run nor a folder of runs.
    """
    runs = list(dict.fromkeys(run for place in places for run in _runs(place)))
    checkpoints = {run: find(run) for run in runs}
    names = {run: _model_kind(checkpoint).title for run, checkpoint in checkpoints.items()}
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


def _model_kind(checkpoint: Checkpoint) -> ModelKind:
    experts = checkpoint.experts
    return model_kind_by_gate(experts["gate"] if experts else None)


@dataclass(frozen=True)
class Expert:
    """The encoder of a run with experts for a task: the expert selected by the training images, exported to a folder.

    The export is its own record: `provenance.json` says what it was made from and how it was selected.
    """

    subject: Subject
    task: Task
    images: ShardSet
    path: Path
    device: torch.device

    def stage(self, name: str) -> Stage:
        """Selection and export as a stage."""
        return Stage(
            name,
            records=self,
            lock=self.path.with_name(f".{self.path.name}.lock"),
            made_from=self.made_from,
            work=self._export,
            outputs=[self.path],
        )

    def made_from(self) -> MadeFrom:
        """The checkpoint, the clusters of the run, and the images. Raises ArtefactError."""
        checkpoint, clusters = run_clusters(self.subject.checkpoint.folder)
        parts = {"step": checkpoint.step, "clusters_hash": clusters.hash, "task_images": self.images.fingerprint}
        return MadeFrom(parts)

    def read(self) -> StageRecord | None:
        """As `RecordFile`; a damaged export counts as missing."""
        if not self.path.exists():
            return None
        try:
            return StageRecord(load_encoder(self.path).provenance, "done")
        except ArtefactError:
            return None

    def write(self, record: StageRecord) -> None:
        """As `RecordFile`; does nothing, because the export writes its own provenance."""

    def votes(self) -> dict[str, Any]:
        """The votes that selected it. Raises ArtefactError."""
        return dict(read_json(self.path / PROVENANCE, "an exported expert", "moce transfer")["votes"])

    def _export(self) -> dict[str, Any]:
        """Select and export the expert. Raises MoceError if `moce select` or `moce export` does."""
        checkpoint, clusters = run_clusters(self.subject.checkpoint.folder)
        if self.path.exists():  # from an earlier step or other images, or damaged
            self._warn_damaged()
            shutil.rmtree(self.path)
        selection = select_route(checkpoint.folder, self.images, self.task.config.knn, self.device)
        provenance = {**self.made_from().parts, "votes": selection.record(self.task.name)}
        export_route(checkpoint, clusters, choose_selected(checkpoint, selection), self.path, provenance)
        return {}

    def _warn_damaged(self) -> None:
        try:
            load_encoder(self.path)
        except ArtefactError as error:
            _logger.warning(f"{error} It is exported again.")
