"""Features of images: in memory for a task, on disk for a pre-training set.

Axes: N images, D width.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from moce_ds.common.errors import ArtefactError
from moce_ds.common.host.program import shared_bar
from moce_ds.common.storage.files import atomic_folder, writes_to
from moce_ds.common.text import shortened
from moce_ds.data.feature_store import FeatureWriter, Identity
from moce_ds.data.kept_encoder import ENCODER
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop
from moce_ds.distributed.in_order import own_units, take_in_order
from moce_ds.distributed.runtime import Runtime
from moce_ds.encoders.kept_features import KeptFeatures
from moce_ds.encoders.settings import EncodeSettings, FeatureSettings
from moce_ds.models.vit import Encoder, load_encoder, save_encoder

_CACHE_SIZE = 4
_cached_features: dict[tuple[str, str, str], Tensor] = {}


def encode(
    encoder: Encoder, shards: ShardSet, blocks: Sequence[range], config: EncodeSettings, device: torch.device
) -> Iterator[Tensor]:
    """Features of blocks of images, in order, batch by batch, [<= batch_size, D] float32 on the host.

    No batch contains images of two blocks, so the features of a block do not depend on the others. One loader reads
    them all.

    A damaged image is an error here, not replaced, because a feature must belong to its image.

    Raises:
        DataError: an image is damaged; the features of all batches before it have been returned.
    """
    batches = [
        ids[first : first + config.batch_size] for ids in blocks for first in range(0, len(ids), config.batch_size)
    ]
    loader = Loader(
        shards,
        lambda index: _read_list(batches[index]),
        CenterCrop(encoder.input.center_crop),
        encoder.input,
        first=0,
        last=len(batches),
        batch_size=config.batch_size,
        threads=config.threads,
        device=device,
        replace_damaged=False,
    )
    for batch in loader:
        yield encoder.features(batch.images_BCHW).cpu()


def _read_list(ids: range) -> ReadList:
    ids_B = np.array(ids, dtype=np.int64)
    return ReadList(ids_B, np.zeros_like(ids_B))


def encode_all(encoder: Encoder, shards: ShardSet, config: EncodeSettings, runtime: Runtime) -> Tensor:
    """Features of a whole (task-sized) shard set, [N, D] float32 on the host, with a progress bar; a collective.

    The processes share the batches, and all get all features. They come from the cache of features (`kept_features`)
    if every process finds them there. This process keeps the last few results in memory as well, by encoder and images.
    """
    key = (encoder.fingerprint, str(encoder.input), shards.fingerprint)
    if key in _cached_features:
        return _cached_features[key]
    while len(_cached_features) >= _CACHE_SIZE:
        _cached_features.pop(next(iter(_cached_features)))
    kept = KeptFeatures.of(encoder, shards, config.batch_size, runtime.device)
    features_ND = _found_by_all(kept, runtime)
    if features_ND is None:
        features_ND = _encode_together(encoder, shards, config, runtime)
        if runtime.is_main:
            with kept.writing() as keep:
                keep(features_ND)
    _cached_features[key] = features_ND
    return features_ND


def _found_by_all(kept: KeptFeatures, runtime: Runtime) -> Tensor | None:
    """The features in the cache, if all processes find them; a collective."""
    with kept.found() as found_ND:
        own_ND = None if found_ND is None else torch.from_numpy(np.array(found_ND))
    (missing,) = runtime.max([float(own_ND is None)])
    if missing:
        return None
    kept.log_use()
    return own_ND


def _encode_together(encoder: Encoder, shards: ShardSet, config: EncodeSettings, runtime: Runtime) -> Tensor:
    """The features [N, D] on every process, which share the batches; a collective."""
    size, width = min(config.batch_size, shards.count), encoder.shape.width
    batches = [range(first, min(first + size, shards.count)) for first in range(0, shards.count, size)]
    own = [batches[k] for k in own_units(len(batches), runtime)]
    features_ND, remaining = torch.empty(shards.count, width), iter(batches)

    def take(part_BD: Tensor) -> None:
        ids = next(remaining)
        features_ND[ids.start : ids.stop] = part_BD[: len(ids)]

    parts = encode_shown(encoder, shards, own, config, runtime.device)
    padded = (pad(part_BD, (0, 0, 0, size - len(part_BD))) for part_BD in parts)  # equally long, to be sent
    take_in_order(padded, len(batches), torch.empty(size, width), take, runtime)
    return features_ND


def encode_in_order(
    encoder: Encoder, shards: ShardSet, config: EncodeSettings, device: torch.device
) -> Iterator[Tensor]:
    """Features of all images, batch by batch, in order, [<= batch_size, D] float32 on the host, with a progress bar.

    They come from the cache of features, or are kept in it. Only those of a batch are in memory.
    """
    kept = KeptFeatures.of(encoder, shards, config.batch_size, device)
    with kept.found() as found_ND:
        if found_ND is not None:
            kept.log_use()
            for first in range(0, shards.count, config.batch_size):
                yield torch.from_numpy(np.array(found_ND[first : first + config.batch_size]))
            return
    with kept.writing() as keep:
        for part_BD in encode_shown(encoder, shards, [range(shards.count)], config, device):
            keep(part_BD)
            yield part_BD


def encode_shown(
    encoder: Encoder,
    shards: ShardSet,
    blocks: Sequence[range],
    config: EncodeSettings,
    device: torch.device,
) -> Iterator[Tensor]:
    """As `encode`, with a progress bar: the processes share all images of the set."""
    name = f"encoding {shortened('/'.join(shards.named.parts[-2:]), 60)}"
    with shared_bar(sum(map(len, blocks)), shards.count, name, unit="img") as advance:
        for part_ND in encode(encoder, shards, blocks, config, device):
            yield part_ND
            advance(len(part_ND))


def write_features(encoder: Encoder, shards: ShardSet, out: Path, config: FeatureSettings, runtime: Runtime) -> None:
    """Write the features of a shard set. The processes share the blocks; existing blocks are kept.

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
        if runtime.is_main:  # rank 0 creates the folder before the others open it
            writer = FeatureWriter(out, shards.count, encoder.shape.width, identity, config.block_rows)
            _keep_encoder(encoder, out / ENCODER)
    writer = writer or FeatureWriter(out, shards.count, encoder.shape.width, identity, config.block_rows)
    missing = writer.missing_blocks()
    found = [] if writer.is_finished else sorted(set(range(writer.num_blocks)).difference(missing))
    runtime.barrier()  # no rank adds a block before all have listed them
    checksums = {}
    with runtime.raise_on_all_ranks():
        _write_blocks(encoder, shards, writer, missing, config, runtime)
        checksums = writer.checksums(found[runtime.rank :: runtime.world_size])  # those of an earlier, interrupted call
    of_ranks = runtime.texts(json.dumps(checksums))
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            writer.finish({name: sha256 for text in of_ranks for name, sha256 in json.loads(text).items()})


def _keep_encoder(encoder: Encoder, folder: Path) -> None:
    """Write the encoder beside its features. Raises ArtefactError if another one is there."""
    if not folder.exists():
        with writes_to(folder), atomic_folder(folder) as draft:
            save_encoder(draft, encoder.model.state_dict(), encoder.shape, encoder.input, encoder.provenance)
    elif load_encoder(folder).identity != encoder.identity:
        raise ArtefactError(
            f"{folder} differs from the given encoder, and the features beside it may come from either of them: "
            f"choose another folder, or delete {folder.parent} and write the features again."
        )


def _write_blocks(
    encoder: Encoder,
    shards: ShardSet,
    writer: FeatureWriter,
    missing: list[int],
    config: EncodeSettings,
    runtime: Runtime,
) -> None:
    """Write the blocks of this process among those that are missing."""
    blocks = missing[runtime.rank :: runtime.world_size]
    own, left = (sum(len(writer.block_ids(k)) for k in some) for some in (blocks, missing))
    with shared_bar(own, left, "features", shards.count - left, unit="img") as advance:
        features = encode(encoder, shards, [writer.block_ids(k) for k in blocks], config, runtime.device)
        for k in blocks:
            parts: list[NDArray[np.float32]] = []
            while sum(map(len, parts)) < len(writer.block_ids(k)):
                parts.append(next(features).numpy())
                advance(len(parts[-1]))
            writer.write_block(k, np.concatenate(parts))
