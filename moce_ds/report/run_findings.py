"""What `moce inspect --verify` says of a run: each of its files against what its checkpoints and attempts recorded.

Not looked at: `tensorboard/`, a mirror of metrics.jsonl, and what launchers leave (`launches/`, logs).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moce_ds.checkpoint.format import Checkpoint, step_folder, steps_of
from moce_ds.clustering import clusters
from moce_ds.config.families import family_of_tree, translate_tree
from moce_ds.errors import MoceError
from moce_ds.storage import encoder_folder, metrics_file
from moce_ds.storage.checksums import (
    FileRecord,
    Files,
    Findings,
    document_findings,
    file_findings,
    has_checksum,
    read_checked,
    written_before,
)
from moce_ds.storage.files import valid_record
from moce_ds.storage.metrics_file import METRICS

CONFIG, ROUTING, RESULT, TUNED, TEACHER, CLUSTERS = (
    "config.yaml", "routing.json", "result.json", "tuned", "teacher", "clusters",
)  # fmt: skip


@dataclass(frozen=True)
class _Attempt:
    """What is read of an attempt's record."""

    files: Files = field(default_factory=dict)


def run_findings(run: Path) -> Findings:
    """Everything in a run folder that is not as it was written; reads all of it."""
    checkpoints, found = _checkpoints(run)
    newest = checkpoints[-1].manifest if checkpoints else {}
    found += collected(lambda: metrics_file.findings(run / METRICS, _marks(checkpoints)))
    found += _attempts(run, newest)
    found += collected(lambda: _routing(run, checkpoints))
    found += _clusters(run, newest.get("clusters_hash"))
    if (run / TEACHER).exists() or _wants_teacher(newest):
        found += collected(lambda: encoder_folder.findings(run / TEACHER).below(TEACHER))
    if "task_fingerprint" in newest or (run / TUNED).exists():
        found += collected(lambda: _result(run))
    return found


def collected(find: Callable[[], Findings]) -> Findings:
    """What `find` finds, or the error that it ends with, as a fault."""
    try:
        return find()
    except MoceError as error:
        return Findings([str(error)])


def _checkpoints(run: Path) -> tuple[list[Checkpoint], Findings]:
    """The checkpoints that can be opened, and what is wrong with any."""
    opened: list[Checkpoint] = []
    faults: list[str] = []
    for step in steps_of(run):
        try:
            checkpoint = Checkpoint.open(step_folder(run, step), stripped=True)
            faults += checkpoint.faults()
            opened.append(checkpoint)
        except MoceError as error:
            faults.append(str(error))
    return opened, Findings(faults)


def _marks(checkpoints: list[Checkpoint]) -> list[str]:
    return [mark for checkpoint in checkpoints if (mark := checkpoint.manifest.get("metrics"))]


def _attempts(run: Path, newest: dict[str, Any]) -> Findings:
    """The records of the run's starts, and the settings and pictures, which must be those that some start has noted."""
    found = Findings()
    numbers = {int(path.stem) for path in (run / "attempts").glob("*.json") if path.stem.isdigit()}
    noted: dict[str, list[FileRecord]] = {}
    for number in sorted(numbers | ({newest["attempt"]} if newest.get("attempt") else set())):
        name = f"attempts/{number:04d}.json"
        try:
            record = read_checked(run / name, _Attempt, "the record of an attempt", "moce pretrain")
            found += document_findings(run / name, name)
        except MoceError as error:
            found += Findings([str(error)])
            continue
        for file, checksum in record.files.items():
            noted.setdefault(file, []).append(checksum)
    for file, records in noted.items():  # a later start may have replaced it, or have been killed before it could
        each = [file_findings(run, {file: record}) for record in records]
        found += min(each, key=lambda one: len(one.faults))
    there = [CONFIG, *(f"reconstructions/{path.name}" for path in (run / "reconstructions").glob("step-*.png"))]
    return found if found.faults else found + file_findings(run, None, [name for name in there if name not in noted])


def _routing(run: Path, checkpoints: list[Checkpoint]) -> Findings:
    """The tables are those of the checkpoint of the same step."""
    newest = checkpoints[-1].manifest.get("routing") if checkpoints else None
    if not (run / ROUTING).exists():
        return Findings([f"{ROUTING}: is missing"] if newest else [])
    content = read_checked(run / ROUTING, dict[str, Any], "the routing tables", "moce pretrain")
    tables = {key: value for key, value in content.items() if key != "content_sha256"}
    of_step = [c.manifest["routing"] for c in checkpoints if c.manifest.get("routing") and c.step == tables.get("step")]
    if any(table != tables for table in of_step):
        return Findings([f"{ROUTING}: is not the table of the checkpoint of step {tables.get('step')}"])
    unknown = not of_step and not has_checksum(content)
    return Findings(unverified=[written_before(ROUTING)] if unknown else [])


def _clusters(run: Path, expected: str | None) -> Findings:
    folder = run / CLUSTERS
    if not folder.exists():
        return Findings([f"{CLUSTERS}/: is missing: `moce select` needs it"] if expected else [])
    found = collected(lambda: clusters.findings(folder).below(CLUSTERS))
    if not found.faults and expected not in (None, clusters.Clusters.load(folder).hash):
        return found + Findings([f"{CLUSTERS}/: these are not the clusters that the run was trained with"])
    return found


def _wants_teacher(newest: dict[str, Any]) -> bool:
    config = translate_tree(newest.get("config", {}))
    return family_of_tree(config).distils and bool((config.get("sdr") or {}).get("distillation_weight"))


def _result(run: Path) -> Findings:
    """The result of a complete tuning run and the model that it is of. Where no attempt has noted a result, the run may
    have been killed before it wrote one."""
    if not (run / RESULT).exists():
        kept = [name for name in (TUNED, encoder_folder.WEIGHTS) if (run / name).exists()]
        told = f"{RESULT}: is missing, and {kept[0] if kept else ''} is there: the same command goes on with the run"
        return Findings(unverified=[told] if kept else [])
    result = read_checked(run / RESULT, dict[str, Any], "a result", "moce finetune")
    found = document_findings(run / RESULT, RESULT)
    if "files" not in result:
        model = encoder_folder.findings(run / TUNED).below(TUNED) if (run / TUNED).exists() else Findings()
        return found + model
    return found + file_findings(run, valid_record(Files, result["files"], str(run / RESULT), "a result", "moce"))
