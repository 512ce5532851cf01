"""`moce detect`: trains a detector of objects with boxes and masks on a set in COCO's format.

The model is Mask R-CNN on the simple feature pyramid: torchvision's detector with the heads of ViTDet.

Axes: B images of a micro-batch of one process, N objects of an image, H x W pixels of the canvas (in) or of the image
(out).
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.compat import supply_torchvision_operators
from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.host.program import shared_progress
from moce_ds.common.storage.files import sha256_of
from moce_ds.data.scale_jitter import Jitter, View, draw_image, draw_mask
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.coco_api import average_precision, pack
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.vit import Encoder
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.dense import DenseTask, build, evaluation
from moce_ds.tuning.labelled_task import Measures, prepared
from moce_ds.tuning.pyramid import Normalise, SimpleFeaturePyramid
from moce_ds.tuning.settings import DetectDataSettings, DetectorSettings, TuneOptimSettings

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


class DetectionTask(DenseTask[CocoSet]):
    """Mask R-CNN around an encoder, for `tune`; see `moce_ds.tuning.labelled_task.LabelledTask`.

    Raises:
        ArtefactError, ConfigError, DataError: the encoder, the settings or a set is invalid.
    """

    def __init__(
        self,
        data: DetectDataSettings,
        detector: DetectorSettings,
        optim: TuneOptimSettings,
        engine: EngineSettings,
        run: RunSettings,
    ) -> None:
        self._side = detector.image_size
        train = CocoSet.open(data.train, data.images, data.max_pixels)
        self._numbers = train.with_objects
        if not self._numbers:
            raise DataError(f"{data.train} has no annotation to learn from; expected at least one that is not a crowd.")
        val, test = (open_like(train, path, data.eval_images or data.images) for path in (data.val, data.test))
        self._jitter = Jitter(self._side, data.scale, "longer", run.seed, data.flip)
        classes = len(train.categories)
        encoder, model = build(data.encoder, run.seed, engine, lambda found: build_detector(found, detector, classes))
        super().__init__(
            model, train, val, test, optim=optim, workers=data.workers, precision=engine.precision, out=run.out
        )
        self._mean = encoder.input.mean
        self.count = len(self._numbers)
        self.fingerprint = hashlib.sha256(
            (sha256_of(data.train) + encoder.fingerprint + _without_pixels(train)).encode()
        ).hexdigest()
        self.criterion = "box_ap" if val else None

    def batch(
        self, ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Canvases, and the objects on each. Raises DataError."""
        examples = []
        for number, epoch in zip((self._numbers[i] for i in ids_B), epochs_B, strict=True):
            listed = self.train.images[number]
            view = self._jitter.view((listed.width, listed.height), int(epoch), number)
            examples.append(training_example(self.train, number, view, self._side, self._mean))
        return [image for image, _ in examples], [target for _, target in examples]

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
        """The sum of the losses of proposals, classes, boxes and masks."""
        device = next(self.model.parameters()).device
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [{name: t.to(device, non_blocking=True) for name, t in target.items()} for target in batch[1]]
        return torch.stack(list(model(images, targets).values())).sum()

    def check_data(self, runtime: Runtime) -> None:
        """Warn of skipped objects, then read every image; a collective. Raises DataError."""
        for data in (self.train, self.val, self.test):
            if data is not None and data.warning:
                runtime.warn(data.warning)
        super().check_data(runtime)

    def looked_at(self, seen: Iterable[None], runtime: Runtime) -> None:
        """Read all images; there is nothing else to check. A collective."""
        with runtime.raise_on_all_ranks():
            deque(seen, maxlen=0)

    def measured(self, model: nn.Module, data: CocoSet, runtime: Runtime) -> Measures:
        """Average precision on a set, whose images the processes share; a collective."""
        views = [whole_view((image.width, image.height), self._side) for image in data.images]
        mine = range(runtime.rank, len(data), runtime.world_size)
        found: list[dict[str, Any]] = []

        def canvas(number: int) -> Tensor:
            return draw_image(data.image(number), views[number], self._side, self._mean)

        with evaluation(self.precision, runtime):
            stream = prepared(canvas, mine, self.workers, runtime.device)
            canvases = shared_progress(stream, len(mine), len(data), "detecting", unit="img", leave=False)
            for number, image_CHW in zip(mine, canvases, strict=True):
                (detections,) = model([image_CHW.to(runtime.device)])
                found += results(data, number, views[number], detections)
        everyone = [one for text in runtime.texts(json.dumps(found)) for one in json.loads(text)]
        return average_precision(data.truth, everyone)


def _without_pixels(train: CocoSet) -> str:
    """The images that are skipped because none of their objects has pixels, for the fingerprint.

    Earlier versions trained on these images, so their runs can resume only if there are none: otherwise the images of
    each step would differ.
    """
    some = {n for n, objects in enumerate(train.objects) if not all(thing.iscrowd for thing in objects)}
    left_out = sorted(some - set(train.with_objects))
    return json.dumps(left_out) if left_out else ""


def open_like(train: CocoSet, path: Path | None, folder: Path) -> CocoSet | None:
    """A split for measuring, with the categories of `train`; None without a `path`.

    Raises:
        DataError: its categories differ, or it has no objects.
    """
    if path is None:
        return None
    other = CocoSet.open(path, folder, train.max_pixels)
    if other.categories != train.categories:
        raise DataError(
            f"{path} has the categories {other.categories}; those of {train.path} are {train.categories}. They must be "
            "the same, ids and names."
        )
    if not other.with_objects:
        raise DataError(f"{path} has no annotation to evaluate on; expected at least one that is not a crowd.")
    return other


class Canvases(nn.Module):
    """Replaces the resizing of torchvision's detector: images are canvases already and are only normalised.

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
        """Return boxes in pixels of the canvas, and masks relative to their boxes; see `results`."""
        return found


def build_detector(encoder: Encoder, config: DetectorSettings, classes: int) -> MaskRCNN:
    """Mask R-CNN with ViTDet's heads for `classes` classes; label 0 of the model is the background.

    Raises:
        ConfigError: image size, window and patches do not match, or the patch size is not a power of two.
    """
    if encoder.shape.patch_size & (encoder.shape.patch_size - 1):
        raise ConfigError(
            f"The encoder's patches have {encoder.shape.patch_size} pixels; torchvision's detectors need maps whose "
            "stride is a power of two: patches of 8, 16 or 32."
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
    """Image number `number` on a canvas, and the objects that the detector must find: boxes, labels from 1, masks.

    Objects outside the view are omitted; boxes enclose the visible part of the masks. Raises DataError.
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
    """The detections of an image in the format of pycocotools, in pixels of the image.

    Args:
        found: the detections on the canvas that shows the image as `view`.
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
