"""The rule by which `moce init` chooses a pipeline, in docs/own-images.md as a table.

Nothing is read or measured here: the rule is arithmetic on `Images` and `Hardware`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from moce_ds.common.text import counted


@dataclass(frozen=True)
class Images:
    """What is known about the images for pre-training.

    Attributes:
        count: their number, estimated from a sample if there are many.
        side: median length of the shorter side, pixels.
        stored_bytes: mean size in a shard.
        seconds: to examine one of them in one process, as `moce shards` does; None: they are in shards.
    """

    count: int
    side: int
    stored_bytes: float
    seconds: float | None = None


@dataclass(frozen=True)
class Hardware:
    """The machines of a run.

    Attributes:
        nodes: their number.
        gpus: GPUs of each; 0 to compute on CPUs.
        cores: CPU cores of each, which matter without GPUs.
    """

    nodes: int
    gpus: int
    cores: int

    @property
    def processes(self) -> int:
        """Processes of a node: one per GPU, or a power of two that the cores and small batches allow."""
        return self.gpus or _power_of_two(min(self.cores, 8))

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes

    def __str__(self) -> str:
        each = counted(self.gpus, "GPU") if self.gpus else counted(self.cores, "CPU core")
        return f"{self.nodes} x {each}" if self.nodes > 1 else each


class Size(NamedTuple):
    """A size of the encoder: decoder (width, blocks, heads; None: the public MAE's), and why it is chosen."""

    decoder: tuple[int, int, int] | None
    why: str


SIZES = {
    "vit_tiny": Size((128, 2, 4), "for CPUs, or fewer than 10,000 images"),
    "vit_small": Size((256, 4, 8), "for 10,000 to 200,000 images"),
    "vit_base": Size(None, "for 200,000 images and more"),
    "vit_large": Size(None, "for 10 million images and more on 32 GPUs and more"),
}
"""The sizes, by the beginning of timm's name."""

FEWEST = 100
"""Images that can be clustered at all."""

PER_CLUSTER = 300
"""Images of a cluster: some hundreds tell what the cluster means."""

_CLUSTERS = (8, 256)
_SHORT = 10_000  # steps; a shorter run needs a higher learning rate
_PUBLIC_EPOCHS = 800
_PUBLIC_IMAGES = _PUBLIC_EPOCHS * 1_281_167  # images seen, of ImageNet
_BLOCKS_FROM = 500e9  # bytes, more than a node keeps in memory


class Chosen(NamedTuple):
    """A value of the pipeline by its dotted key, and the reason for it."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Recipe:
    """The values that follow from the images and the hardware.

    Attributes:
        size: a key of SIZES; None: by the rule.
        accumulation: micro-batches of a step, as many as the memory of the GPUs requires.
    """

    images: Images
    hardware: Hardware
    size: str | None = None
    accumulation: int = 1

    @cached_property
    def vit(self) -> str:
        """The size of the encoder."""
        count, gpus = self.images.count, self.hardware.gpus * self.hardware.nodes
        if self.size is not None:
            return self.size
        if not gpus or count < 10_000:
            return "vit_tiny"
        if count < 200_000:
            return "vit_small"
        return "vit_large" if count >= 10_000_000 and gpus >= 32 else "vit_base"

    @cached_property
    def patch_size(self) -> int:
        """The largest patch that leaves at least 8 x 8 of them."""
        side = max(16, min(self.images.side, self._largest))
        return next(patch for patch in (16, 8, 4, 2) if side // patch >= 8)

    @property
    def image_size(self) -> int:
        """The images' own size in whole patches, up to 224 pixels, on CPUs 128."""
        return max(16, min(self.images.side, self._largest)) // self.patch_size * self.patch_size

    @property
    def _largest(self) -> int:
        return 224 if self.hardware.gpus else 128

    @cached_property
    def dense_epochs(self) -> float:
        """Passes of the dense MAE: a number of images for each GPU or core, within limits."""
        gpus = self.hardware.gpus * self.hardware.nodes
        seen = min(_PUBLIC_IMAGES, 125e6 * gpus) if gpus else 30e3 * self.hardware.cores * self.hardware.nodes
        fewest, most = (10, _PUBLIC_EPOCHS) if gpus else (2, 100)
        return _rounded(min(most, max(fewest, seen / self.images.count)))

    @property
    def expert_epochs(self) -> float:
        """Further passes with experts: a quarter of the dense MAE's, half in a short run."""
        return _rounded(self.dense_epochs / (2 if self.is_short else 4))

    @cached_property
    def batch_size(self) -> int:
        """A power of two for each process, up to 4096 in all, that leaves about 20,000 steps."""
        fewest = 256 if self.hardware.gpus else 64
        wanted = min(4096, max(fewest, self.images.count * self.dense_epochs / 20_000))
        return self.hardware.world_size * _power_of_two(max(1, int(wanted) // self.hardware.world_size))

    @property
    def steps(self) -> int:
        """Steps of the dense MAE."""
        return math.ceil(self.images.count * self.dense_epochs / self.batch_size)

    @property
    def is_short(self) -> bool:
        """Whether it has fewer steps than a small learning rate needs."""
        return self.steps < _SHORT

    @property
    def clusters(self) -> int:
        """One cluster for some hundred images, within limits."""
        return min(max(self.images.count // PER_CLUSTER, _CLUSTERS[0]), _CLUSTERS[1])

    @property
    def experts(self) -> int:
        """Eight, if there are four clusters for each; else four."""
        return 8 if self.clusters >= 32 else 4

    @property
    def ep_size(self) -> int:
        """As many processes of a node as divide the experts evenly."""
        return math.gcd(self.experts, self.hardware.processes)

    def choices(self) -> Iterator[Chosen]:
        """All values that the rule decides, in the order of the file."""
        yield from self._model()
        yield from self._training()
        yield from self._experts()

    def _model(self) -> Iterator[Chosen]:
        images, decoder = self.images, SIZES[self.vit].decoder
        given = "as given by --size" if self.size else SIZES[self.vit].why
        yield Chosen("settings.mae.model.vit", f"{self.vit}_patch16_224", given)
        if self.patch_size != 16:
            yield Chosen("settings.mae.model.patch_size", self.patch_size, "the largest with 8 x 8 patches or more")
        if decoder:
            for part, value in zip(("width", "depth", "heads"), decoder, strict=True):
                yield Chosen(f"settings.mae.model.decoder_{part}", value, "a small decoder" if part == "width" else "")
        limit = f"at most {self._largest}{'' if self.hardware.gpus else ' on CPUs'}; "
        side = f"{limit if images.side > self._largest else ''}shorter sides: {images.side}"
        yield Chosen("settings.mae.data.image_size", self.image_size, side)
        yield Chosen("settings.mae.data.flip", True, "false for text, digits and the like")
        if self.image_size < 64:
            yield Chosen("settings.mae.data.crop_scale", [0.5, 1.0], "smaller parts of small images show little")
        if images.side < self.image_size / 0.875:
            yield Chosen("settings.mae.data.center_crop", 1.0, "the whole image: it is no larger than the input")
        threads = 8 if self.hardware.gpus else max(1, self.hardware.cores // self.hardware.processes)
        yield Chosen("settings.mae.data.threads", threads, "decoding threads of a process")
        if images.count * images.stored_bytes > _BLOCKS_FROM:
            yield Chosen("settings.mae.data.order", "blocks", "more than memory keeps: see docs/scaling.md")

    def _training(self) -> Iterator[Chosen]:
        short, every = self.is_short, max(20, min(1000, self.steps // 10))
        seen = self.images.count * self.dense_epochs
        why = "the public MAE's" if self.dense_epochs == _PUBLIC_EPOCHS else f"{seen / 1e6:,.3g} million images seen"
        yield Chosen("settings.mae.optim.epochs", self.dense_epochs, why)
        yield Chosen("settings.mae.optim.batch_size", self.batch_size, f"{self.steps:,} steps")
        if self.accumulation > 1:
            yield Chosen("settings.mae.optim.accumulation", self.accumulation, "a part of the batch fits into memory")
        rate = "for 256 images; high, as the run is short" if short else "for 256 images; the public MAE's"
        yield Chosen("settings.mae.optim.base_lr", 2e-3 if short else 1.5e-4, rate)
        yield Chosen("settings.mae.optim.warmup_epochs", _rounded(self.dense_epochs / 20), "a twentieth")
        if not self.hardware.gpus:
            yield Chosen("settings.mae.engine.precision", "fp32", "bf16 is slow on CPUs")
        yield Chosen("settings.mae.run.checkpoint_every", every, "steps; a tenth of the run, at most 1000")
        yield Chosen("settings.mae.run.picture_every", every, "")

    def _experts(self) -> Iterator[Chosen]:
        each = self.images.count // self.clusters
        yield Chosen("settings.clusters.num_clusters", self.clusters, f"about {each:,} images each")
        if self.vit == "vit_tiny":
            yield Chosen("settings.clusters.eps", 0.002, "features of a small encoder lie close together")
            yield Chosen("settings.clusters.tolerance", 0.1, "")
        experts, short = self.experts, self.is_short
        yield Chosen("settings.moce.model.arch", "moce", "the MAE above with experts, from its weights")
        yield Chosen("settings.moce.experts.num", experts, f"{self.images.count // experts:,} images for each")
        yield Chosen("settings.moce.experts.ep_size", self.ep_size, "processes that share the experts")
        part = "half" if short else "a quarter"
        yield Chosen("settings.moce.optim.epochs", self.expert_epochs, f"{part} of the dense MAE's")
        rate = "half of the dense MAE's" if short else "a tenth: the weights are trained"
        yield Chosen("settings.moce.optim.base_lr", 1e-3 if short else 1.5e-5, rate)
        yield Chosen("settings.moce.optim.warmup_epochs", _rounded(self.expert_epochs / 20), "a twentieth")

    @property
    def warning(self) -> str | None:
        """A warning if there are few images for a cluster."""
        each, few = self.images.count // self.clusters, PER_CLUSTER * _CLUSTERS[0]
        if self.images.count >= few:
            return None
        return (
            f"{self.images.count:,} images are few: about {each} for each of {self.clusters} clusters, and some "
            f"hundreds are advisable ({few:,} images or more). Experts may then be no better than the dense MAE."
        )


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`."""
    return 1 << (number.bit_length() - 1)


def _rounded(number: float) -> float:
    """Two significant digits; an integer if it is whole."""
    rounded = float(f"{number:.2g}")
    return int(rounded) if rounded.is_integer() else rounded
