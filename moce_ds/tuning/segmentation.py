"""`moce segment`: trains a model that predicts the class of every pixel, on a set in ADE20K's format.

The model is UperNet on the simple feature pyramid, with transformers' head.

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
from moce_ds.common.compat import repair_torchvision
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.program import shared_progress
from moce_ds.data.scale_jitter import Jitter, draw_image, draw_mask
from moce_ds.data.sources.ade20k import IGNORED, Ade20kSet, Colour, Palettes
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.vit import Encoder
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.dense import DenseTask, build, evaluation
from moce_ds.tuning.labelled_task import Measures, prepared
from moce_ds.tuning.pyramid import Normalise, SimpleFeaturePyramid
from moce_ds.tuning.settings import SegmentDataSettings, SegmenterSettings, TuneOptimSettings

repair_torchvision()
from timm.layers import LayerNorm2d  # noqa: E402  (needs the repair)

try:
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetHead
except ImportError:
    raise ConfigError("Segmentation needs the package transformers: pip install 'moce-ds[dense]'.") from None


class SegmentationTask(DenseTask[Ade20kSet]):
    """UperNet around an encoder, for `tune`; see `moce_ds.tuning.labelled_task.LabelledTask`.

    Raises:
        ArtefactError, ConfigError, DataError: the encoder, the settings or a set is invalid.
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
        """Check that the palettes of all images of a split agree; a collective. Raises DataError."""
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
            stream = prepared(example, mine, self.workers, runtime.device)
            for image_CHW, labels_HW in shared_progress(
                stream, len(mine), len(data), "segmenting", unit="img", leave=False
            ):
                logits_KHW = slide(model, image_CHW.to(runtime.device), self._side, data.classes)
                logits_1KHW = F.interpolate(logits_KHW[None], labels_HW.shape, mode="bilinear", align_corners=False)
                counts_KK += confusion(logits_1KHW[0].argmax(0).cpu(), labels_HW, data.classes)
        total = runtime.sum(counts_KK.double().flatten().tolist())
        return segmentation_scores(torch.tensor(total, dtype=torch.float64).reshape_as(counts_KK))


def _opened(folder: Path | None, data: SegmentDataSettings) -> Ade20kSet | None:
    """The split in `folder`; None without one. Raises DataError."""
    if folder is None:
        return None
    return Ade20kSet.open(folder, data.classes, data.reduce_zero_label, data.max_pixels)


def fitted(image: Image.Image, side: int) -> Tensor:
    """An image, resized so that its shorter side is that of the canvas, [3, H, W] in [0, 1]."""
    width, height = (max(side, round(length * side / min(image.size))) for length in image.size)
    pixels_HWC = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))
    return pixels_HWC.permute(2, 0, 1).float() / 255


class Segmenter(nn.Module):
    """Logits of K classes for every pixel of canvases in [0, 1].

    The head's BatchNorm layers become LayerNorm, as in the pyramid: they would need many images in every process.

    Raises:
        ConfigError: image size, window and patches do not match.
    """

    def __init__(self, encoder: Encoder, config: SegmenterSettings, classes: int) -> None:
        super().__init__()
        self.backbone = SimpleFeaturePyramid(encoder, config)
        options = UperNetConfig(hidden_size=config.hidden)
        options.num_labels = classes
        self.head = UperNetHead(options, [config.channels] * 4)
        for module in self.head.modules():
            if isinstance(module, UperNetConvModule):
                module.batch_norm = LayerNorm2d(module.conv.out_channels)
        self.normalise = Normalise(encoder)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, K, H, W]."""
        maps = self.backbone(self.normalise(images_BCHW))
        logits_BKhw = self.head(list(maps.values()))
        return F.interpolate(logits_BKhw, images_BCHW.shape[2:], mode="bilinear", align_corners=False)


def pixel_loss(logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels with a class; 0 if there are none."""
    total = F.cross_entropy(logits_BKHW.float(), labels_BHW.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels_BHW != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def slide(model: nn.Module, image_CHW: Tensor, side: int, classes: int) -> Tensor:
    """Logits [K, H, W] of an image of any size: the means over canvases that cover it and overlap by a third.

    Neither side of the image may be shorter than a canvas.
    """
    _, height, width = image_CHW.shape
    logits_KHW = image_CHW.new_zeros((classes, height, width))
    count_HW = image_CHW.new_zeros((height, width))
    for top in starts(height, side):
        for left in starts(width, side):
            part = (slice(top, top + side), slice(left, left + side))
            logits_KHW[(slice(None), *part)] += model(image_CHW[(None, slice(None), *part)])[0].float()
            count_HW[part] += 1
    return logits_KHW / count_HW


def starts(length: int, side: int) -> list[int]:
    """First pixels of canvases of `side` that cover `length` evenly and overlap by at least a third of a side."""
    steps = -(-(length - side) // (side - side // 3))
    return [round(n * (length - side) / steps) for n in range(steps + 1)] if steps else [0]


def confusion(predicted_HW: Tensor, labels_HW: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class, [K, K] int64, without pixels that have no class."""
    counted = labels_HW != IGNORED
    pairs = labels_HW[counted].long() * classes + predicted_HW[counted].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def segmentation_scores(confusion_KK: Tensor) -> dict[str, float]:
    """miou: mean intersection over union of the classes that occur, in truth or prediction; accuracy: of pixels."""
    hits_K = confusion_KK.diagonal().double()
    union_K = confusion_KK.sum(0) + confusion_KK.sum(1) - hits_K
    there_K = union_K > 0
    return {
        "miou": float((hits_K[there_K] / union_K[there_K]).mean()) if there_K.any() else 0.0,
        "accuracy": float(hits_K.sum() / confusion_KK.sum().clamp(min=1)),
    }
