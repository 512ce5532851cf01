"""Pictures of a run: reconstructions and the routing table.

Axes: B images, H, W pixels, C channels, L expert layers, M clusters, E experts.
"""

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_folder import RECONSTRUCTIONS, picture_path
from moce_ds.common.storage.checksums import FileRecord
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop, ImageInput
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import MaskedAutoencoder, Reconstruction, filled_images, mask_noise, masked_images
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.router import Router

_IMAGES = 8
_CELL = 8  # height in pixels of a cluster's row in the routing picture; an expert's column is four times as wide


@dataclass(frozen=True)
class RunPictures:
    """Reconstructions of a few images, every so many steps of a run.

    Attributes:
        model: reconstructs; its experts may be spread over processes.
        shards, input: the images, and their size and normalisation.
        seed: of the masks.
        every: steps between pictures.
        lease: of the run folder, whose `reconstructions/` they go into.
    """

    model: MaskedAutoencoder
    shards: ShardSet
    input: ImageInput
    seed: int
    every: int
    lease: RunLease
    runtime: Runtime

    def due(self, step: int) -> bool:
        """Whether there is a picture of this step, unless it is the last."""
        return step % self.every == 0

    def draw(self, router: Router | None, step: int, logger: MetricLogger) -> None:
        """Reconstruct the same images on every process (expert layers are collectives); the main one writes them.

        Raises:
            DataError, ArtefactError, SupersededError: on every process alike.
        """
        images_BCHW, reconstruction = self._reconstructed(router)
        with self.runtime.raise_on_all_ranks():
            if self.runtime.is_main:
                picture = reconstruction_picture(images_BCHW, reconstruction, self.model.shape.patch_size, self.input)
                path = picture_path(self.lease.run, step)
                with self.lease.file(path, step) as draft:
                    Image.fromarray(picture).save(draft, format="PNG")
                self.lease.note(f"{RECONSTRUCTIONS}/{path.name}", FileRecord.of(path), step)
                logger.picture("reconstructions", picture, step)
                if router is not None:
                    logger.picture("routing", routing_picture(router.prepare(None).probs_LME), step)

    def _reconstructed(self, router: Router | None) -> tuple[Tensor, Reconstruction]:
        """The images, evenly from the whole set, and their reconstruction; a collective."""
        shown, runtime = min(_IMAGES, self.shards.count), self.runtime
        ids_B = np.linspace(0, self.shards.count - 1, shown).astype(np.int64)
        reading = ReadList(ids_B, np.zeros_like(ids_B))
        loader = Loader(
            self.shards,
            lambda _: reading,
            CenterCrop(self.input.center_crop),
            self.input,
            first=0,
            last=1,
            batch_size=shown,
            threads=1,
            device=runtime.device,
        )
        with runtime.raise_on_all_ranks():
            batch = next(iter(loader))
        noise_BN = mask_noise(self.seed, ids_B, reading.epochs, self.model.shape.num_patches).to(runtime.device)
        inputs: list[Any] = [batch.images_BCHW, noise_BN]
        if router is not None:
            inputs.append(router.route(router.prepare(None), np.tile(ids_B, runtime.world_size)))
        self.model.eval()
        with torch.no_grad():
            output = self.model(*inputs)
        self.model.train()
        return batch.images_BCHW, output.reconstruction


def reconstruction_picture(
    images_BCHW: Tensor, reconstruction: Reconstruction, patch_size: int, input: ImageInput
) -> NDArray[np.uint8]:
    """One row an image: the input, what the model saw (hidden patches gray), and the input with hidden patches filled.

    Returns [3 columns of images] as one [H, W, 3] uint8 picture.
    """
    seen_BCHW = masked_images(images_BCHW, reconstruction.mask_BN, patch_size)
    columns = [images_BCHW, seen_BCHW, filled_images(images_BCHW, reconstruction, patch_size)]
    rows_BCHW = torch.cat([_framed(column) for column in columns], dim=3)
    return input.pixels(torch.cat(list(rows_BCHW), dim=1).cpu().numpy())


def _framed(images_BCHW: Tensor) -> Tensor:
    """A margin of two pixels around each image."""
    return torch.nn.functional.pad(images_BCHW, (2, 2, 2, 2), value=2.0)


def routing_picture(probs_LME: Tensor) -> NDArray[np.uint8]:
    """The route tables side by side, clusters x experts, sorted by chosen expert; [H, W, 3] uint8."""
    panels = []
    for probs_ME in probs_LME.cpu().double().numpy():
        order = np.lexsort((-probs_ME.max(axis=1), probs_ME.argmax(axis=1)))
        shown = np.kron(probs_ME[order], np.ones((_CELL, 4 * _CELL)))
        panels.append(np.pad(shown, ((0, 0), (0, _CELL)), constant_values=np.nan))
    rgba = matplotlib.colormaps["viridis"](np.concatenate(panels, axis=1))
    return (rgba[:, :, :3] * 255).round().astype(np.uint8)
