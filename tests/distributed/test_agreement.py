"""A fault that one rank alone can see ends every rank with the same error, instead of leaving the others in a wait."""

import errno
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness import run_distributed
from jobs import interrupted
from tiny_run import CLUSTERS, IMAGES, TinyData, alter_images, tiny_settings

from moce_ds.checkpoint.format import find
from moce_ds.checkpoint.shared_read import _set_aside
from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import LOST_PEER, DataError, MoceError
from moce_ds.data.clusters import load_ids
from moce_ds.data.loader import Batch
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.encoders.features import write_features
from moce_ds.encoders.open import open_encoder
from moce_ds.encoders.settings import FeatureSettings
from moce_ds.training import inputs
from moce_ds.training.pretrain import PretrainTask, pretrain
from moce_ds.training.settings import PretrainSettings

HALF = IMAGES // 2
Faults = dict[str, tuple[str, str]]
"""Type and message of the error that a rank saw, by what was wrong."""


def provoke(shards: Path, damaged: Path, clusters: Path, folder: Path) -> Faults:
    """Every fault that one rank sees first, in this rank."""
    faults: Faults = {}

    def note(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except MoceError as error:
            faults[name] = (type(error).__name__, str(error))

    with started() as runtime:
        note("nothing", lambda: _fail_on(runtime, None))
        note("rank 1", lambda: _fail_on(runtime, 1))
        note("disk of rank 1", lambda: _disk_of_rank_1(runtime))
        note("damaged checkpoint", lambda: _set_aside(folder / "lost", {1: ["it is damaged"]}, 0, runtime))
        words = tiny_settings(shards, folder / "run", "experts.ep_size=2", clusters=clusters)
        config = read_settings(PretrainSettings, words)
        with interrupted(folder / "run", 2 if runtime.is_main else None):
            pretrain(config, runtime)
        if runtime.is_main:
            _damage_header(find(folder / "run").folder / "weights/block-01-expert-002.safetensors")
        runtime.barrier()
        note("expert of rank 1", lambda: pretrain(config, runtime))

        for name, image, other in (
            ("plan of rank 1", 5, []),
            ("plan of rank 1, with locality off", 5, ["experts.loader_locality=false"]),
            ("second plan of rank 1", 13, ["optim.accumulation=2"]),
        ):
            words = tiny_settings(shards, folder / name, "experts.ep_size=2", *other, clusters=clusters)
            config = read_settings(PretrainSettings, words)
            off = partial(_one_cluster_off, image)
            with patch.object(inputs, "load_ids", off if runtime.rank == 1 else load_ids):
                note(name, lambda config=config: pretrain(config, runtime))

        for arch in ("moce", "token_moe"):
            words = tiny_settings(shards, folder / arch, "experts.ep_size=2", f"model.arch={arch}", clusters=clusters)
            config = read_settings(PretrainSettings, words)
            with patch.object(PretrainTask, "batches", _unreadable if runtime.rank == 1 else PretrainTask.batches):
                note(f"first images of rank 1, {arch}", lambda config=config: pretrain(config, runtime))

        encoder = open_encoder(clusters / "encoder", runtime.device)
        settings = FeatureSettings(block_rows=HALF)  # one block a rank
        features = folder / "features"
        note("image of rank 1", lambda: write_features(encoder, ShardSet.open(damaged), features, settings, runtime))
        other = FeatureSettings(block_rows=HALF + 1)
        note("features begun", lambda: write_features(encoder, ShardSet.open(damaged), features, other, runtime))

        diverged = open_encoder(clusters / "encoder", runtime.device)
        with torch.no_grad():
            next(diverged.model.parameters()).fill_(float("nan"))
        features = folder / "diverged"
        note("features of NaN", lambda: write_features(diverged, ShardSet.open(shards), features, settings, runtime))
    return faults


def _one_cluster_off(place: int, folder: Path, fingerprint: str, count: int) -> np.ndarray:
    """The clusters' ids, but for one image, the one with this place in the third step, where it is read first."""
    ids_N = np.array(load_ids(folder, fingerprint, count))
    image = ShuffledSampler(RandomOrder(count, seed=0), 16).batch(2).ids[place]
    ids_N[image] = (ids_N[image] + 1) % CLUSTERS
    return ids_N


def _unreadable(task: PretrainTask, first_step: int) -> Iterator[Batch]:
    """A loader that cannot read its first batch."""
    raise DataError("the first images cannot be read")
    yield


def _fail_on(runtime: Runtime, rank: int | None) -> None:
    with runtime.raise_on_all_ranks():
        if runtime.rank == rank:
            raise DataError(f"only rank {rank} knows")


def _disk_of_rank_1(runtime: Runtime) -> None:
    try:
        with runtime.raise_on_all_ranks():
            if runtime.rank == 1:
                raise OSError(errno.EIO, "Input/output error")
    except MoceError as error:
        raise MoceError(f"{error} Status {error.status}.") from None


def _damage_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"no json here")


@pytest.fixture(scope="module")
def faults(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Faults]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("agreement")
    damaged = folder / "shards"
    shutil.copytree(tiny_data.shards, damaged)
    alter_images(damaged, [HALF + 5])
    return run_distributed(provoke, 2, tiny_data.shards, damaged, tiny_data.clusters, folder)


def test_all_is_well(faults: list[Faults]) -> None:
    assert all("nothing" not in seen for seen in faults)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("rank 1", "only rank 1 knows"),
        ("disk of rank 1", f" Status {LOST_PEER}."),
        ("plan of rank 1", "Step 3: the ranks disagree on where images go. Rank(s) 1 differ from the rest"),
        ("plan of rank 1, with locality off", "Step 3: the ranks disagree on where images go. Rank(s) 1 differ"),
        ("first images of rank 1, moce", "the first images cannot be read"),
        ("first images of rank 1, token_moe", "the first images cannot be read"),
        ("second plan of rank 1", "Step 3: the ranks disagree on where images go. Rank(s) 1 differ from the rest"),
        ("damaged checkpoint", "lost cannot be written"),
        ("expert of rank 1", "block-01-expert-002.safetensors is damaged: its checksum"),
        ("image of rank 1", f"image {HALF + 5} "),
        ("features of NaN", "The features of image 0 are NaN or beyond float16"),
        ("features begun", f"block_rows: {HALF} there, {HALF + 1} now"),
    ],
)
def test_all_ranks_see_the_fault(faults: list[Faults], what: str, told: str) -> None:
    assert told in faults[0][what][1]
    assert len({seen[what] for seen in faults}) == 1, "also the class of the error"
