"""A run folder, of pre-training or of tuning: its paths and content, and the verification of its files.

    run/
      config.yaml          the settings; its presence makes the folder a run
      attempts/0001.json   one record per start: who started it, and checksums of settings and pictures
      metrics.jsonl        one record per logged step
      checkpoints/         step-NNNNNNNN, see `format.py`
      reconstructions/     step-NNNNNNNN.png (pre-training)
      routing.safetensors  the routes of the newest checkpoint (with experts by cluster); earlier: routing.json
      clusters/            the clusters that the run is trained with (with experts by cluster)
      teacher/             the encoder that SDR learns from
      tuned/               the tuned encoder with its head (classification, once complete)
      model.safetensors    all weights (detection and segmentation, once complete)
      result.json          the measures of a complete tuning run, and the checksums of its model

Verification ignores `tensorboard/` and `wandb/`, mirrors of metrics.jsonl, and `launches/`, the records of launchers.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moce_ds.checkpoint.format import MANIFEST, ROUTING, Checkpoint, find, step_folder, steps_of
from moce_ds.checkpoint.records import RoutingTable, read_routing_record
from moce_ds.checkpoint.tensor_file import checksum
from moce_ds.common.config.model_kinds import ModelKind, model_kind_of_tree, translate_tree
from moce_ds.common.config.settings import read_yaml
from moce_ds.common.config.values import recorded_path
from moce_ds.common.errors import ArtefactError, MoceError
from moce_ds.common.storage.artefact import Rows, is_marked
from moce_ds.common.storage.checksums import (
    CHECKSUM,
    FileRecord,
    Files,
    Findings,
    check_file,
    document_findings,
    file_findings,
    has_checksum,
    names_below,
    read_checked,
    records_of,
    with_checksum,
    written_before,
)
from moce_ds.common.storage.encoder_folder import WEIGHTS, EncoderFolder
from moce_ds.common.storage.files import valid_record
from moce_ds.common.storage.metrics_file import METRICS, verify_metrics
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.sampler import number_of_steps
from moce_ds.data.shards import ShardSet

if TYPE_CHECKING:
    from moce_ds.common.storage.metrics_series import Reduced, Series

CONFIG = "config.yaml"
ROUTING_OF_EARLIER_VERSIONS = "routing.json"
CLUSTERS, TEACHER = "clusters", "teacher"
ATTEMPTS = "attempts"
RECONSTRUCTIONS = "reconstructions"
RESULT, TUNED = "result.json", "tuned"
LAUNCHES = "launches"

_RESULT, _MADE_BY = "a result", "moce finetune"


def picture_path(run: Path, step: int) -> Path:
    """The path of the reconstructions of a step."""
    return run / RECONSTRUCTIONS / f"step-{step:08d}.png"


@dataclass(frozen=True)
class Attempt:
    """The record of one start of a run. Earlier versions recorded no version, command, processes and device.

    Attributes:
        started: date and time with its offset from UTC, ISO 8601.
        job: of SLURM.
        command: its words.
        device: the GPU of the first process, or "CPU".
        files: checksums of settings and pictures.
    """

    host: str | None = None
    started: str | None = None
    job: str | None = None
    version: str | None = None
    command: list[str] = field(default_factory=list)
    processes: int | None = None
    device: str | None = None
    files: Files = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Attempt":
        """A record. Raises ArtefactError if it is missing or damaged."""
        return read_checked(path, cls, "the record of an attempt", "moce pretrain")


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. Its parts are read on first use; a damaged part raises ArtefactError."""

    kind: ClassVar[str] = "run"
    marks: ClassVar[tuple[str, ...]] = (CONFIG,)
    last_file: ClassVar[str] = f"checkpoints/step-*/{MANIFEST}"  # written last, with checksums of the others
    path: Path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is a run folder."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, path: Path, /) -> "RunFolder":
        """The folder; nothing is read yet."""
        return cls(path)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings in `config.yaml`, with current names. Raises ConfigError, or ArtefactError if there are none."""
        config = translate_tree(read_yaml(self.path / CONFIG))
        data = config.get("data")
        if not isinstance(data, dict) or not ("encoder" in data or isinstance(config.get("model"), dict)):
            raise ArtefactError(
                f"{self.path / CONFIG} holds no settings; expected the file that `moce pretrain` wrote."
            )
        return config

    @property
    def is_tuning(self) -> bool:
        """Whether a tuning verb wrote the run, not pre-training."""
        return "encoder" in self.config["data"]

    @property
    def arch(self) -> str:
        """The value of `model.arch` in the settings."""
        return str(self.config.get("model", {}).get("arch", "mae"))

    @property
    def model_kind(self) -> ModelKind:
        """The kind of model that is pre-trained."""
        return model_kind_of_tree(self.config)

    @property
    def shards(self) -> Path | None:
        """Path of the shard set that the run was trained on, from its settings."""
        named = self.config["data"].get("shards")
        return recorded_path(str(named)) if named else None

    @property
    def attempts(self) -> dict[int, Attempt]:
        """The starts of the run by their numbers; none of an earlier version. Raises ArtefactError."""
        return {number: Attempt.read(self.path / _attempt_name(number)) for number in sorted(_attempts(self.path))}

    @cached_property
    def metrics(self) -> "Series":
        """The last record, and all series of the records, reduced."""
        from moce_ds.common.storage.metrics_series import Series  # here, because training uses paths of this module

        return Series.read(self.path / METRICS)

    @property
    def reconstruction(self) -> Path | None:
        """The newest picture of reconstructions."""
        return max((self.path / RECONSTRUCTIONS).glob("step-*.png"), default=None)

    @cached_property
    def routing(self) -> RoutingTable | None:
        """The routes of the newest checkpoint."""
        paths = (self.path / name for name in (ROUTING, ROUTING_OF_EARLIER_VERSIONS))
        return next((RoutingTable.read(path) for path in paths if path.is_file()), None)

    @cached_property
    def clusters(self) -> Clusters | None:
        """The clusters that the run is trained with."""
        folder = self.path / CLUSTERS
        return Clusters.open(folder) if folder.is_dir() else None

    def cluster_ids(self, shards_fingerprint: str, count: int) -> NDArray[np.int32]:
        """The cluster of every image of a shard set, as `clustering.clusters.load_ids`. Raises ArtefactError."""
        return load_ids(self.path / CLUSTERS, shards_fingerprint, count)

    @property
    def made_from(self) -> dict[str, Any]:
        """`made_from` of the newest readable checkpoint; the settings alone if there is none."""
        for step in reversed(steps_of(self.path)):
            with suppress(ArtefactError):
                return Checkpoint.open(step_folder(self.path, step)).made_from
        return {"config": self.config}

    @cached_property
    def length(self) -> int | None:
        """Steps of the whole run; None if it is tuned, or if its images can no longer be counted."""
        epochs, batch = (_dig(self.config, ("optim", key)) for key in ("epochs", "batch_size"))
        images = None if self.is_tuning else self._images()
        return number_of_steps(epochs, images, batch) if epochs and batch and images else None

    @property
    def steps_done(self) -> str:
        """The steps done of all, and whether some are missing; empty if the length is unknown."""
        done = max([*steps_of(self.path), self.metrics.last["step"] if self.metrics.last else 0])
        if self.length is None:
            return ""
        return f"{done:,} of {self.length:,}" + (", unfinished" if done < self.length else "")

    def _images(self) -> int | None:
        """Images that the run is trained on: those of its clusters, or of its shard set if that is still the same."""
        if self.clusters:
            return int(self.clusters.sizes_M.sum())
        with suppress(MoceError):
            shards = ShardSet.open(self.shards) if self.shards else None
            if shards and self.made_from.get("shards_fingerprint") in (None, shards.fingerprint):
                return shards.count
        return None

    def series(self, *keys: str) -> "Reduced":
        """The values under nested `keys` of the metrics; records without a finite value are left out."""
        return self.metrics.at(*keys)

    def describe(self) -> Rows:
        """Data, last record, result or newest checkpoint. Raises ArtefactError, ConfigError."""
        if self.is_tuning:
            rows = {name: str(value) for name, value in self.config["data"].items() if isinstance(value, str)}
            rows |= self._last_record()
            measures = _result_measures(self.path)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
            rows["result"] = shown or "none, unfinished"
        else:
            self.routing, self.clusters  # noqa: B018 (both must be readable)
            rows = {"arch": self.arch, "shards": str(self.shards)}
            rows |= ({"steps": self.steps_done} if self.steps_done else {}) | self._last_record()
        steps = steps_of(self.path)
        rows["checkpoints"] = ", ".join(map(str, steps)) or "none"
        if steps and not self.is_tuning:
            rows |= {f"  {name}": value for name, value in find(self.path).describe().items()}
        return rows

    def _last_record(self) -> Rows:
        if not (last := self.metrics.last):
            return {}
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        return {"last record": f"step {last['step']}, loss {loss}"}

    def verify(self) -> Findings:
        """Everything in the folder that differs from what was written; reads all of it."""
        run = self.path
        checkpoints, found = _verified_checkpoints(run)
        newest = checkpoints[-1].manifest if checkpoints else {}
        marks = [mark for checkpoint in checkpoints if (mark := checkpoint.manifest.get("metrics"))]
        found += _collected(lambda: verify_metrics(run / METRICS, marks))
        found += _verified_attempts(run, newest)
        found += _collected(lambda: _verified_routing(run, checkpoints))
        found += _verified_clusters(run, newest.get("clusters_hash"))
        if (run / TEACHER).exists() or _wants_teacher(newest):
            found += _collected(lambda: EncoderFolder.open(run / TEACHER).verify().below(TEACHER))
        if "task_fingerprint" in newest or (run / TUNED).exists():
            found += _collected(lambda: _verified_result(run))
        return found


def _dig(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _collected(find: Callable[[], Findings]) -> Findings:
    """The findings of `find`, or its error as a fault."""
    try:
        return find()
    except MoceError as error:
        return Findings([str(error)])


def _verified_checkpoints(run: Path) -> tuple[list[Checkpoint], Findings]:
    """The checkpoints that can be opened, and the faults of all checkpoints."""
    opened: list[Checkpoint] = []
    faults: list[str] = []
    for step in steps_of(run):
        try:
            checkpoint = Checkpoint.open(step_folder(run, step))
            faults += checkpoint.faults()
            opened.append(checkpoint)
        except MoceError as error:
            faults.append(str(error))
    return opened, Findings(faults)


def _verified_attempts(run: Path, newest: dict[str, Any]) -> Findings:
    """Check the records of the run's starts, and the settings and pictures against their checksums in these records."""
    found = Findings()
    numbers = _attempts(run)
    noted: dict[str, list[FileRecord]] = {}
    for number in sorted(numbers | ({newest["attempt"]} if newest.get("attempt") else set())):
        name = _attempt_name(number)
        try:
            record = Attempt.read(run / name)
            found += document_findings(run / name, name)
        except MoceError as error:
            found += Findings([str(error)])
            continue
        for file, recorded in record.files.items():
            noted.setdefault(file, []).append(recorded)
    for file, records in noted.items():  # any start may have written the current file
        each = [file_findings(run, {file: record}) for record in records]
        found += min(each, key=lambda one: len(one.faults))
    pictures = [f"{RECONSTRUCTIONS}/{path.name}" for path in (run / RECONSTRUCTIONS).glob("step-*.png")]
    unnoted = [name for name in (CONFIG, *pictures) if name not in noted]
    return found if found.faults else found + file_findings(run, None, unnoted)


def _attempts(run: Path) -> set[int]:
    """The numbers of all starts on record."""
    return {int(path.stem) for path in (run / ATTEMPTS).glob("*.json") if path.stem.isdigit()}


def _attempt_name(number: int) -> str:
    return f"{ATTEMPTS}/{number:04d}.json"


def _verified_routing(run: Path, checkpoints: list[Checkpoint]) -> Findings:
    """Check that the tables are those of the checkpoint of the same step."""
    newest = (checkpoints[-1].manifest.get("routing") if checkpoints else None) or {}
    if (run / ROUTING).exists():
        step, found = RoutingTable.read(run / ROUTING).step, checksum(run / ROUTING)
        files = [checkpoint.manifest["files"].get(ROUTING) for checkpoint in checkpoints if checkpoint.step == step]
        differs = any(record and record["xxh3"] != found for record in files)
        return Findings([_other_table(ROUTING, step)] if differs else [])
    if (run / ROUTING_OF_EARLIER_VERSIONS).exists() and "file" not in newest:
        return _verified_earlier_routing(run / ROUTING_OF_EARLIER_VERSIONS, checkpoints)
    return Findings([f"{ROUTING if 'file' in newest else ROUTING_OF_EARLIER_VERSIONS}: is missing"] if newest else [])


def _verified_earlier_routing(path: Path, checkpoints: list[Checkpoint]) -> Findings:
    content = read_routing_record(path)
    tables = {key: value for key, value in content.items() if key != CHECKSUM}
    of_step = [c.manifest["routing"] for c in checkpoints if c.manifest.get("routing") and c.step == tables.get("step")]
    if any(table != tables for table in of_step):
        return Findings([_other_table(path.name, tables.get("step"))])
    unknown = not of_step and not has_checksum(content)
    return Findings(unverified=[written_before(path.name)] if unknown else [])


def _other_table(name: str, step: Any) -> str:
    return f"{name}: is not the table of the checkpoint of step {step}"


def _verified_clusters(run: Path, expected: str | None) -> Findings:
    folder = run / CLUSTERS
    if not folder.exists():
        return Findings([f"{CLUSTERS}/: is missing: `moce select` needs it"] if expected else [])
    found = _collected(lambda: Clusters.open(folder).verify().below(CLUSTERS))
    if not found.faults and expected not in (None, Clusters.open(folder).hash):
        return found + Findings([f"{CLUSTERS}/: these are not the clusters that the run was trained with"])
    return found


def _wants_teacher(newest: dict[str, Any]) -> bool:
    """Whether a run with this manifest learns from a teacher."""
    config = translate_tree(newest.get("config", {}))
    return model_kind_of_tree(config).distils and bool((config.get("sdr") or {}).get("distillation_weight"))


def result_text(run: Path, record: dict[str, Any]) -> str:
    """The content of `result.json`. The model (an encoder with a head, or all weights) must be in the run's folder."""
    model = [*names_below(run / TUNED, f"{TUNED}/"), *(path.name for path in run.glob(WEIGHTS))]
    return json.dumps(with_checksum(record | {"files": records_of(run, model)}), indent=2) + "\n"


def read_result(run: Path) -> dict[str, Any]:
    """The result of a complete run, after a check that the files of its model are unchanged.

    Raises:
        ArtefactError: the result or a file of the model is missing or damaged.
    """
    result = _read_result(run)
    files = valid_record(Files, result.get("files", {}), str(run / RESULT), _RESULT, _MADE_BY)
    for name in files:
        again = f"restore it from a copy, or delete {run / RESULT} and run the same command: it is measured again."
        check_file(run, name, files, again)
    return result


def _result_measures(run: Path) -> dict[str, float]:
    """The measures of a run, without a check of its model; empty if it is not complete. Raises ArtefactError."""
    return dict(_read_result(run)["measures"]) if (run / RESULT).exists() else {}


def _verified_result(run: Path) -> Findings:
    """The faults of the result and of the model that it describes.

    A missing result is not a fault: the run may not be complete. Raises ArtefactError if it is damaged.
    """
    if not (run / RESULT).exists():
        kept = [name for name in (TUNED, WEIGHTS) if (run / name).exists()]
        message = (
            f"{RESULT}: is missing, but {kept[0] if kept else ''} exists: rerun the same command to resume the run"
        )
        return Findings(unverified=[message] if kept else [])
    result = _read_result(run)
    found = document_findings(run / RESULT, RESULT)
    if "files" not in result:
        tuned = run / TUNED
        return found + (EncoderFolder.open(tuned).verify().below(TUNED) if tuned.exists() else Findings())
    return found + file_findings(run, valid_record(Files, result["files"], str(run / RESULT), _RESULT, "moce"))


def _read_result(run: Path) -> dict[str, Any]:
    return read_checked(run / RESULT, dict[str, Any], _RESULT, _MADE_BY)
