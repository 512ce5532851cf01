"""A stage of a workflow: its work, the inputs that determine its result, and its record on disk.

One process runs a stage, or several share it. The first process holds the stage's lock and writes its record: begun,
then done or failed. A stopped stage stays begun.
"""

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import click

from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.stages.registry import run_verb
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.rank import ProcessRank
from moce_ds.common.storage.encoder_folder import EncoderFolder
from moce_ds.common.storage.files import sha256_of
from moce_ds.common.storage.locks import held, is_held
from moce_ds.common.text import counted, in_line
from moce_ds.data.clusters import Clusters
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.image_folder import walk
from moce_ds.data.sources.source import listing_digest
from moce_ds.inspection.pipeline_folder import PipelineStageRecord

_logger = logging.getLogger(__name__)

State = Literal["begun", "done", "failed"]
Measures = dict[str, Any]
"""The measurements of a stage, by name."""

_LAST_FILES = (
    ShardSet.last_file, RunFolder.last_file, FeatureSet.last_file, Clusters.last_file, EncoderFolder.last_file,
)  # fmt: skip
"""Patterns of the file that a stage writes last into an output folder; it holds checksums of the other files."""


@dataclass(frozen=True)
class StageRecord:
    """The progress of a stage.

    Attributes:
        made_from: all that determines its result, when it began.
        at: the time of the last change of state, ISO 8601; "" if the file does not record it.
        seconds: the duration of the last start.
        message: the cause of a failure.
        measures: its measurements, once it is done.
    """

    made_from: dict[str, Any]
    state: State = "begun"
    at: str = ""
    seconds: float = 0.0
    message: str = ""
    measures: Measures = field(default_factory=dict)


class RecordFile(Protocol):
    """Reads and writes a stage's record on disk. Every workflow has its own format."""

    @property
    def path(self) -> Path:
        """The path of the file, for messages."""
        ...

    def read(self) -> StageRecord | None:
        """The record, None before the stage's first start. Raises ArtefactError."""
        ...

    def write(self, record: StageRecord) -> None:
        """Replace the record. Raises ArtefactError."""
        ...


@dataclass(frozen=True)
class Launch:
    """How to start a stage in new processes; each process calls `perform`.

    Attributes:
        log: for a stage of one process, the file that receives its output instead of the terminal.
    """

    command: list[str]
    log: Path | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of a workflow.

    Attributes:
        name: unique in its workflow.
        records, lock: the file of its record, and the lock of the process that runs it.
        made_from: all that determines its result, now.
        work: runs in its first process; returns the measurements.
        share: runs in its other processes; None for a stage of one process.
        outputs: paths that exist once it is done.
        needs: names of the stages that must be done before it.
        processes, nodes: the number of processes on each machine, and of machines.
        launch: how to start it; None to run it in the process of the workflow.
        commands: its work as words after `moce`, if it consists of commands.
        config: the settings of its work.
        profile: returns the size of its job, given the common settings of the workflow's jobs.
    """

    name: str
    records: RecordFile
    lock: Path
    made_from: Callable[[], MadeFrom]
    work: Callable[[], Measures]
    share: Callable[[], None] | None = None
    outputs: Sequence[Path] = ()
    needs: Sequence[str] = ()
    processes: int = 1
    nodes: int = 1
    launch: Launch | None = None
    commands: Sequence[Sequence[str]] = ()
    config: Any = None
    profile: Callable[[SlurmProfile], SlurmProfile] = SlurmProfile.for_one_process

    @property
    def parallel(self) -> bool:
        """Whether several processes share its work."""
        return self.share is not None

    def record(self) -> StageRecord | None:
        """The record of the stage; None before its first start. Raises ArtefactError."""
        return self.records.read()

    def is_done(self) -> bool:
        """Whether it is done with the current settings and inputs, and its outputs exist. Raises ArtefactError."""
        record = self.record()
        if record is None or record.state != "done":
            return False
        return self.made_from().compare(record.made_from).same and all(digest(place) for place in self.outputs)

    def state(self) -> str:
        """One of waiting, running, begun, done, failed, changed (done with other inputs). Raises ArtefactError."""
        record = self.record()
        if is_held(self.lock):
            return "running"
        if record is None:
            return "waiting"
        return "changed" if record.state == "done" and not self.is_done() else record.state


@dataclass(frozen=True)
class Workflow:
    """The stages of a workflow, and their names on the command line.

    Attributes:
        verb, noun: `moce VERB WORDS --NOUN NAME` runs one stage: pipeline and stage, study and cell.
        out: the folder of all outputs.
        stages: ordered so that each comes after those that it needs.
    """

    verb: str
    noun: str
    out: Path
    stages: Sequence[Stage]

    def named(self, name: str) -> Stage:
        """The stage called `name`. Raises ConfigError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages)
        raise ConfigError(f"--{self.noun}: the {self.verb} has no {self.noun} {name}; it has {known}.")

    def place(self, stage: Stage) -> str:
        """The position and name of a stage, such as `stage 2 of 7 mae`."""
        number = [other.name for other in self.stages].index(stage.name) + 1
        return f"{self.noun} {number} of {len(self.stages)} {stage.name}"

    def summary(self, stages: Sequence[Stage]) -> str:
        """How many of `stages` are done, as text. Raises ArtefactError."""
        return f"{sum(stage.is_done() for stage in stages)} of {counted(len(stages), self.noun)} done"


def digest(place: Path) -> str | None:
    """SHA-256 of a file, or of the file that is written last into a folder; None if neither exists."""
    found = [place] if place.is_file() else sorted(path for name in _LAST_FILES for path in place.glob(name))
    return sha256_of(found[-1]) if found else None


def input_digest(place: Path) -> str | None:
    """`digest`, or that of the listing of a folder of images. Raises DataError if the folder cannot be listed."""
    known = digest(place)
    return listing_digest(walk(place)) if known is None and place.is_dir() else known


def perform(stage: Stage) -> None:
    """Run a stage in this process, or this process's share of it, unless it is done.

    Raises:
        MoceError: the stage failed; its record says why.
        SystemExit: one of its commands ended the process, for example after a request to stop.
    """
    here = ProcessRank.here()
    if here.rank and stage.share:
        stage.share()
        return
    with held(stage.lock):
        if here.world_size == 1 and stage.is_done():  # all processes of a stage run it, or none does
            _logger.info(f"{stage.name} was done meanwhile by another process.")
            return
        with _Recording(stage) as recording:
            recording.measures = stage.work()


class _Recording:
    """Writes a stage's record around the block that runs it: begun, then done or failed. A stop leaves it begun."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._began = time.monotonic()
        self._record = StageRecord(stage.made_from().parts, at=now())
        self.measures: Measures = {}

    def __enter__(self) -> "_Recording":
        self._stage.records.write(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit | click.Abort):
            return
        ended = replace(self._record, at=now(), seconds=round(time.monotonic() - self._began, 1))
        if error is None:
            self._stage.records.write(replace(ended, state="done", measures=self.measures))
        else:
            self._stage.records.write(replace(ended, state="failed", message=str(error) or repr(error)))


def run_commands(commands: Sequence[Sequence[str]]) -> None:
    """Log and run `moce` commands in this process, one after the other.

    Raises:
        MoceError: a command failed.
        SystemExit: a command ended the process.
    """
    for command in commands:
        _logger.info(f"$ moce {in_line(shlex.join(command))}")
        run_verb(command)


@dataclass(frozen=True)
class StageFile:
    """The record of a stage in a separate file, in the format of a pipeline's stages."""

    path: Path

    def read(self) -> StageRecord | None:
        """As `RecordFile`."""
        found = PipelineStageRecord.read(self.path)
        if found is None:
            return None
        return StageRecord(found.made_from, found.state, found.at, found.seconds, found.message)

    def write(self, record: StageRecord) -> None:
        """As `RecordFile`."""
        PipelineStageRecord(record.made_from, record.at, record.state, record.seconds, record.message).write(self.path)


def now() -> str:
    """The current time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
