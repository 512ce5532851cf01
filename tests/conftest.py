"""Small real things that many tests need: images, a shard set, its clusters, settings of a tiny model.

Axes: N images.
"""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from moce_ds.checkpoint.format import step_folder, write_checkpoint
from moce_ds.clustering.build import ClusterSettings, build_clusters
from moce_ds.common.config.settings import load, to_tree
from moce_ds.common.host.program import configure_logging
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput
from moce_ds.encoders.features import write_features
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.models.build import build_model
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce
from moce_ds.models.vit import ViTShape, load_encoder, save_encoder, timm_vit
from moce_ds.moe.placement import default_placement
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.training.router import Router
from moce_ds.training.settings import PretrainSettings
from tests import USUAL_THRESHOLDS
from tests.examples.alone import ALONE
from tests.examples.disk import Disk, mounted_disk

os.environ.setdefault("OMP_NUM_THREADS", "1")  # else every command says how many it has chosen
os.environ["MOCE_CACHE"] = "off"  # tests of the cache name folders
configure_logging()  # as every program does


# A busy machine is slow, not wrong.
hypothesis_settings.register_profile("patient", deadline=None)
hypothesis_settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the tests, a file is one worker's, and so are the runs that several files use."""
    runs = {"one_process": "runs", "two_processes": "runs", "fake_gpu": "fake_gpu"}
    if hasattr(config, "workerinput"):
        for item in items:
            shared = [runs[name] for name in getattr(item, "fixturenames", ()) if name in runs]
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else item.path.stem))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Check that groups count; and what has been imported by now is no garbage: no later collection looks at it."""
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("This pytest-xdist ignores groups with this pytest: every worker would make all runs.")
    gc.freeze()
    gc.set_threshold(*USUAL_THRESHOLDS)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 real images: 20 handwritten digits of 16 px (PNG), 2 x 20 crops of photographs (JPEG, PNG)."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("china", "digits", "flower"):
        (folder / name).mkdir()
    for number, pixels in enumerate(load_digits().images[:20]):
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((16, 16))
        image.save(folder / "digits" / f"{number:02d}.png")
    random = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(20):
            height, width = random.integers(24, 64, 2)
            top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            crop.save(folder / name / f"{number:02d}.{'jpg' if number % 2 else 'png'}", quality=92)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those images as a shard set: shards of 25, 25 and 10; ids 0-19 china, 20-39 digits, 40-59 flower."""
    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(tiny_images, out, ShardSettings(images_per_shard=25, workers=1))
    return out


@pytest.fixture(scope="session")
def photo_pixels(tiny_shards: Path) -> Tensor:
    """Twelve of those images, digits among them, as a model sees them: [12, 3, 16, 16] float64 in -1 to 1."""
    shards = ShardSet.open(tiny_shards)
    pixels = [np.asarray(shards.decode(i).resize((16, 16)), np.float64) for i in range(2, 60, 5)]
    return torch.from_numpy(np.stack(pixels) / 127.5 - 1).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder with random weights, of the size that `tiny_config` has."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    shape = ViTShape(16, 4, 16, 3, 2)
    save_encoder(folder, timm_vit(shape).state_dict(), shape, ImageInput(16, center_crop=1.0), {"random": True})
    return folder


@pytest.fixture(scope="session")
def tiny_clusters(tiny_shards: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clusters of those images, by that encoder, as `moce features` and `moce cluster` make them."""
    folder = tmp_path_factory.mktemp("clustered")
    encoder, shards = load_encoder(tiny_encoder), ShardSet.open(tiny_shards)
    write_features(encoder, shards, folder / "features", FeatureSettings(threads=1), ALONE)
    build_clusters(folder / "features", folder / "clusters", ClusterSettings(num_clusters=6))
    return folder / "clusters"


@pytest.fixture(scope="session")
def artefacts(
    tiny_images: Path, tiny_shards: Path, tiny_clusters: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One of each artefact, by its kind in `artefacts.inspection.KINDS`; not to be changed."""
    from tests.examples.artefacts import write_all  # imports what few tests need

    root = tmp_path_factory.mktemp("artefacts")
    return write_all(root, tiny_images, tiny_shards, tiny_clusters.parent / "features", tiny_clusters)


@pytest.fixture(scope="module")
def small_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """A file system in memory of the size that the test's module states as DISK_SIZE; only root can mount it."""
    with mounted_disk(tmp_path_factory.mktemp("disk"), request.module.DISK_SIZE) as disk:
        yield disk


@pytest.fixture
def tiny_config(tiny_shards: Path, tmp_path: Path) -> Callable[..., PretrainSettings]:
    """Settings of a tiny dense MAE (16 px, patch 4, width 16, depth 3) that writes to `tmp_path`/run.

    Call it with `key=value` words to change them.
    """

    def make(*words: str) -> PretrainSettings:
        model = {"patch_size": 4, "width": 16, "depth": 3, "heads": 2}
        decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
        optim = {"epochs": 2, "batch_size": 12, "base_lr": 2e-2, "warmup_epochs": 0.2}
        tiny = [
            f"{group}.{k}={v}"
            for group, part in (("model", model | decoder), ("optim", optim))
            for k, v in part.items()
        ]
        tiny += [f"data.shards={tiny_shards}", "data.image_size=16", "data.threads=1", "engine.precision=fp32"]
        return load(PretrainSettings, None, [*tiny, f"run.out={tmp_path / 'run'}", *words])

    return make


@pytest.fixture
def tiny_mae_run(tiny_config: Callable[..., PretrainSettings], tmp_path: Path) -> Path:
    """A dense MAE with random weights."""
    config = tiny_config(f"run.out={tmp_path / 'dense'}")
    spec = config.model_spec
    torch.manual_seed(5)
    mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    weights = {name: p.detach() for name, p in mae.named_parameters()}
    manifest = {"step": 3, "config": to_tree(config), "model": spec.to_tree()}
    write_checkpoint(step_folder(config.run.out, 3), weights, {}, manifest)
    return config.run.out


@pytest.fixture
def tiny_moce_run(tiny_config: Callable[..., PretrainSettings], tiny_clusters: Path) -> Callable[..., Path]:
    """Write the run folder of a MoCE: random weights, four experts in blocks 0 and 2, a gate sure enough for routes to
    differ; one checkpoint without optimizer. Call it with `key=value` words to change its settings."""

    def make(*words: str) -> Path:
        config = tiny_config("model.arch=moce", f"experts.clusters={tiny_clusters}", "experts.num=4", *words)
        clusters, shards = Clusters.open(tiny_clusters), ShardSet.open(config.data.shards)
        torch.manual_seed(0)
        model = build_model(config.model_spec, clusters, ReferenceMoE)
        assert isinstance(model, Moce)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=3.0 if name.startswith("gate.") else 0.2)
        ids_N = load_ids(tiny_clusters, shards.fingerprint, shards.count)
        slot_LE = default_placement(len(config.expert_layers), config.experts.num)
        router = Router(model, ids_N, slot_LE, config.experts, seed=0, runtime=ALONE)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        manifest = {
            "step": 5,
            "skipped": 0,
            "images_read": 60,
            "config": to_tree(config),
            "model": config.model_spec.to_tree(),
            "clusters_hash": clusters.hash,
            "shards_fingerprint": shards.fingerprint,
            "routing": router.record(5),
            "placement": {"ep_size": 1, "slot_LE": slot_LE.tolist()},
            "dealt_by": [],
        }
        write_checkpoint(step_folder(config.run.out, 5), weights, {}, manifest)
        manifest["routing"].write(config.run.out / "routing.safetensors")
        shutil.copytree(tiny_clusters, config.run.out / "clusters")
        return config.run.out

    return make
