"""`moce segment`: a class for every pixel, learnt from a set in ADE20K's format.

Axes: B images of a micro-batch of one process, K classes, C channels, H x W pixels.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.data.canvas import Jitter, draw_image, draw_mask
from moce_ds.data.sources.ade20k import IGNORED, Ade20kSet, Colour, Palettes
from moce_ds.distributed.runtime import Runtime
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.dense import DenseTask, build, evaluation
from moce_ds.tuning.dense_settings import SegmentDataSettings, SegmenterSettings
from moce_ds.tuning.feed import prepared
from moce_ds.tuning.segmenter import Segmenter, confusion, pixel_loss, segmentation_scores, slide
from moce_ds.tuning.settings import TuneOptimSettings
from moce_ds.tuning.task import Measures


class SegmentationTask(DenseTask[Ade20kSet]):
    """UperNet around an encoder, for `tune`; see `moce_ds.tuning.task.LabelledTask`.

    Raises:
        ArtefactError, ConfigError, DataError: encoder, settings or a set are refused.
    """

    def __init__(
        self,
        data: SegmentDataSettings,
        segmenter: SegmenterSettings,
        optim: TuneOptimSettings,
        engine: EngineSettings,
        run: RunSettings,
    ) -> None:
        self._side = segmenter.image_size
        train, val, test = (_opened(folder, data) for folder in (data.train, data.val, data.test))
        assert train is not None
        self._jitter = Jitter(self._side, data.scale, "shorter", run.seed, data.flip)
        encoder, model = build(data.encoder, run.seed, engine, lambda found: Segmenter(found, segmenter, data.classes))
        super().__init__(
            model, train, val, test, optim=optim, workers=data.workers, precision=engine.precision, out=run.out
        )
        self._mean = encoder.input.mean
        self.count = len(train)
        self.fingerprint = hashlib.sha256((train.fingerprint + encoder.fingerprint).encode()).hexdigest()
        self.criterion = "miou" if val else None

    def batch(self, ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Canvases [B, 3, H, W] and the classes of their pixels [B, H, W]. Raises DataError."""
        images, labels = [], []
        for number, epoch in zip(ids_B.tolist(), epochs_B.tolist(), strict=True):
            image, classes_HW = self.train.read(number)
            view = self._jitter.view(image.size, epoch, number)
            images.append(draw_image(image, view, self._side, self._mean))
            labels.append(draw_mask(classes_HW, view, self._side, fill=IGNORED))
        return torch.stack(images), torch.stack(labels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the pixels."""
        device = next(self.model.parameters()).device
        images_BCHW, labels_BHW = (tensor.to(device, non_blocking=True) for tensor in batch)
        return pixel_loss(model(images_BCHW), labels_BHW)

    def looked_at(self, seen: Iterable[tuple[str, dict[int, Colour]]], runtime: Runtime) -> None:
        """See to it that the palettes of a split agree; a collective. Raises DataError."""
        with runtime.raise_on_all_ranks():
            mine = Palettes()
            for path, colours in seen:
                mine.add(path, colours)
        everyone = Palettes()
        for text in runtime.texts(json.dumps(list(mine.first.items()))):
            for value, (colour, path) in json.loads(text):
                everyone.add(path, {value: colour})

    def measured(self, model: nn.Module, data: Ade20kSet, runtime: Runtime) -> Measures:
        """Scores on a set, whose images the processes share; a collective."""
        counts_KK = torch.zeros((data.classes, data.classes), dtype=torch.int64)
        mine = range(runtime.rank, len(data), runtime.world_size)

        def example(number: int) -> tuple[Tensor, Tensor]:
            image, labels_HW = data.read(number)
            return fitted(image, self._side), torch.from_numpy(labels_HW)

        with evaluation(self.precision, runtime):
            for image_CHW, labels_HW in prepared(example, mine, self.workers, runtime.device):
                logits_KHW = slide(model, image_CHW.to(runtime.device), self._side, data.classes)
                logits_1KHW = F.interpolate(logits_KHW[None], labels_HW.shape, mode="bilinear", align_corners=False)
                counts_KK += confusion(logits_1KHW[0].argmax(0).cpu(), labels_HW, data.classes)
        total = runtime.sum(counts_KK.double().flatten().tolist())
        return segmentation_scores(torch.tensor(total, dtype=torch.float64).reshape_as(counts_KK))


def _opened(folder: Path | None, data: SegmentDataSettings) -> Ade20kSet | None:
    """A split, if there is one. Raises DataError."""
    if folder is None:
        return None
    return Ade20kSet.open(folder, data.classes, data.reduce_zero_label, data.max_pixels)


def fitted(image: Image.Image, side: int) -> Tensor:
    """An image with its shorter side that of the canvas, [3, H, W] in [0, 1]."""
    width, height = (max(side, round(length * side / min(image.size))) for length in image.size)
    pixels_HWC = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))
    return pixels_HWC.permute(2, 0, 1).float() / 255
