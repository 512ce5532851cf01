"""What a path of ours is and what it holds, for `moce inspect`."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from safetensors import safe_open

from moce_ds.checkpoint.format import OPTIMIZER, Checkpoint, find, steps_of
from moce_ds.clustering.clusters import Clusters
from moce_ds.clustering.clusters import findings as clusters_findings
from moce_ds.clustering.feature_store import FeatureSet
from moce_ds.config.settings import read_yaml
from moce_ds.data.shards import Manifest, ShardSet
from moce_ds.errors import ArtefactError
from moce_ds.evaluation.results_file import disambiguated, read_results, results_findings
from moce_ds.report.pipeline_folder import PIPELINE, pipeline_findings, read_stages
from moce_ds.report.run_findings import run_findings
from moce_ds.report.run_folder import is_tuning, read_metrics, read_run
from moce_ds.report.study_folder import STUDY, read_study_folder, study_findings
from moce_ds.storage import encoder_folder
from moce_ds.storage.checksums import FileRecord, Findings, document_findings, file_findings, read_checked
from moce_ds.storage.drafts import restore
from moce_ds.storage.encoder_folder import PROVENANCE, WEIGHTS
from moce_ds.storage.files import read_json, read_record, reads_from, sha256_of, valid_record
from moce_ds.text import counted, in_line, shortened

Rows = dict[str, str]
EXPORT, RESULTS = "export.json", "results.json"
_NAME = 60  # characters shown of a class


def describe(path: Path) -> Table:
    """What `path` is and holds, as a table. Raises ArtefactError when it is nothing of ours, or damaged."""
    kind, rows = _recognised(path)
    table = Table(title=f"{in_line(path)}: {kind}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows(path).items():
        table.add_row(name, value)
    return table


def findings(path: Path) -> Findings:
    """Everything that is not as it was written; reads all of it.

    Raises:
        MoceError: as `describe`; or what the rest is compared with is missing or damaged.
    """
    kind, rows = _recognised(path)
    verify: dict[str, Callable[[Path], Findings]] = {
        "shard set": lambda path: ShardSet.open(path).findings(),
        "checkpoint": lambda path: Findings(Checkpoint.open(path).faults()),
        "run": run_findings,
        "features": lambda path: FeatureSet.open(path).findings(),
        "clusters": clusters_findings,
        "encoder": encoder_folder.findings,
        "export": _export_findings,
        "study": lambda path: study_findings(path, findings),
        "pipeline": lambda path: pipeline_findings(path, findings),
        "results": lambda path: results_findings(path if path.is_file() else path / RESULTS),
    }
    if kind in verify:
        return verify[kind](path)
    rows(path)
    return Findings()


def _export_findings(path: Path) -> Findings:
    record = _export_record(path)
    if all(isinstance(one, FileRecord) for one in record.files.values()):
        return document_findings(path / EXPORT, EXPORT) + file_findings(path, record.files)  # type: ignore[arg-type]
    faults = [
        f"{name}: {'is damaged or was exchanged' if (path / name).is_file() else 'is missing'}"
        for name, sha256 in record.files.items()
        if not (path / name).is_file() or sha256_of(path / name) != sha256
    ]
    return Findings(faults) + document_findings(path / EXPORT, EXPORT)


@dataclass(frozen=True)
class _Shape:
    image_size: int
    patch_size: int
    width: int
    depth: int


@dataclass(frozen=True)
class _EncoderRecord:
    """What is shown of an encoder's `config.json`."""

    shape: _Shape
    input: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class _ExportRecord:
    """What is shown of an `export.json`: a dense model for another library."""

    target: str
    part: str
    shape: _Shape
    input: dict[str, Any]
    files: dict[str, FileRecord | str]
    """An earlier version wrote SHA-256 alone."""


def _export_record(path: Path) -> _ExportRecord:
    version = {"format": "moce_ds export 1"}
    return read_checked(path / EXPORT, _ExportRecord, "an export", "moce export", **version)


def _encoder_record(path: Path) -> _EncoderRecord:
    return encoder_folder.read_config(path, _EncoderRecord)


def _recognised(path: Path) -> tuple[str, Callable[[Path], Rows]]:
    """Kind and reader of an artefact, by the file that marks it."""
    restore(path)
    marks: list[tuple[str, str, Callable[[Path], Rows]]] = [
        ("shards.json", "shard set", _shards),
        ("features.json", "features", _features),
        ("clusters.json", "clusters", _clusters),
        ("manifest.json", "checkpoint", _checkpoint),
        (EXPORT, "export", _export),
        ("config.yaml", "run", _run),  # before the weights that a run of tuning leaves beside it
        (WEIGHTS, "encoder", _encoder),
        (PROVENANCE, "encoder", _encoder),  # without its weights: told as damaged
        (STUDY, "study", _study),
        (PIPELINE, "pipeline", _pipeline),
        (RESULTS, "results", _results),
    ]
    for mark, kind, rows in marks:
        if (path / mark).exists():
            return ("export", _export) if kind == "encoder" and _is_for_others(path) else (kind, rows)
    if path.name == RESULTS and path.exists():
        return "results", lambda p: _results(p.parent)
    if not path.exists():
        raise ArtefactError(f"{path} not found.")
    known = ", ".join(f"{kind} ({mark})" for mark, kind, _ in marks)
    raise ArtefactError(f"{path} is nothing that moce writes. Known by a file in them: {known}.")


def _is_for_others(path: Path) -> bool:
    """Whether a folder is an export for another library, whose `export.json` is lost."""
    if not (path / PROVENANCE).is_file():
        return False
    provenance = read_json(path / PROVENANCE, "an export", "moce export")
    told = [provenance.get(key) for key in ("format", "part")] if isinstance(provenance, dict) else []
    return told not in ([], [None, None], ["timm", "encoder"])


def _shards(path: Path) -> Rows:
    shards = ShardSet.open(path)
    sizes = shards.samples
    rejected = Manifest.read(path).rejected
    return {
        "images": f"{shards.count} in {counted(len(shards.shards), 'shard')}, "
        f"{_mebibytes(s.bytes for s in shards.shards)}",
        "width": f"{sizes['width'].min()} to {sizes['width'].max()} pixels",
        "height": f"{sizes['height'].min()} to {sizes['height'].max()} pixels",
        "classes": f"{len(shards.classes)}: {_some(shards.classes)}" if shards.classes else "none",
        "rejected": ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none",
        "fingerprint": shards.fingerprint,
    }


def _features(path: Path) -> Rows:
    features = FeatureSet.open(path)
    return {
        "features": f"{features.count} of width {features.dim}, float16",
        "images": f"shard set {features.identity.shards_fingerprint}",
        "encoder": features.identity.encoder_fingerprint,
        "input": str(features.identity.encoder_input),
    }


def _clusters(path: Path) -> Rows:
    clusters = Clusters.load(path)
    relative_M = clusters.sizes_M / clusters.sizes_M.mean()
    return {
        "clusters": f"{clusters.num_clusters} of width {clusters.embeddings_MD.shape[1]}, by {clusters.method}",
        "sizes": "min/median/max over mean "
        f"{relative_M.min():.2f} / {np.median(relative_M):.2f} / {relative_M.max():.2f}",
        "cosine": f"{np.average(clusters.cosine_M, weights=clusters.sizes_M):.3f} to the centroid, mean over images",
        "images": f"shard set {clusters.shards_fingerprint}",
        "encoder": clusters.encoder_fingerprint,
        "hash": clusters.hash,
    }


def _checkpoint(path: Path) -> Rows:
    checkpoint = Checkpoint.open(path, stripped=True)
    manifest, shapes = checkpoint.manifest, checkpoint.shapes()
    model, read = manifest.get("model"), manifest.get("images_read")
    experts = model["experts"] if model else None
    rows = {"step": f"{checkpoint.step}" + ("" if read is None else f" ({read} images read)")}
    if model:
        shape = valid_record(_Shape, model["shape"], f"{path}: shape", "a run", "moce pretrain")
        rows["encoder"] = _shape(shape)
    rows |= {
        "parameters": f"{sum(int(np.prod(s)) for s in shapes.values()):,} in {len(shapes)} tensors",
        "files": f"{len(manifest['files'])}, {_mebibytes(r['bytes'] for r in manifest['files'].values())}",
    }
    if not (path / OPTIMIZER).exists():
        rows["optimizer"] = "none: a new run can start from these weights, no run can go on"
    if experts:
        rows["experts"] = f"{experts['num_experts']} in each of blocks {', '.join(map(str, experts['layers']))}"
    if experts and manifest.get("routing"):
        table = manifest["routing"]["expert_ML"]
        rows["routes"] = f"{len({tuple(row) for row in table})} taken by {len(table)} clusters"
    return rows


def _run(path: Path) -> Rows:
    return _tuning(path) if is_tuning(path) else _pretraining(path)


def _tuning(path: Path) -> Rows:
    config = read_yaml(path / "config.yaml")
    rows = {name: str(value) for name, value in config["data"].items() if isinstance(value, str)}
    rows |= _last_record(read_metrics(path / "metrics.jsonl"))
    if (path / "result.json").exists():
        result = read_checked(path / "result.json", dict[str, Any], "a result", "moce finetune")
        rows["result"] = ", ".join(f"{name} {value:.4f}" for name, value in result["measures"].items())
    return rows | {"checkpoints": ", ".join(map(str, steps_of(path))) or "none"}


def _pretraining(path: Path) -> Rows:
    run = read_run(path)
    rows = {"arch": run.arch, "shards": str(run.shards)}
    rows |= _last_record(run.metrics)
    steps = steps_of(path)
    rows["checkpoints"] = ", ".join(map(str, steps)) or "none"
    return rows | {f"  {name}": value for name, value in (_checkpoint(find(path).folder) if steps else {}).items()}


def _last_record(metrics: list[dict[str, Any]]) -> Rows:
    if not metrics:
        return {}
    loss = metrics[-1]["loss"]  # null where it was not finite
    return {"last record": f"step {metrics[-1]['step']}, loss {'not finite' if loss is None else f'{loss:.4f}'}"}


def _encoder(path: Path) -> Rows:
    config = _encoder_record(path)
    provenance = encoder_folder.read_provenance(path)
    weights = path / WEIGHTS
    with reads_from(weights, "export it again."), safe_open(weights, "np") as file:
        tensors = len(file.keys())  # from the header, whose sizes are compared with the file's
    return {
        "shape": _shape(config.shape),
        "input": str(config.input),
        "weights": f"{tensors} tensors, {_mebibytes([weights.stat().st_size])}",
        **{name: str(value) for name, value in provenance.items() if not isinstance(value, dict)},
    }


def _export(path: Path) -> Rows:
    record = _export_record(path)
    provenance = read_record(path / PROVENANCE, dict[str, Any], "an export", "moce export")
    return {
        "for": f"{record.target} ({record.part})",
        "shape": _shape(record.shape),
        "input": str(record.input),
        "files": ", ".join(record.files),
        **{name: str(value) for name, value in provenance.items() if not isinstance(value, dict)},
    }


def _study(path: Path) -> Rows:
    study = read_study_folder(path)
    states = Counter(cell.state for cell in study.cells)
    return {
        "grid": ", ".join(study.keys),
        "cells": ", ".join([*(f"{count} {state}" for state, count in states.items()), f"{len(study.waiting)} waiting"]),
        "measured": _some(study.measures),
        **{f"failed: {cell.name}": cell.told for cell in study.cells if cell.state == "failed"},
    }


def _pipeline(path: Path) -> Rows:
    stages = {name: f"{state}: {_some(made)}" for name, (state, made) in read_stages(path).items()}
    return stages | (_results(path) if (path / RESULTS).exists() else {})


def _results(path: Path) -> Rows:
    def told(record: dict[str, Any]) -> str:
        if "top1" in record:
            return f"top-1 {record['top1']:.4f}"
        if record["verb"] == "select":
            route = "-".join(map(str, record["route"]))
            return f"route {route}, {record['share']:.1%} of {record['n_images']} images"
        return _some([f"{key} {value:.5g}" for key, value in record.items() if isinstance(value, float)])

    def name(record: dict[str, Any]) -> str:
        seed = "" if record.get("seed") is None else f"seed {record['seed']}"
        return in_line(" ".join(filter(None, (record["verb"], record["task"], record.get("model"), seed))))

    return {name(record): told(record) for record in disambiguated(read_results(path / RESULTS))}


def _shape(shape: _Shape) -> str:
    return f"{shape.depth} blocks, width {shape.width}, patch {shape.patch_size}, {shape.image_size} px"


def _mebibytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 2**20:.1f} MiB"


def _some(names: list[str], shown: int = 12) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(shortened(name, _NAME) for name in names[:shown]) + more
