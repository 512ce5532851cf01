"""Every file of every artefact, with a byte flipped, cut short or deleted: `moce inspect --verify` names the file with
status 1, and so does whoever reads it."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from moce_ds.checkpoint.format import OPTIMIZER, WEIGHTS, Checkpoint, find
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.checkpoint.run_folder import RunFolder, read_result
from moce_ds.common.errors import MoceError
from moce_ds.common.storage.checksums import CHECKSUM, Findings, write_checked
from moce_ds.common.storage.files import copy_tree
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.kept_encoder import check_encoder
from moce_ds.data.shards import ShardSet
from moce_ds.evaluation.results_file import read_results
from moce_ds.inspection import inspection
from moce_ds.models.vit import load_encoder, save_encoder
from moce_ds.selection.run_clusters import clusters_encoder, run_clusters
from tests.examples.artefacts import KINDS, STEPS
from tests.examples.moce_command import run_here
from tests.examples.shard_tables import as_earlier


def flip(at: float, path: Path) -> None:
    """Flip a bit of the byte at a share of a file's length; an empty file gets a byte."""
    content = bytearray(path.read_bytes() or b"\0")
    content[int((len(content) - 1) * at)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave the first part of a file; an empty one grows."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5] if path.stat().st_size else b"{}\n")


HARMS: dict[str, Callable[[Path], None]] = {
    "flipped early": partial(flip, 0.2),
    "flipped late": partial(flip, 0.7),
    "last byte flipped": partial(flip, 1.0),
    "cut": cut,
    "deleted": Path.unlink,
}


def files_of(artefact: Path) -> list[str]:
    """All files but locks and the mirror of metrics.jsonl; weights only where they are not seen in another artefact."""
    if artefact.is_file():
        return [artefact.name]
    found = [str(path.relative_to(artefact)) for path in sorted(artefact.rglob("*")) if path.is_file()]
    seen_elsewhere = () if artefact.name in ("dense", f"step-{STEPS:08d}") else ("/weights/", "/optimizer/")
    return [name for name in found if not any(part in name for part in ("tensorboard/", ".lock", *seen_elsewhere))]


def harmed(artefact: Path, name: str, harm: str, out: Path) -> Path:
    """A copy of an artefact of which one file was harmed."""
    shutil.rmtree(out, ignore_errors=True)
    if artefact.is_file():
        out.mkdir()
        os.link(artefact, out / artefact.name)
    else:
        copy_tree(artefact, out)
    file = out / name
    if harm != "deleted":  # which would harm the file that it is a hard link of
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    HARMS[harm](file)
    return file if artefact.is_file() else out


@pytest.mark.parametrize("kind", KINDS)
def test_every_harm_to_every_file_is_named(artefacts: dict[str, Path], kind: str, tmp_path: Path) -> None:
    artefact = artefacts[kind]
    whole = run_here("inspect", artefact, "--verify")
    assert (whole.status, whole.out.splitlines()[-1]) == (0, "Verified: everything is as it was written."), whole
    missed = []
    for name in files_of(artefact):
        for harm in HARMS:
            place = harmed(artefact, name, harm, tmp_path / "harmed")
            said = run_here("inspect", place, "--verify")
            if said.status != 1 or Path(name).name not in said.out + said.err:
                missed.append((name, harm, said))
    assert missed == []


def test_a_tuning_run_that_was_killed_before_its_result_is_no_fault(artefacts: dict[str, Path], tmp_path: Path) -> None:
    run = harmed(artefacts["tuning run"], "result.json", "deleted", tmp_path / "run")
    (noted,) = (path for path in (run / "attempts").glob("*.json") if "result.json" in path.read_text())
    record = json.loads(noted.read_text())
    del record["files"]["result.json"]
    noted.unlink()
    write_checked(noted, record)
    said = run_here("inspect", run, "--verify")
    assert (
        said.status == 0 and "result.json: is missing, but tuned exists: rerun the same command to resume" in said.out
    )


def _read_run(run: Path) -> None:
    """As `moce report`, `select` and a resumed run read it."""
    opened = RunFolder.open(run)
    for part in ("config", "metrics", "routing", "clusters"):
        getattr(opened, part)
    checkpoint = find(run)
    for part in (WEIGHTS, OPTIMIZER):
        checkpoint.load(part)
    if checkpoint.manifest["clusters_hash"]:
        checkpoint.routes  # noqa: B018 (must be readable)
        _, clusters = run_clusters(run)
        clusters_encoder(checkpoint, clusters, torch.device("cpu"))
        load_ids(run / "clusters", clusters.shards_fingerprint, int(clusters.sizes_M.sum()))


def _read_shards(path: Path) -> None:
    shards = ShardSet.open(path)
    for image_id in range(shards.count):
        shards.decode(image_id)
    shards.source(0)


def _read_clusters(path: Path) -> None:
    clusters = Clusters.open(path)
    load_ids(path, clusters.shards_fingerprint, int(clusters.sizes_M.sum()))
    check_encoder(path, clusters.encoder_fingerprint, clusters.files)
    load_encoder(path / "encoder")


def _read_features(path: Path) -> None:
    features = FeatureSet.open(path)
    features.all()
    check_encoder(path, features.identity.encoder_fingerprint, features.files)


def _read_checkpoint(path: Path) -> None:
    for part in (WEIGHTS, OPTIMIZER):
        Checkpoint.open(path).load(part)


def _read_tuning(path: Path) -> None:
    read_metrics(path / "metrics.jsonl")
    read_result(path)
    load_encoder(path / "tuned")


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shards": (_read_shards, r"\.idx|rejected|tar flipped"),
    "labelled shards": (_read_shards, r"\.idx|rejected|tar flipped"),
    "features": (_read_features, ""),
    "clusters": (_read_clusters, ""),
    "dense run": (_read_run, "attempts/|reconstructions/|config.yaml|metrics.jsonl (cut|deleted)"),
    "moce run": (
        _read_run,
        "attempts/|reconstructions/|config.yaml|metrics.jsonl cut|(metrics.jsonl|^routing.safetensors) deleted",
    ),
    "checkpoint": (_read_checkpoint, ""),
    "encoder": (load_encoder, ""),
    "tuning run": (_read_tuning, "attempts/|reconstructions/|config.yaml|checkpoints/|metrics.jsonl (cut|deleted)"),
    "results": (read_results, "deleted"),
}
"""What reads an artefact, and the harms that it cannot see: what it does not read, and parts that need not be there."""


@pytest.mark.parametrize("kind", READERS)
def test_whoever_reads_it_names_it(artefacts: dict[str, Path], kind: str, tmp_path: Path) -> None:
    read, unseen = READERS[kind]
    read(artefacts[kind])
    missed = []
    for name in files_of(artefacts[kind]):
        for harm in ("flipped late", "cut", "deleted"):
            if unseen and re.search(unseen, f"{name} {harm}"):
                continue
            # Under a name of its own: an opened shard stays open.
            place = harmed(artefacts[kind], name, harm, tmp_path / f"{harm} {name.replace('/', ' ')}")
            try:
                read(place)
                missed.append((name, harm, "passed"))
            except MoceError as error:
                if Path(name).name not in str(error):
                    missed.append((name, harm, str(error)))
    assert missed == []


def _set_samples(field: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        samples = np.load(path / "samples.npy")
        samples[field] += 1
        np.save(path / "samples.npy", samples)

    return change


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = (path / name).read_text()
        assert old in text, text
        (path / name).unlink()
        (path / name).write_text(text.replace(old, new, 1))

    return change


def _exchange_routes(path: Path) -> None:
    """Tables without a fault of their own that are not those of the checkpoint."""
    table = RoutingTable.read(path / "routing.safetensors")
    dataclasses.replace(table, expert_ML=np.roll(table.expert_ML, 1, axis=0)).write(path / "routing.safetensors")


def _exchange_config(path: Path) -> None:
    """Another encoder of the same weights, itself without a fault."""
    opened = load_encoder(path / "encoder")
    shutil.rmtree(path / "encoder")
    (path / "encoder").mkdir()
    other = dataclasses.replace(opened.shape, heads=1)
    save_encoder(path / "encoder", opened.model.state_dict(), other, opened.input, opened.provenance)


EDITS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "heights": ("shards", _set_samples("height"), "samples.npy"),
    "widths": ("shards", _set_samples("width"), "samples.npy"),
    "classes": ("shards", _edit("shards.json", '"digits"', '"number"'), "shards.json"),
    "heads": ("encoder", _edit("config.json", '"heads": 2', '"heads": 1'), "config.json"),
    "mean": ("encoder", _edit("config.json", "0.485", "0.400"), "config.json"),
    "provenance": ("encoder", _edit("provenance.json", '"step": 4', '"step": 5'), "provenance.json"),
    "heads of features": ("features", _exchange_config, "config.json"),
    "heads of clusters": ("clusters", _exchange_config, "config.json"),
    "a loss": ("dense run", _edit("metrics.jsonl", '"loss":0.5', '"loss":0.4'), "metrics.jsonl"),
    "a step left out": (
        "dense run", lambda run: (run / "metrics.jsonl").write_text(
            "".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[::2])
        ), "metrics.jsonl",
    ),
    "records cut off": (
        "dense run", lambda run: (run / "metrics.jsonl").write_text(
            "".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
        ), "metrics.jsonl",
    ),
    "a setting": ("dense run", _edit("config.yaml", "seed: 0", "seed: 1"), "config.yaml"),
    "a route": ("moce run", _exchange_routes, "routing.safetensors"),
    "clusters lost": ("moce run", lambda run: shutil.rmtree(run / "clusters"), "clusters"),
    "an accuracy": ("results", _edit("results.json", "0.625", "0.925"), "results.json"),
    "a measure": ("study", _edit("cells/seed=0/cell.json", "0.625", "0.925"), "cell.json"),
    "a stage": ("pipeline", _edit("pipeline/mae.json", '"done"', '"begun"'), "mae.json"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_edited_without_a_trace_of_damage_is_named(
    artefacts: dict[str, Path], edit: str, tmp_path: Path
) -> None:
    kind, change, name = EDITS[edit]
    source = artefacts[kind]
    folder = shutil.copytree(source, tmp_path / "copy") if source.is_dir() else tmp_path
    if source.is_file():
        shutil.copy(source, folder)
    change(folder)
    said = run_here("inspect", folder, "--verify")
    assert said.status == 1 and name in said.out + said.err, said


def test_what_earlier_versions_wrote_opens_and_is_said_to_be_unverified(
    artefacts: dict[str, Path], tmp_path: Path
) -> None:
    documents = {
        "shards": ["shards.json"], "features": ["features.json", "encoder/config.json"], "encoder": ["config.json"],
        "clusters": ["clusters.json", "encoder/config.json"],
    }  # fmt: skip
    for kind, names in documents.items():
        copy = shutil.copytree(artefacts[kind], tmp_path / kind)
        for name in names:
            if name == "shards.json":
                as_earlier(copy)
                continue
            document = json.loads((copy / name).read_text())
            del document["files"], document[CHECKSUM]
            (copy / name).write_text(json.dumps(document))
        READERS[kind][0](copy)
        said = run_here("inspect", copy, "--verify")
        assert said.status == 0, said
        unverified = f"{names[0]}: written before it had a checksum; it cannot be verified"
        assert unverified in said.out and "Verified" not in said.out
        assert "No fault found.\nThese parts cannot be verified:\n" in said.out


def test_what_cannot_be_verified_is_told_beside_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "findings", lambda _: Findings(["a: is missing"], ["b: no checksum"]))
    said = run_here("inspect", tmp_path, "--verify")
    assert (said.status, said.out) == (1, "a: is missing\nThese parts cannot be verified:\nb: no checksum\n"), said
