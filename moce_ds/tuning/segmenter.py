"""UperNet on the simple feature pyramid: transformers' head, and the mean intersection over union.

Axes: B images, K classes, C channels, H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moce_ds.compat import repair_torchvision
from moce_ds.data.sources.ade20k import IGNORED
from moce_ds.errors import ConfigError
from moce_ds.models.vit import Encoder
from moce_ds.tuning.dense_settings import SegmenterSettings
from moce_ds.tuning.pyramid import Normalise, SimpleFeaturePyramid

repair_torchvision()
from timm.layers import LayerNorm2d  # noqa: E402  (needs the repair)

try:
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetHead
except ImportError:
    raise ConfigError("Segmentation needs the package transformers: pip install 'moce-ds[dense]'.") from None


class Segmenter(nn.Module):
    """Logits of K classes for every pixel of canvases in [0, 1].

    The head's BatchNorm layers become LayerNorm, as in the pyramid: they would need many images in every process.

    Raises:
        ConfigError: image size, window and patches do not go together.
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
    """Mean cross-entropy of the pixels that have a class; 0 where none has."""
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
    """Where canvases of `side` begin that cover `length` evenly and overlap by a third of a side at least."""
    steps = -(-(length - side) // (side - side // 3))
    return [round(n * (length - side) / steps) for n in range(steps + 1)] if steps else [0]


def confusion(predicted_HW: Tensor, labels_HW: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class, [K, K] int64; pixels without a class are left out."""
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
