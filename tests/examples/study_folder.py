"""A small study as training and transfer leave it: real images, a real shard set, real clusters of real pixels.

Only what training would log is made up. 340 images of 32 px: handwritten digits and crops of two photographs, all of
which come with scikit-learn.

Axes: N images, M clusters, E experts per layer, L expert layers, D pixels of a shrunken image.
"""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageFilter
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_sample_images

from moce_ds.data.clusters import Clusters, normalised, save_ids
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet

SIDE, M, E, LAYERS = 32, 16, 4, (3, 5)


def make_study(folder: Path) -> Path:
    """Write `folder`/{images, shards, demo}; the study is `folder`/demo with a dense run and a MoCE run."""
    write_images(folder / "images")
    write_shards(folder / "images", folder / "shards", ShardSettings(workers=1))
    shards = ShardSet.open(folder / "shards")
    study = folder / "demo"
    for name, arch, steps in (("mae", "mae", 400), ("moce", "moce", 180)):
        run = study / name
        run.mkdir(parents=True)
        config = {
            "model": {"arch": arch, "width": 192, "depth": 6},
            "experts": {"num": E, "layers": list(LAYERS)} if arch == "moce" else {},
            "data": {"shards": str(shards.path), "image_size": SIDE},
            "optim": {"batch_size": 64, "base_lr": 1.5e-4},
            "run": {"out": f"runs/demo/{name}", "seed": 0},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        write_metrics(run / "metrics.jsonl", steps, experts=arch == "moce")
        write_reconstructions(run / "reconstructions" / f"step-{steps:08d}.png", shards)
    clusters = write_clusters(study / "moce" / "clusters", shards)
    write_routing(study / "moce" / "routing.json", clusters)
    write_results(study / "results.json")
    return study


def write_images(folder: Path) -> None:
    """Classes digits/0 to digits/9, china and flower."""
    random = np.random.default_rng(0)
    digits, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(digits[:200], labels[:200], strict=True)):
        image = Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(np.uint8)).resize((SIDE, SIDE))
        _save(image, folder / "digits" / str(label) / f"{number:04d}.png")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(70):
            top, left = random.integers(0, 300), random.integers(0, 500)
            crop = Image.fromarray(photo[top : top + 120, left : left + 120]).resize((SIDE, SIDE))
            _save(crop, folder / name / f"{number:04d}.jpg")


def write_metrics(path: Path, steps: int, experts: bool) -> None:
    random = np.random.default_rng(steps)
    start = 0.55 if experts else 1.0
    with open(path, "w", encoding="utf-8") as lines:
        for step in range(1, steps + 1):
            done = step / steps
            record = {
                "step": step,
                "epoch": done * 5,
                "loss": 0.0,
                "reconstruction": 0.42 + (start - 0.42) * np.exp(-5 * done) + random.normal(0, 0.008),
                "lr": 1e-3 * (1 - done),
                "images_per_second": 410 + random.normal(0, 12) - 20 * experts,
                "data_wait": abs(random.normal(0.04, 0.02)),
                "grad_norm": 1.0,
            }
            if experts:
                record["imbalance"] = -2 * (E - 1) * done**2
                record["balance"] = 0.4 * (1 - done) + 0.05
                record["layers"] = {str(layer): _layer_state(done, layer) for layer in LAYERS}
            lines.write(json.dumps(record) + "\n")


def write_reconstructions(path: Path, shards: ShardSet) -> None:
    """Six rows of input, masked input and a blur that stands for the output."""
    random = np.random.default_rng(0)
    sheet = Image.new("RGB", (3 * SIDE, 6 * SIDE))
    for row, image_id in enumerate(random.choice(shards.count, 6, replace=False).tolist()):
        image = shards.decode(image_id)
        hidden = np.kron(random.random((8, 8)) < 0.75, np.ones((4, 4), bool))
        masked = np.where(hidden[:, :, None], 128, np.asarray(image)).astype(np.uint8)
        for column, panel in enumerate((image, Image.fromarray(masked), image.filter(ImageFilter.GaussianBlur(2)))):
            sheet.paste(panel, (column * SIDE, row * SIDE))
    _save(sheet, path)


def write_clusters(folder: Path, shards: ShardSet) -> Clusters:
    """k-means on pixels, saved as the clusters artefact."""
    pixels_ND = np.stack([np.asarray(shards.decode(i).resize((8, 8))).ravel() for i in range(shards.count)])
    mean_D = pixels_ND.mean(axis=0, dtype=np.float32)
    features_ND = normalised(pixels_ND, mean_D)
    kmeans = KMeans(M, n_init=2, random_state=0).fit(features_ND)
    embeddings_MD = normalised(kmeans.cluster_centers_, np.zeros_like(mean_D))
    clusters = Clusters(
        embeddings_MD=embeddings_MD,
        duals_M=np.zeros(M, np.float32),
        mean_D=mean_D,
        sizes_M=np.bincount(kmeans.labels_, minlength=M).astype(np.int64),
        cosine_M=np.full(M, 0.8, np.float32),
        eps=0.025,
        method="kmeans",
        shards_fingerprint=shards.fingerprint,
        encoder_fingerprint="pixels",
        encoder_input={"size": 8},
        provenance={},
    )
    folder.mkdir(parents=True)
    save_ids(folder, kmeans.labels_)
    clusters.write(folder)
    return clusters


def write_routing(path: Path, clusters: Clusters) -> None:
    """P_l = softmax(W_l C^T / 0.05)^T with random W_l."""
    W_LED = np.random.default_rng(3).normal(size=(len(LAYERS), E, clusters.embeddings_MD.shape[1]))
    logits_LME = np.einsum("led,md->lme", W_LED, clusters.embeddings_MD) * 1.5
    probs_LME = np.exp(logits_LME) / np.exp(logits_LME).sum(axis=2, keepdims=True)
    tables = {
        "step": 180,
        "layers": list(LAYERS),
        "experts": E,
        "expert_ML": probs_LME.argmax(axis=2).T.tolist(),
        "probs_LME": probs_LME.tolist(),
        "cluster_share_M": clusters.share_M.tolist(),
    }
    path.write_text(json.dumps(tables), encoding="utf-8")


def write_results(path: Path) -> None:
    records = []
    for task, n_train, n_test, scores in (
        ("digits", 2000, 1000, ((0.912, 0.948), (0.921, 0.951))),
        ("textile", 800, 400, ((0.870, 0.905), (0.868, 0.917))),
    ):
        for model, (knn, probe) in zip(("dense", "expert"), scores, strict=True):
            common = {"task": task, "model": model, "n_train": n_train, "n_test": n_test}
            records.append({"verb": "knn", "top1": knn, "mean_per_class": knn - 0.004, **common})
            records.append({"verb": "probe", "top1": probe, "mean_per_class": probe - 0.002, **common})
    for task, route, other in (("digits", [1, 3], [0, 3]), ("textile", [2, 0], [2, 1])):
        routes = [{"route": route, "share": 0.93}, {"route": other, "share": 0.07}]
        clusters = {"3": 0.41, "7": 0.32, "11": 0.2, "12": 0.07}
        select = {"verb": "select", "task": task, "model": "expert", "route": route, "share": 0.93, "confidence": 0.93}
        records.append({**select, "clusters": clusters, "routes": routes, "n_images": 2000})
    path.write_text(json.dumps(records), encoding="utf-8")


def _layer_state(done: float, layer: int) -> dict[str, object]:
    """Expert 3 of block 3 slowly dies."""
    load = np.array([0.25, 0.25, 0.25, 0.25]) + done * np.array([0.12, 0.05, 0.06, -0.23 if layer == 3 else -0.05])
    return {"load": (load / load.sum()).tolist(), "live": 4, "confidence": 0.26 + 0.6 * done}


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
