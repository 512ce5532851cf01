"""One of each artefact, written in this process by what writes them in earnest, for tests that harm their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from moce_ds.checkpoint.format import grouped, publish, step_folder, write_files
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_folder import RESULT, result_text
from moce_ds.cli.workflow.pipeline import keep_stages
from moce_ds.cli.workflow.stage import Stage, StageFile, StageRecord
from moce_ds.cli.workflow.study import cell_stage, keep_record
from moce_ds.cli.workflow.study_grid import StudySettings, cells_of
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.settings import load, to_tree
from moce_ds.common.storage.checksums import FileRecord
from moce_ds.common.storage.files import atomic_folder
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.listing import Listed, Listing
from moce_ds.evaluation.metrics import Score, accuracy_record
from moce_ds.evaluation.results_file import add_record
from moce_ds.models.build import build_model
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce
from moce_ds.models.vit import load_encoder, save_encoder
from moce_ds.moe.placement import default_placement
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.training.inputs import keep_clusters
from moce_ds.training.metric_logger import Meter, MetricLogger, measures
from moce_ds.training.router import Router
from moce_ds.training.run_checks import RequestedRun
from moce_ds.training.settings import AnySettings, PretrainSettings
from moce_ds.tuning.settings import FinetuneSettings
from tests.examples.alone import ALONE
from tests.examples.moce_command import TINY, run_here

STEPS = 4
"""Of every run here; each step is logged."""

FORMATS = {"timm full": ("timm", "full"), "hf-vit": ("hf-vit", "encoder"), "mmseg": ("mmseg", "encoder")}

KINDS = (
    "shards", "labelled shards", "features", "clusters", "dense run", "moce run", "checkpoint", "encoder", "tuning run",
    "results", "study", "pipeline", *FORMATS,
)  # fmt: skip


def write_all(root: Path, images: Path, shards: Path, features: Path, clusters: Path) -> dict[str, Path]:
    """Every artefact by its kind, in `root` or as given."""
    dense = _write_dense(_settings(shards, root / "dense"))
    found = {
        "shards": shards,
        "labelled shards": _write_labelled(images, root / "labelled"),
        "features": features,
        "clusters": clusters,
        "dense run": dense,
        "moce run": _write_moce(shards, root / "moce", clusters),
        "checkpoint": step_folder(dense, STEPS),
        "encoder": _export(dense, root / "encoder"),
        "tuning run": _write_tuning(root / "encoder", shards, root / "tuning"),
        "results": _write_results(root / "results.json"),
        "study": _write_study(root, shards),
        "pipeline": _write_pipeline(root / "pipeline", shards, dense),
    }
    for name, (format, part) in FORMATS.items():
        found[name] = _export(dense, root / name, "--format", format, "--part", part)
    return found


def _write_labelled(images: Path, out: Path) -> Path:
    """A set whose images may show several things."""
    files = sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))[:12]
    listed = [Listed(name, ("a",) if number % 2 else ("a", "b")) for number, name in enumerate(files)]
    listing = Listing(listed, ["a", "b"], multi_label=True, origin=images)
    write_shards(images, out, ShardSettings(images_per_shard=8, workers=1), listing)
    return out


def _settings(shards: Path, out: Path, *words: str) -> PretrainSettings:
    return load(PretrainSettings, TINY, [f"data.shards={shards}", f"run.out={out}", "model.depth=2", *words])


def _write_dense(config: PretrainSettings) -> Path:
    spec = config.model_spec
    mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    return _write_run(config, mae, {"model": spec.to_tree(), "routing": None, "clusters_hash": None})


def _write_moce(shard_set: Path, out: Path, folder: Path) -> Path:
    config = _settings(shard_set, out, "model.arch=moce", f"experts.clusters={folder}", "experts.num=4")
    clusters, shards = Clusters.open(folder), ShardSet.open(config.data.shards)
    model = build_model(config.model_spec, clusters, ReferenceMoE)
    assert isinstance(model, Moce)
    slot_LE = default_placement(len(config.expert_layers), config.experts.num)
    ids_N = load_ids(folder, shards.fingerprint, shards.count)
    routing = Router(model, ids_N, slot_LE, config.experts, seed=0, runtime=ALONE).record(STEPS)
    told = {"model": config.model_spec.to_tree(), "routing": routing, "clusters_hash": clusters.hash}
    run = _write_run(config, model, told)
    keep_clusters(folder, config.run.out, ALONE)
    return run


def _write_run(config: AnySettings, model: torch.nn.Module, told: Mapping[str, Any]) -> Path:
    """Settings, metrics, a picture, a checkpoint of random weights, and its routes, as an attempt writes them."""
    run = config.run.out
    attempt = RunLease.claim(run, ALONE)
    RequestedRun(config).write_settings(attempt, ALONE)
    meter = Meter()
    with MetricLogger(attempt, config.run, 0, STEPS, 16, ALONE) as teller:
        for step in range(1, STEPS + 1):
            meter.step(16, 0.0)
            record = measures(attempt, step, step / 4, 1 / step, 1e-3, 0.5, meter, ALONE)
            teller.metrics(record | {"reconstruction": 1.0})
        mark = teller.mark
    with attempt.file(run / "reconstructions" / f"step-{STEPS:08d}.png", STEPS) as draft:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(draft, format="PNG")
    picture = f"reconstructions/step-{STEPS:08d}.png"
    attempt.note(picture, FileRecord.of(run / picture), STEPS)
    manifest = {
        "step": STEPS, "skipped": 0, "attempt": attempt.number, "images_read": 16 * STEPS, "config": to_tree(config),
        "shards_fingerprint": None, "placement": {"ep_size": 1, "slot_LE": []}, "dealt_by": [], "metrics": mark, **told,
    }  # fmt: skip
    draft = attempt.draft(STEPS)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments = {f"{name}.{kind}": t for name, t in weights.items() for kind in ("exp_avg", "exp_avg_sq")}
    draft.mkdir()
    files = write_files(draft, (grouped("weights", weights) | grouped("optimizer", moments)).items())
    publish(draft, step_folder(run, STEPS), manifest | {"files": files})
    if manifest["routing"]:
        with attempt.file(run / "routing.safetensors", STEPS) as routing:
            manifest["routing"].write(routing)
    return run


def _write_tuning(encoder: Path, shards: Path, out: Path) -> Path:
    words = [f"data.encoder={encoder}", f"data.train={shards}", f"data.test={shards}", f"run.out={out}"]
    config = load(FinetuneSettings, None, words)
    opened = load_encoder(encoder)
    _write_run(config, opened.model, {"routing": None, "best": {}, "task_fingerprint": "0" * 64})
    with atomic_folder(out / "tuned") as draft:
        save_file({"weight": torch.ones(3, 32)}, draft / "head.safetensors")
        save_encoder(draft, opened.model.state_dict(), opened.shape, opened.input, {"tuned_from": str(encoder)})
    result = {"measures": {"top1": 0.5}, "step": STEPS, "steps": STEPS, "validation": {}}
    (out / RESULT).write_text(result_text(out, result))
    RunLease(out, 1).note(RESULT, FileRecord.of(out / RESULT), STEPS)
    return out


def _export(run: Path, out: Path, *options: str) -> Path:
    said = run_here("export", run, out, *options)
    assert said.status == 0, said
    return out


def _write_results(path: Path) -> Path:
    for model, top1 in (("dense", 0.5), ("expert", 0.625)):
        add_record(path, accuracy_record("knn", "birds", model, Score(top1, top1, 80, 20, {"k": 5})))
    return path


def _write_study(root: Path, shards: Path) -> Path:
    base = root / "base.yaml"
    base.write_text(TINY.read_text())
    fixed = f'set=["data.shards={shards}", "model.depth=2"]'
    study = load(StudySettings, None, [f"out={root / 'study'}", f"pretrain={base}", fixed, "grid.run.seed=[0]"])
    (cell,) = cells_of(study)
    keep_record(study, [cell])
    config = cell.config()
    _write_dense(config)
    _write_results(cell.folder / "results.json")
    measured = {"probe birds": 0.625}
    done = StageRecord({"evaluations": {"birds": "birds"}}, "done", seconds=3.0, measures=measured)
    cell_stage(study, cell).records.write(done)
    return study.out


def _write_pipeline(out: Path, shards: Path, dense: Path) -> Path:
    config = _settings(shards, out / "mae")
    _write_dense(config)
    _write_results(out / "results.json")
    made = {"mae": out / "mae", "evaluation": out / "results.json"}
    from_shards = MadeFrom({"commands": [["pretrain"]], "settings": to_tree(config), "read": {}})
    stages = [
        Stage(
            name,
            StageFile(out / f"pipeline/{name}.json"),
            out / f"pipeline/.{name}.lock",
            lambda: from_shards,
            dict,
            outputs=[place],
        )
        for name, place in made.items()
    ]
    keep_stages(stages, out)
    for stage in stages:
        stage.records.write(StageRecord(from_shards.parts, "done", "2026-01-01T00:00:00+00:00", 3.0))
    return out
