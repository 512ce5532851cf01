"""What of the loader only a GPU can show: its batches stay as they are while kernels still read them, DALI's decoder
there, and the device of its threads.

Axes: B images, C channels, H, W pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moce_ds.data.loader import Batch, Loader
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")

BATCHES, BATCH_SIZE = 24, 30


def loader(shards: Path, device: str, size: int = 64) -> Iterator[Batch]:
    images = ShardSet.open(shards)
    sampler = ShuffledSampler(RandomOrder(images.count, seed=1), BATCH_SIZE)
    return iter(
        Loader(
            images,
            sampler.batch,
            RandomCrop(1),
            ImageInput(size),
            first=0,
            last=BATCHES,
            batch_size=BATCH_SIZE,
            threads=2,
            device=torch.device(device),
        )
    )


def delay(matrix: Tensor) -> None:
    """Keep the current stream busy for longer than the loader needs for several batches."""
    for _ in range(40):
        torch.mm(matrix, matrix)


@pytest.mark.parametrize("side_stream", [False, True])
def test_a_batch_stays_as_it_is_until_the_training_stream_has_read_it(tiny_shards: Path, side_stream: bool) -> None:
    """The host is far ahead of the device: a batch is read long after it was taken, and dropped, by the host.

    Meanwhile DALI decodes further batches, and the loading thread copies them. The copies that are compared are queued
    behind the delay.
    """
    expected = []
    for batch in loader(tiny_shards, "cuda:0"):
        expected.append(batch.images_BCHW.cpu())  # waits for the device: nothing overlaps
    matrix = torch.randn(4096, 4096, device="cuda:0")
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    found = []
    with torch.cuda.stream(stream):
        for batch in loader(tiny_shards, "cuda:0"):
            delay(matrix)
            found.append(batch.images_BCHW.clone())
            del batch
    torch.cuda.synchronize()
    assert len(found) == len(expected) == BATCHES
    for late_BCHW, images_BCHW in zip(found, expected, strict=True):
        assert torch.equal(late_BCHW.cpu(), images_BCHW)


def test_taking_a_batch_does_not_make_the_host_wait_for_the_device(tiny_shards: Path) -> None:
    batches = loader(tiny_shards, "cuda:0")
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in batches) == BATCHES - 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gpu_decodes_what_the_cpu_decodes(tiny_shards: Path) -> None:
    """Decoders round differently: by a few of 255 levels, which is about 0.02 after the normalisation."""
    for on_gpu, on_cpu in zip(loader(tiny_shards, "cuda:0"), loader(tiny_shards, "cpu"), strict=True):
        assert on_gpu.images_BCHW.device == torch.device("cuda:0") and on_gpu.ids_B.tolist() == on_cpu.ids_B.tolist()
        error_B = (on_gpu.images_BCHW.cpu() - on_cpu.images_BCHW).abs().mean(dim=(1, 2, 3))
        assert error_B.max() < 0.1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nothing_is_allocated_on_a_device_of_another_rank(tiny_shards: Path) -> None:
    before = torch.cuda.memory_allocated(0)
    for batch in loader(tiny_shards, "cuda:1"):
        assert batch.images_BCHW.device == torch.device("cuda:1")
    assert torch.cuda.memory_allocated(0) == before
