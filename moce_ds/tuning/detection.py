"""`moce detect`: objects, their boxes and masks, learnt from a set in COCO's format.

Axes: B images of a micro-batch of one process.
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
from moce_ds.data.canvas import Jitter, draw_image
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.coco_api import average_precision
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import DataError
from moce_ds.storage.files import sha256_of
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.dense import DenseTask, build, evaluation
from moce_ds.tuning.dense_settings import DetectDataSettings, DetectorSettings
from moce_ds.tuning.detector import (
    build_detector,
    results,
    training_example,
    whole_view,
)
from moce_ds.tuning.feed import prepared
from moce_ds.tuning.settings import TuneOptimSettings
from moce_ds.tuning.task import Measures


class DetectionTask(DenseTask[CocoSet]):
    """Mask R-CNN around an encoder, for `tune`; see `moce_ds.tuning.task.LabelledTask`.

    Raises:
        ArtefactError, ConfigError, DataError: encoder, settings or a set are refused.
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
            raise DataError(f"{data.train} has no annotation to learn from; expected one at least that is no crowd.")
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
        """Tell which objects are left out, and read every image; a collective. Raises DataError."""
        for data in (self.train, self.val, self.test):
            if data is not None and data.warning:
                runtime.warn(data.warning)
        super().check_data(runtime)

    def looked_at(self, seen: Iterable[None], runtime: Runtime) -> None:
        """Nothing more to see to; a collective."""
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
            for number, image_CHW in zip(mine, stream, strict=True):
                (detections,) = model([image_CHW.to(runtime.device)])
                found += results(data, number, views[number], detections)
        everyone = [one for text in runtime.texts(json.dumps(found)) for one in json.loads(text)]
        return average_precision(data.truth, everyone)


def _without_pixels(train: CocoSet) -> str:
    """Which images are left out because none of their objects has pixels. Earlier versions learned from these too, so
    their runs go on only where there are none: the images of a step would be others."""
    some = {n for n, objects in enumerate(train.objects) if not all(thing.iscrowd for thing in objects)}
    left_out = sorted(some - set(train.with_objects))
    return json.dumps(left_out) if left_out else ""


def open_like(train: CocoSet, path: Path | None, folder: Path) -> CocoSet | None:
    """Another split, to measure on, of the same categories.

    Raises:
        DataError: they differ, or there is nothing to find.
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
        raise DataError(f"{path} has no annotation to measure by; expected one at least that is no crowd.")
    return other
