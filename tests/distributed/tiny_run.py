"""A pre-training run so small that a test can afford it: 90 real images, a model of four narrow blocks, 12 steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from moce_ds.checkpoint.format import OPTIMIZER, WEIGHTS, find
from moce_ds.clustering.build import ClusterSettings, build_clusters
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput
from moce_ds.distributed.runtime import Runtime
from moce_ds.encoders.features import write_features
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.models.vit import Encoder, ViTShape, timm_vit

IMAGES = 90  # no multiple of the batch, so that a batch straddles two epochs
STEPS = 12
CLUSTERS = 6
EXPERT_LAYERS = (1, 3)
TOLERANCE = 1e-6


@dataclass(frozen=True)
class TinyData:
    """Where the images' shards and their clusters lie."""

    shards: Path
    clusters: Path


def write_data(root: Path) -> TinyData:
    """Shards of `write_images`, and their clusters by the features of an untrained encoder, which are good enough."""
    write_shards(write_images(root / "images"), root / "shards", ShardSettings(workers=1, images_per_shard=40))
    torch.manual_seed(0)
    shape = ViTShape(image_size=16, patch_size=4, width=32, depth=2, heads=2)
    encoder = Encoder(timm_vit(shape).eval(), shape, ImageInput(16), {"source": "untrained"})
    alone = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    write_features(encoder, ShardSet.open(root / "shards"), root / "features", FeatureSettings(), alone)
    settings = ClusterSettings(num_clusters=CLUSTERS, fit_images_per_cluster=None)
    build_clusters(root / "features", root / "clusters", settings)
    return TinyData(root / "shards", root / "clusters")


def write_images(folder: Path, count: int = IMAGES) -> Path:
    """Half digits (classes digits/0 to digits/2), half crops of photographs (photos/china, photos/flower), 24 px."""
    digits = load_digits(n_class=3)
    for number in range(count // 2):
        image = Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).resize((24, 24))
        _save(image, folder / f"digits/{digits.target[number]}/{number:03d}.png")
    random = np.random.default_rng(0)
    for number in range(count - count // 2):
        name = ("china", "flower")[number % 2]
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        left, top, side = (int(random.integers(*limits)) for limits in ((0, 400), (0, 200), (60, 200)))
        crop = photo.resize((24, 24), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        _save(crop, folder / f"photos/{name}/{number:03d}.jpg")
    return folder


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def tiny_settings(shards: Path, out: Path, *other: str, clusters: Path | None = None) -> list[str]:
    """The words of `moce pretrain`: tiny.yaml and settings, of which `other` come last; with `clusters` for a MoCE."""
    words = [str(Path(__file__).with_name("tiny.yaml")), f"data.shards={shards}", f"run.out={out}"]
    if clusters:
        layers = ",".join(map(str, EXPERT_LAYERS))
        words += ["model.arch=moce", f"experts.clusters={clusters}", "experts.num=4", f"experts.layers=[{layers}]"]
    return [*words, *other]


def alter_images(shards: Path, ids: Iterable[int]) -> None:
    """Invert the bytes of some images inside the tars; sizes stay, so that only checksums can tell."""
    opened = ShardSet.open(shards)
    for row in opened.samples[list(ids)]:
        with open(shards / opened.shards[row["shard"]].name, "r+b") as tar:
            tar.seek(row["offset"])
            content = tar.read(int(row["size"]))
            tar.seek(row["offset"])
            tar.write(bytes(255 - byte for byte in content))


def losses(run: Path) -> list[float]:
    """The loss of every step, by metrics.jsonl."""
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return numbers(record["loss"] for record in records)


def numbers(values: Iterable[float | None]) -> list[float]:
    """Values of a record, NaN where it has null for a number that was not finite."""
    return [float("nan") if value is None else value for value in values]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights and Adam moments of the newest checkpoint, by global names."""
    checkpoint = find(run)
    return checkpoint.load(WEIGHTS) | checkpoint.load(OPTIMIZER)


def comparable(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state without the biases of attention keys: softmax does not see them, so their gradient is rounding error
    and Adam, which divides by its size, moves them at random."""
    return {name: _without_keys(t) if name.endswith("qkv.bias") else t for name, t in state.items() if t.numel()}


def _without_keys(bias_3D: torch.Tensor) -> torch.Tensor:
    query_D, _, value_D = bias_3D.chunk(3)
    return torch.cat([query_D, value_D])


def assert_same(runs: Path, first: str, second: str, tolerance: float = TOLERANCE) -> None:
    """Losses and gradient norms of all steps, and final weights and moments, agree; exactly for tolerance 0."""
    assert len(losses(runs / first)) == len(losses(runs / second)) == STEPS
    np.testing.assert_allclose(losses(runs / first), losses(runs / second), rtol=0, atol=tolerance)
    records = [read_metrics(runs / name / "metrics.jsonl") for name in (first, second)]
    norms = [numbers(record["grad_norm"] for record in of_run) for of_run in records]
    np.testing.assert_allclose(norms[0], norms[1], rtol=10 * tolerance)
    assert_same_state(runs / first, runs / second, tolerance)


def assert_same_state(first: Path, second: Path, tolerance: float = TOLERANCE) -> None:
    """Final weights and moments of two runs agree; exactly for tolerance 0."""
    states = [final_state(run) for run in (first, second)]
    if tolerance:
        states = [comparable(state) for state in states]
    assert states[0].keys() == states[1].keys()
    worst = max((float((states[0][name] - states[1][name]).abs().max()), name) for name in states[0])
    assert worst[0] <= tolerance, worst
