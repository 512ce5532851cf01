"""Encoder features of images: to memory for a task, to disk for a pre-training set.

Axes: N images, D width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Never

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moce_ds.checkpoint.format import find
from moce_ds.clustering.feature_store import ENCODER, FeatureWriter, Identity
from moce_ds.console import progress_bar
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import SequentialSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import ArtefactError
from moce_ds.models.dense import dense_encoder
from moce_ds.models.encode_settings import EncodeSettings, FeatureSettings
from moce_ds.models.public_mae import public_encoder
from moce_ds.models.vit import Encoder, load_encoder, save_encoder
from moce_ds.storage.drafts import restore
from moce_ds.storage.encoder_folder import CONFIG, WEIGHTS
from moce_ds.storage.files import atomic_folder, writes_to
from moce_ds.text import shortened

_KEPT = 4
_kept_features: dict[tuple[str, str, str], Tensor] = {}


def open_encoder(path: Path, device: torch.device, heads: int | None = None) -> Encoder:
    """The encoder that `path` names: an encoder folder, a run folder or checkpoint of a dense MAE, or a file of the
    public MAE, whose attention `heads` may have to be told (see `public_encoder`).

    Raises:
        ArtefactError: it is none of them.
    """
    restore(path)
    if path.is_file():
        encoder = public_encoder(path, heads)
        encoder.model.to(device)
        return encoder
    if heads is not None:
        raise ArtefactError(f"--heads goes with a file of the public MAE; {path} is none.")
    if not path.is_dir():
        raise ArtefactError(
            f"{path} not found: expected an encoder folder, the run of a dense MAE, or a .pth file of the public MAE."
        )
    if any((path / name).exists() for name in (WEIGHTS, CONFIG)):  # one alone is half of an export, and says so
        return load_encoder(path, device)
    encoder = dense_encoder(find(path))
    encoder.model.to(device)
    return encoder


def encode(
    encoder: Encoder, shards: ShardSet, ids: range, config: EncodeSettings, device: torch.device
) -> Iterator[Tensor]:
    """Features of the images `ids`, in order, batch after batch, [<= batch_size, D] float32 on the host.

    A damaged image would be replaced by another one and get its features; here that is an error, since a feature
    stands for its image.

    Raises:
        DataError: an image is not as it was written.
    """
    sampler = SequentialSampler(ids.start, ids.stop, config.batch_size)
    loader = Loader(
        shards,
        sampler.batch,
        CenterCrop(encoder.input.center_crop),
        encoder.input,
        first=0,
        last=sampler.num_batches,
        batch_size=config.batch_size,
        threads=config.threads,
        device=device,
        replace_damaged=False,
    )
    for batch in loader:
        yield encoder.features(batch.images_BCHW).cpu()


def encode_all(encoder: Encoder, shards: ShardSet, config: EncodeSettings, device: torch.device) -> Tensor:
    """Features of a whole (task-sized) shard set, [N, D] float32 on the host, with a progress bar.

    Those of the last few pairs of encoder and images are kept: one process that measures several things on the same
    features, as the demo does, computes them once.
    """
    key = (encoder.fingerprint, str(encoder.input), shards.fingerprint)
    if key in _kept_features:
        return _kept_features[key]
    while len(_kept_features) >= _KEPT:
        _kept_features.pop(next(iter(_kept_features)))
    with _bar(shards.count, f"encoding {shortened('/'.join(shards.named.parts[-2:]), 60)}", visible=True) as bar:
        parts = []
        for part_ND in encode(encoder, shards, range(shards.count), config, device):
            parts.append(part_ND)
            bar.update(len(part_ND))
    _kept_features[key] = torch.cat(parts)
    return _kept_features[key]


def write_features(encoder: Encoder, shards: ShardSet, out: Path, config: FeatureSettings, runtime: Runtime) -> None:
    """Write the features of a shard set; the processes share the blocks, and blocks that are there are kept.

    Raises:
        ArtefactError: `out` holds features of other images or of another encoder.
        DataError: an image is damaged, or a feature is not finite.
    """
    identity = Identity(
        shards_fingerprint=shards.fingerprint,
        encoder_fingerprint=encoder.fingerprint,
        encoder_input=encoder.input.to_tree(),
    )
    writer = None
    with runtime.raise_on_all_ranks():
        if runtime.is_main:  # one process begins the folder, the others find it begun
            writer = FeatureWriter(out, shards.count, encoder.shape.width, identity, config.block_rows)
            _keep_encoder(encoder, out / ENCODER)
    writer = writer or FeatureWriter(out, shards.count, encoder.shape.width, identity, config.block_rows)
    missing = writer.missing_blocks()
    runtime.barrier()  # all have looked before anyone adds a block
    with runtime.raise_on_all_ranks():
        _write_blocks(encoder, shards, writer, missing[runtime.rank :: runtime.world_size], config, runtime)
    if runtime.is_main:
        writer.finish()


def _keep_encoder(encoder: Encoder, folder: Path) -> None:
    """Leave the encoder beside its features. Raises ArtefactError where another one lies there."""
    if not folder.exists():
        with writes_to(folder), atomic_folder(folder) as draft:
            save_encoder(draft, encoder.model.state_dict(), encoder.shape, encoder.input, encoder.provenance)
    elif load_encoder(folder).identity != encoder.identity:
        raise ArtefactError(
            f"{folder} is another encoder than the one given; the features beside it may come from either encoder: "
            f"give another folder, or delete {folder.parent} and make the features again."
        )


def _write_blocks(
    encoder: Encoder,
    shards: ShardSet,
    writer: FeatureWriter,
    blocks: list[int],
    config: EncodeSettings,
    runtime: Runtime,
) -> None:
    with _bar(sum(len(writer.block_ids(k)) for k in blocks), "features", visible=runtime.is_main) as bar:
        for k in blocks:
            parts = []
            for part_ND in encode(encoder, shards, writer.block_ids(k), config, runtime.device):
                parts.append(part_ND.numpy())
                bar.update(len(part_ND))
            writer.write_block(k, np.concatenate(parts))


def _bar(total: int, what: str, visible: bool) -> "tqdm[Never]":
    return progress_bar(total=total, desc=what, unit="img", disable=not visible, delay=2, dynamic_ncols=True)
