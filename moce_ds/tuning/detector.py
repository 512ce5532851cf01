"""Mask R-CNN on the simple feature pyramid: torchvision's detector with the heads of ViTDet, its examples and results.

Axes: B images, N objects of an image, H x W pixels of the canvas (in) or of the image (out).
"""

from typing import Any

import torch
from torch import Tensor, nn

from moce_ds.compat import supply_torchvision_operators
from moce_ds.data.canvas import View, draw_image, draw_mask
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.coco_api import pack
from moce_ds.errors import ConfigError
from moce_ds.models.vit import Encoder
from moce_ds.tuning.dense_settings import DetectorSettings
from moce_ds.tuning.pyramid import Normalise, SimpleFeaturePyramid

supply_torchvision_operators()
from timm.layers import LayerNorm2d  # noqa: E402  (needs the operators)
from torchvision.models.detection import MaskRCNN  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor  # noqa: E402
from torchvision.models.detection.roi_heads import paste_masks_in_image  # noqa: E402
from torchvision.models.detection.rpn import RPNHead  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

_LEVELS = ["0", "1", "2", "3"]
_HIDDEN = 1024  # of the box head
_SAMPLES = 2  # of RoIAlign, along each side of a bin


class Canvases(nn.Module):
    """Takes the place of the detector's own resizing: images come as canvases, and are only normalised.

    torchvision infers the strides of the maps from the size of the images before padding, which would be wrong here.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.normalise = Normalise(encoder)

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """Images [3, H, W] in [0, 1] as one batch."""
        images_BCHW = self.normalise(torch.stack(images))
        return ImageList(images_BCHW, [(images_BCHW.shape[2], images_BCHW.shape[3])] * len(images)), targets

    def postprocess(self, found: list[dict[str, Tensor]], *sizes: Any) -> list[dict[str, Tensor]]:
        """Boxes stay those of the canvas, and masks those of their boxes; see `results`."""
        return found


def build_detector(encoder: Encoder, config: DetectorSettings, classes: int) -> MaskRCNN:
    """Mask R-CNN with ViTDet's heads for so many classes; label 0 of the model is the background.

    Raises:
        ConfigError: image size, window and patches do not go together, or the patch size is no power of two.
    """
    if encoder.shape.patch_size & (encoder.shape.patch_size - 1):
        raise ConfigError(
            f"The encoder's patches are of {encoder.shape.patch_size} pixels; torchvision's detectors need maps whose "
            "stride is a power of two, so patches of 8, 16 or 32."
        )
    backbone = SimpleFeaturePyramid(encoder, config, extra="max_pool")
    width = config.channels
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    detector = MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((config.anchor * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        rpn_head=RPNHead(width, 3, conv_depth=2),
        rpn_pre_nms_top_n_train=2 * config.proposals,
        rpn_pre_nms_top_n_test=config.proposals,
        rpn_post_nms_top_n_train=config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=MultiScaleRoIAlign(_LEVELS, 7, _SAMPLES),
        box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [_HIDDEN], norm_layer=LayerNorm2d),
        box_predictor=FastRCNNPredictor(_HIDDEN, classes + 1),
        box_score_thresh=config.least_score,
        box_batch_size_per_image=config.samples,
        mask_roi_pool=MultiScaleRoIAlign(_LEVELS, 14, _SAMPLES),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
    )
    detector.transform = Canvases(encoder)
    return detector


def training_example(
    data: CocoSet, number: int, view: View, side: int, mean: tuple[float, float, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Image number `number` on a canvas, and what the detector must find there: boxes, labels from 1, masks.

    Objects that the view cuts off are left out; boxes fit what is left of the masks. Raises DataError.
    """
    masks_NHW, labels, boxes = [], [], []
    for thing in data.to_learn(number):
        mask_HW = draw_mask(data.mask(number, thing), view, side, fill=0)
        rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
        if len(rows):
            masks_NHW.append(mask_HW)
            labels.append(data.labels[thing.category_id] + 1)
            boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.stack(masks_NHW) if masks_NHW else torch.zeros((0, side, side), dtype=torch.uint8),
    }
    return draw_image(data.image(number), view, side, mean), target


def whole_view(size: tuple[int, int], side: int) -> View:
    """The whole image, of `size` (width, height), its longer side that of the canvas."""
    width, height = (max(1, round(length * side / max(size))) for length in size)
    return View((0, 0, *size), width, height)


@torch.no_grad()
def results(data: CocoSet, number: int, view: View, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The detections of an image as pycocotools wants them, in pixels of the image.

    Args:
        found: what the detector has found on the canvas where the image is seen as `view`.
    """
    image = data.images[number]
    scale_4 = torch.tensor([image.width / view.width, image.height / view.height] * 2)
    limit_4 = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
    boxes_N4 = torch.minimum(found["boxes"].float().cpu() * scale_4, limit_4)
    if not len(boxes_N4):
        return []
    masks_N1HW = paste_masks_in_image(found["masks"].float().cpu(), boxes_N4, (image.height, image.width))
    packed = pack((masks_N1HW[:, 0] > 0.5).numpy())
    categories = list(data.categories)
    return [
        {
            "image_id": image.id,
            "category_id": categories[label - 1],
            "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": mask,
        }
        for (x1, y1, x2, y2), label, score, mask in zip(
            boxes_N4.tolist(), found["labels"].tolist(), found["scores"].tolist(), packed, strict=True
        )
    ]
