"""A run of random weights of any size, written without ever being held in memory; and how much memory its export takes.

    python tests/examples/synthetic_run.py FOLDER [--vit vit_base_patch16_224] [--experts 64] [--format timm]

writes such a run and prints the peak memory of its export, beyond that of the imported program, in MB.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, file_of, publish, step_folder, write_files
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.data.clusters import Clusters
from moce_ds.data.transform import ImageInput
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.mae import DecoderShape
from moce_ds.models.moce import ExpertShape
from moce_ds.models.vit import ViTShape, shape_of
from moce_ds.moe.reference import ReferenceMoE

CLUSTERS = 128

# Runs in a process of its own: what is measured is the export, from where its modules are imported on.
EXPORT = """
import json, sys
from pathlib import Path
from moce_ds.selection.routes import choose_average, choose_cluster
from moce_ds.exporting.write import export_route
from moce_ds.exporting.formats.registry import find_format
from moce_ds.selection.vote import run_clusters

def memory(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024

run, out, format, average = sys.argv[1:]
checkpoint, clusters = run_clusters(Path(run))
chosen = choose_average(checkpoint, average) if average else choose_cluster(checkpoint, 0)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
provenance = export_route(checkpoint, clusters, chosen, Path(out), {}, find_format(format))
print(json.dumps({"before": before, "peak": memory("VmHWM") - before, **provenance["loaded_back"]}))
"""


def synthetic_spec(shape: ViTShape, num_experts: int, layers: tuple[int, ...], decoder: DecoderShape) -> ModelSpec:
    """A MoCE whose gate values are folded in."""
    experts = ExpertShape(num_experts, layers, combine="prob")
    return ModelSpec(shape, decoder, 0.75, ImageInput(shape.image_size), experts)


def write_run(folder: Path, spec: ModelSpec) -> Path:
    """Random weights, random clusters, and routes that use every expert; one file of weights in memory at a time."""
    assert spec.experts is not None
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    embeddings = random.standard_normal((CLUSTERS, 32)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    zeros = np.zeros(CLUSTERS, np.float32)
    clusters = Clusters(
        embeddings_MD=embeddings, duals_M=zeros, mean_D=np.zeros(32, np.float32), sizes_M=np.arange(1, CLUSTERS + 1),
        cosine_M=zeros, eps=0.1, method="kmeans", shards_fingerprint="", encoder_fingerprint="", encoder_input={},
        provenance={},
    )  # fmt: skip
    clusters.write(folder / "clusters")
    draft = folder / "draft"
    draft.mkdir()
    files = {}
    for name, tensors in _weights(spec, clusters, generator):
        files |= write_files(draft, [(f"{WEIGHTS}/{name}", tensors)])
    layers, E = spec.experts.layers, spec.experts.num_experts
    expert_ML = (np.arange(CLUSTERS)[:, None] + np.array(layers)) % E
    routing = RoutingTable(1, layers, expert_ML, np.eye(E)[expert_ML.T], clusters.share_M)
    manifest = {"step": 1, "model": spec.to_tree(), "clusters_hash": clusters.hash, "routing": routing, "files": files}
    publish(draft, step_folder(folder, 1), manifest)
    return folder


def _weights(
    spec: ModelSpec, clusters: Clusters, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """File after file with its tensors."""
    with torch.device("meta"):
        model = build_model(spec, clusters, ReferenceMoE)
    by_file: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        by_file.setdefault(file_of(name), {})[name] = tuple(parameter.shape)
    for file, shapes in by_file.items():
        yield file, {n: _values(n, shape, generator) for n, shape in shapes.items()}


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    return 1 + 0.1 * values if "norm" in name and name.endswith("weight") else values * (shape[-1] ** -0.5)


def export_memory(run: Path, out: Path, format: str = "timm", average: str = "") -> dict[str, float]:
    """Memory in MiB of an export in a process of its own: `before` it, and `peak` beyond that."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(run), str(out), format, average], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Write a run, export it, and say what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vit", default="vit_base_patch16_224")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 11])
    parser.add_argument("--format", default="timm")
    parser.add_argument("--average", default="")
    given = parser.parse_args()
    spec = synthetic_spec(shape_of(given.vit), given.experts, tuple(given.layers), DecoderShape(512, 8, 16))
    if not given.folder.exists():
        given.folder.mkdir(parents=True)
        write_run(given.folder, spec)
    out = given.folder / "exported"
    shutil.rmtree(out, ignore_errors=True)
    found = export_memory(given.folder, out, given.format, given.average)
    print(found)


if __name__ == "__main__":
    main()
