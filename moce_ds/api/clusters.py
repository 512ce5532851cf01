"""Clusters that label images.

Axes: N images, B images per batch, D feature width.
"""

from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moce_ds.api.given import AnyPath, as_path
from moce_ds.checkpoint.run_folder import CLUSTERS
from moce_ds.clustering.quality import ClusterReport
from moce_ds.common.errors import DataError
from moce_ds.data.clusters import Clusters as FeatureClusters
from moce_ds.data.image_file import DECODER_FAULTS, Rejected, decoded, examine, fault_text, to_rgb
from moce_ds.data.kept_encoder import ENCODER, check_encoder
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop, ImageInput
from moce_ds.models.vit import Encoder, load_encoder

_BATCH = 64

AnyImage = str | PathLike[str] | Image.Image


class Clusters(PathLike[str]):
    """Clusters with the encoder whose features were clustered; as a path, their folder.

    Attributes:
        clusters: centroids `embeddings_MD`, sizes `sizes_M` and more, as numpy arrays.
        encoder: its `features` are what the clusters divide.

    Example::

        clusters = moce_ds.Clusters.load("clusters")
        labels_N = clusters.assign(["a.jpg", "b.jpg"])
        print(clusters.clusters.num_clusters, clusters.quality("shards").classes)
    """

    def __init__(self, clusters: FeatureClusters, encoder: Encoder) -> None:
        self.clusters = clusters
        self.encoder = encoder

    def __fspath__(self) -> str:
        return fspath(self.folder)

    @property
    def folder(self) -> Path:
        """The folder that they were read from."""
        assert self.clusters.folder is not None, "clusters that were opened have a folder"
        return self.clusters.folder

    @classmethod
    def load(cls, path: AnyPath, device: str = "cpu") -> "Clusters":
        """Read a clusters folder, or the copy in a run folder.

        Raises:
            ArtefactError: it is neither, or damaged.
        """
        folder = as_path(path)
        if FeatureClusters.recognises(folder / CLUSTERS):
            folder = folder / CLUSTERS
        clusters = FeatureClusters.open(folder)
        check_encoder(folder, clusters.encoder_fingerprint, clusters.files)
        return cls(clusters, load_encoder(folder / ENCODER, torch.device(device)))

    def assign(self, images: Iterable[AnyImage] | NDArray[np.floating] | Tensor) -> NDArray[np.int64]:
        """The cluster of every image, [N].

        Args:
            images: paths or Pillow images; or features [N, D] in the form that the encoder returns (not centred, not
                normalised).

        Raises:
            DataError: a single image is given instead of a list, or something other than images; an image cannot be
                read, or features have another width or are not finite.
        """
        if isinstance(images, Tensor):
            images = images.detach().float().cpu().numpy()
        features_ND = images if isinstance(images, np.ndarray) else self.features(images)
        # Features of the pre-training set are stored as float16, so these are rounded in the same way.
        return self.clusters.assign(features_ND.astype(np.float16).astype(np.float32))

    def quality(self, shards: AnyPath | None = None) -> ClusterReport:
        """The sizes and the tightness of the clusters, as `moce cluster` prints them.

        Args:
            shards: the shard set that was clustered, for the agreement of the clusters with its classes.

        Raises:
            ArtefactError, DataError: the clusters or the shard set are damaged.
        """
        from moce_ds.clustering.build import measured_clusters  # with what the clustering needs

        if shards is None:
            return measured_clusters(self.folder)[1]
        images = ShardSet.open(as_path(shards))
        return measured_clusters(self.folder, images.labels, images.classes)[1]

    def features(self, images: Iterable[AnyImage]) -> NDArray[np.float32]:
        """The encoder's features, [N, D]; decoded by Pillow, while `moce select` uses DALI. Raises DataError."""
        device, listed = next(self.encoder.model.parameters()).device, listed_images(images)
        parts = [np.zeros((0, self.encoder.shape.width), np.float32)]
        for start in range(0, len(listed), _BATCH):
            batch_BCHW = pixels_of(listed[start : start + _BATCH], self.encoder.input)
            parts.append(self.encoder.features(batch_BCHW.to(device)).cpu().numpy())
        return np.concatenate(parts)


def pixels_of(images: Iterable[AnyImage], input: ImageInput) -> Tensor:
    """Images as a model sees them in evaluation, [B, 3, H, W] float32, normalised. Raises DataError."""
    parts = [torch.zeros(0, 3, input.size, input.size), *(_pixels(image, input)[None] for image in images)]
    return torch.cat(parts)


def listed_images(images: Iterable[AnyImage]) -> list[AnyImage]:
    """Several images. Raises DataError for a single one."""
    if isinstance(images, str | PathLike | Image.Image):
        raise DataError(f"Got the single image {images!r}: expected a list of images, such as [{images!r}].")
    return list(images)


def _pixels(image: AnyImage, input: ImageInput) -> Tensor:
    """The centre crop of evaluation, resized and normalised, [3, H, W]. Raises DataError."""
    if isinstance(image, Image.Image):
        try:
            rgb = to_rgb(image)
        except DECODER_FAULTS as fault:
            raise DataError(f"{image!r} cannot be decoded ({fault_text(fault)}).") from None
    elif not isinstance(image, str | PathLike):
        raise DataError(f"Got an image of type {type(image).__name__}: expected a path or a Pillow image.")
    else:
        verdict = examine(Path(image))
        if isinstance(verdict, Rejected):
            raise DataError(f"{image} is not a readable image: {verdict.reason} ({verdict.detail}).")
        rgb = decoded(verdict.data, (verdict.width, verdict.height), str(image))
    none, size = np.zeros(1, np.int64), (np.array([rgb.height], np.int32), np.array([rgb.width], np.int32))
    window = CenterCrop(input.center_crop).windows(none, none, *size)
    (top, left), (height, width) = window.start_B2[0].tolist(), window.shape_B2[0].tolist()
    cut = rgb.crop((left, top, left + width, top + height)).resize((input.size,) * 2, Image.Resampling.BICUBIC)
    pixels_HWC = np.asarray(cut, np.float32) / 255
    normal_HWC = (pixels_HWC - np.array(input.mean, np.float32)) / np.array(input.std, np.float32)
    return torch.from_numpy(normal_HWC).permute(2, 0, 1)
