"""A step of a workflow: what it runs, what decides its result, and its record on disk.

One process runs a step, or several share it. The first of them holds the step's lock and keeps its record: begun, then
done or failed. A step that is stopped stays begun.
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

from moce_ds.artefacts.pipeline_folder import StageRecord
from moce_ds.checkpoint import format as checkpoint
from moce_ds.cli.verbs import run_verb
from moce_ds.clustering import clusters, feature_store
from moce_ds.data import shards
from moce_ds.errors import ConfigError
from moce_ds.host.place import Place
from moce_ds.launch.slurm_profile import SlurmProfile
from moce_ds.storage import encoder_folder
from moce_ds.storage.files import sha256_of
from moce_ds.storage.locks import held, is_held
from moce_ds.storage.made_from import MadeFrom
from moce_ds.text import counted, in_line

_logger = logging.getLogger(__name__)

State = Literal["begun", "done", "failed"]
Measures = dict[str, Any]
"""What a step has measured, by name."""

_WRITTEN_LAST = (
    shards.MANIFEST, f"checkpoints/step-*/{checkpoint.MANIFEST}", feature_store.RECORD, clusters.RECORD,
    encoder_folder.CONFIG,
)  # fmt: skip
"""The last file of a folder (shards, run, features, clusters, encoder); it holds checksums of the others."""


@dataclass(frozen=True)
class StepRecord:
    """A step, as far as it has come.

    Attributes:
        made_from: what decides its result, as things were when it began.
        at: when it came to this state, ISO 8601; "" where its file does not say.
        seconds: how long the start took that ended it.
        message: why it failed.
        measures: what it has measured, once it is done.
    """

    made_from: dict[str, Any]
    state: State = "begun"
    at: str = ""
    seconds: float = 0.0
    message: str = ""
    measures: Measures = field(default_factory=dict)


class RecordFile(Protocol):
    """Where a step's record lies on disk. Every workflow has its own format."""

    @property
    def path(self) -> Path:
        """The file, for messages."""
        ...

    def read(self) -> StepRecord | None:
        """The record, None before the step's first start. Raises ArtefactError."""
        ...

    def write(self, record: StepRecord) -> None:
        """Replace the record. Raises ArtefactError."""
        ...


@dataclass(frozen=True)
class Launch:
    """How a step is started in processes of its own, each of which comes to `perform`.

    Attributes:
        log: of a step of one process: the file that its output goes to, so that it prints nothing here.
    """

    command: list[str]
    log: Path | None = None


@dataclass(frozen=True)
class Step:
    """One step of a workflow.

    Attributes:
        name: unique in its workflow.
        records, lock: the file of its record, and the lock of the process that runs it.
        made_from: all that decides its result, as things are now.
        work: what its first process runs; returns what it measures.
        share: what the other processes run that share it; None: one process runs it.
        outputs: what is there once it is done.
        needs: names of the steps that must be done before it.
        processes, nodes: processes on each machine that share its work, and machines.
        launch: how it is started; None: in the process of the workflow.
        commands: words after `moce`, where its work is known before it is run.
        config: the settings of what it runs.
        profile: the size of its job, from the settings that the workflow's jobs have in common.
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

    def record(self) -> StepRecord | None:
        """Its record, None before its first start. Raises ArtefactError."""
        return self.records.read()

    def is_done(self) -> bool:
        """Whether it is done for what is asked for now, and its outputs are there. Raises ArtefactError."""
        record = self.record()
        if record is None or record.state != "done":
            return False
        return self.made_from().compare(record.made_from).same and all(digest(place) for place in self.outputs)

    def state(self) -> str:
        """In a word: waiting, running, begun, done, failed, or changed (done for something else). ArtefactError."""
        record = self.record()
        if is_held(self.lock):
            return "running"
        if record is None:
            return "waiting"
        return "changed" if record.state == "done" and not self.is_done() else record.state


@dataclass(frozen=True)
class Workflow:
    """Steps, and how the command line names them.

    Attributes:
        verb, noun: of `moce VERB WORDS --NOUN STEP`, which runs one step: pipeline and stage, study and cell.
        out: the folder of everything that the steps write.
        steps: in an order in which each comes after those that it needs.
    """

    verb: str
    noun: str
    out: Path
    steps: Sequence[Step]

    def named(self, name: str) -> Step:
        """The step of a name. Raises ConfigError."""
        for step in self.steps:
            if step.name == name:
                return step
        known = ", ".join(step.name for step in self.steps)
        raise ConfigError(f"--{self.noun}: the {self.verb} has no {self.noun} {name}; it has {known}.")

    def place(self, step: Step) -> str:
        """A step among the others: stage 2 of 7 mae."""
        number = [other.name for other in self.steps].index(step.name) + 1
        return f"{self.noun} {number} of {len(self.steps)} {step.name}"

    def summary(self, steps: Sequence[Step]) -> str:
        """How many of some steps are done. Raises ArtefactError."""
        return f"{sum(step.is_done() for step in steps)} of {counted(len(steps), self.noun)} done"


def digest(place: Path) -> str | None:
    """SHA-256 of a file, or of the last file that is written into a folder; None: neither is there."""
    found = [place] if place.is_file() else sorted(path for name in _WRITTEN_LAST for path in place.glob(name))
    return sha256_of(found[-1]) if found else None


def perform(step: Step) -> None:
    """Run a step in this process, or this process's share of it. A step that is done is not run again.

    Raises:
        MoceError: the step failed; its record says why.
        SystemExit: a command of it ended the process, such as by a stop.
    """
    here = Place.here()
    if here.rank and step.share:
        step.share()
        return
    with held(step.lock):
        if here.world_size == 1 and step.is_done():  # the processes of one step all run it, or none does
            _logger.info(f"{step.name} was done meanwhile by another process.")
            return
        with _Recording(step) as recording:
            recording.measures = step.work()


class _Recording:
    """Keeps a step's record while the block runs it: begun, then done or failed. A stop leaves it begun."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._began = time.monotonic()
        self._record = StepRecord(step.made_from().parts, at=now())
        self.measures: Measures = {}

    def __enter__(self) -> "_Recording":
        self._step.records.write(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit | click.Abort):
            return
        ended = replace(self._record, at=now(), seconds=round(time.monotonic() - self._began, 1))
        if error is None:
            self._step.records.write(replace(ended, state="done", measures=self.measures))
        else:
            self._step.records.write(replace(ended, state="failed", message=str(error) or repr(error)))


def run_commands(commands: Sequence[Sequence[str]]) -> None:
    """Run `moce` commands in this process, one after the other, each of which is logged.

    Raises:
        MoceError: as the commands.
        SystemExit: a command ended the process.
    """
    for command in commands:
        _logger.info(f"$ moce {in_line(shlex.join(command))}")
        run_verb(command)


@dataclass(frozen=True)
class StepFile:
    """The record of a step as a file of its own, in the format of a pipeline's stages."""

    path: Path

    def read(self) -> StepRecord | None:
        """As `RecordFile`."""
        found = StageRecord.read(self.path)
        if found is None:
            return None
        return StepRecord(found.made_from, found.state, found.at, found.seconds, found.told)

    def write(self, record: StepRecord) -> None:
        """As `RecordFile`."""
        StageRecord(record.made_from, record.at, record.state, record.seconds, record.message).write(self.path)


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
