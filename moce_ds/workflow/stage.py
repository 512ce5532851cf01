"""One stage of a pipeline: what it is known by, its state on disk, and running it."""

import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import click

from moce_ds.artefacts.pipeline_folder import PIPELINE, STAGES, StagesRecord
from moce_ds.cli.verbs import run_verb
from moce_ds.config.settings import completed, to_tree
from moce_ds.errors import STOPPED, MoceError
from moce_ds.host.place import Place
from moce_ds.launch.local import run_processes
from moce_ds.storage.checksums import read_checked, write_checked
from moce_ds.storage.files import sha256_of, writes_to
from moce_ds.storage.locks import held, is_held
from moce_ds.text import in_line

_logger = logging.getLogger(__name__)

Name = Literal["shards", "mae", "features", "clusters", "moce", "export", "evaluation"]
"""The stages, in order."""

_PARALLEL = ("mae", "features", "moce")
_LAST = ("shards.json", "checkpoints/step-*/manifest.json", "features.json", "clusters.json", "config.json")
"""What is written last into a folder (shards, run, features, clusters, encoder); it holds checksums of the rest."""


@dataclass(frozen=True)
class StageRecord:
    """OUT/pipeline/NAME.json: a stage, as far as it has come.

    Attributes:
        made_from: its commands, their settings, and digests of what they read.
        at: when it came to this state.
        seconds: how long the start that ended it took.
        told: why it failed.
    """

    made_from: dict[str, Any]
    at: str
    state: Literal["begun", "done", "failed"] = "begun"
    seconds: float = 0.0
    told: str = ""


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        folder: where its state is kept.
        config: the settings of its verbs.
        commands: words after `moce`, in order; a parallel stage has one.
        reads, makes: files and folders that are there before and after.
    """

    name: Name
    folder: Path
    config: Any
    commands: list[list[str]]
    reads: list[Path]
    makes: list[Path]

    @property
    def parallel(self) -> bool:
        """Whether several processes share its work."""
        return self.name in _PARALLEL

    @property
    def state(self) -> Path:
        """The file of its record."""
        return self.folder / f"{self.name}.json"

    @property
    def lock(self) -> Path:
        """What the process holds that runs it."""
        return self.folder / f".{self.name}.lock"

    def record(self) -> StageRecord | None:
        """What is known of it, None before its first start. Raises ArtefactError."""
        there = self.state.exists()
        return read_checked(self.state, StageRecord, "a stage's record", "moce pipeline") if there else None

    def made_from(self) -> dict[str, Any]:
        """All that decides what it makes, as things are now."""
        read = {str(place): digest(place) for place in self.reads}
        return {"commands": self.commands, "settings": to_tree(self.config), "read": read}

    def is_done(self) -> bool:
        """Whether it was run to its end on what is there now, and what it made is still there. Raises ArtefactError."""
        record = self.record()
        if record is None or record.state != "done":
            return False
        settings = completed(record.made_from.get("settings", {}), type(self.config))
        if record.made_from | {"settings": settings} != self.made_from():
            return False
        return all(digest(place) for place in self.makes)


def digest(place: Path) -> str | None:
    """SHA-256 of a file, or of what was written last into a folder; None: nothing is there, or a folder of images."""
    found = [place] if place.is_file() else sorted(path for name in _LAST for path in place.glob(name))
    return sha256_of(found[-1]) if found else None


class StageError(MoceError):
    """A stage failed, with the status of what it ran."""

    def __init__(self, stage: Stage, told: str, status: int) -> None:
        super().__init__(
            f"Stage {stage.name} failed: {told}\nIts state is in {stage.state}; the same command goes on with it."
        )
        self.status = status


def run_stage(stage: Stage, shared: Sequence[str], processes: int) -> int:
    """Run a stage that no other process has done meanwhile; returns 0, or STOPPED where it was stopped as asked.

    Args:
        shared: the command by which several `processes` run a parallel stage: it must come to `share_stage`.

    Raises:
        StageError: it failed.
    """
    while True:
        with held(stage.lock):
            if stage.is_done():
                return 0
            if not stage.parallel:
                _work(stage)
                return 0
        status = run_processes(shared, processes)  # of which the first holds the stage
        if status in (0, STOPPED):
            return status
        if not is_held(stage.lock):  # else those of another start were faster, and are waited for
            return _explained(stage, status)


def _explained(stage: Stage, status: int) -> int:
    """The status with which a stage's processes failed. Raises StageError where the first of them left no reason."""
    record = stage.record()
    if record is None or record.state != "failed":  # killed, or by a defect
        told = f"its processes ended with status {status}; what they said is above."
        known = record or StageRecord(stage.made_from(), _now())
        write_record(stage, replace(known, at=_now(), state="failed", told=told))
        raise StageError(stage, told, status)
    return status


def share_stage(stage: Stage) -> None:
    """Run a parallel stage as one of its processes, of which the first keeps the record. Raises StageError."""
    if Place.here().rank:
        _run_commands(stage)
        return
    with held(stage.lock):
        _work(stage)


def write_record(stage: Stage, record: StageRecord) -> None:
    """Replace a stage's record. Raises ArtefactError."""
    with writes_to(stage.state):
        write_checked(stage.state, asdict(record))


def keep_stages(stages: Sequence[Stage], out: Path) -> None:
    """Leave the order of the stages, and what each makes, for whoever verifies the folder. Raises ArtefactError."""
    makes: dict[str, list[str]] = {
        stage.name: [str(place.relative_to(out) if place.is_relative_to(out) else place) for place in stage.makes]
        for stage in stages
    }
    with writes_to(out):
        write_checked(out / PIPELINE / STAGES, asdict(StagesRecord(makes)))


class _Recording:
    """Keeps a stage's record while the block runs it: begun, then done or failed; stopped as asked it stays begun."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._began = time.monotonic()
        self._record = StageRecord(stage.made_from(), _now())

    def __enter__(self) -> None:
        write_record(self._stage, self._record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit | click.Abort):
            return
        ended = replace(self._record, at=_now(), seconds=round(time.monotonic() - self._began, 1))
        if error is None:
            write_record(self._stage, replace(ended, state="done"))
        else:
            write_record(self._stage, replace(ended, state="failed", told=str(error) or repr(error)))


def _work(stage: Stage) -> None:
    """Run the commands in this process, on record. Raises StageError."""
    try:
        with _Recording(stage):
            _run_commands(stage)
    except MoceError as error:
        raise StageError(stage, str(error), error.status) from None


def _run_commands(stage: Stage) -> None:
    for command in stage.commands:
        _logger.info(f"$ moce {in_line(shlex.join(command))}")
        run_verb(command)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
