"""The settings of `moce detect` and `moce segment`, without the packages that these need, so that --help does not."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moce_ds.config.settings import NonNegative, Positive, option, settings
from moce_ds.data.image_file import MAX_PIXELS
from moce_ds.tuning.settings import LayerDecay, TuneDataSettings, TuneOptimSettings, TuneSettings

Scale = Annotated[float, Field(gt=0)]


@settings
class BackboneSettings:
    image_size: Positive = option(1024, "side of the encoder's square input, pixels")
    channels: Positive = option(256, "channels of the feature pyramid")
    window: Annotated[int, Field(ge=0)] = option(
        0, "tokens along an attention window, except for four global blocks; 0: all blocks are global"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = option(0.1, "stochastic depth: drop probability of the last block")
    frozen: bool = option(False, "train only the pyramid and the heads")


@settings
class DenseDataSettings(TuneDataSettings):
    encoder: Path = option(help="encoder folder from `moce export`, a dense run, or a .pth file of the public MAE")
    val: Path | None = option(None, "validation split, in the format of data.train, for the best weights")
    test: Path | None = option(None, "split of the final measures; null: the validation split")
    scale: tuple[Scale, Scale] = option((0.5, 2.0), "size of an image in training relative to the canvas")
    flip: bool = option(True, "mirror images at random")
    max_pixels: Positive = option(
        MAX_PIXELS, "maximum pixels of an image; a larger one may be a decompression bomb", may_change=True
    )

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"data.scale: {list(self.scale)}; expected [low, high]")


@settings
class DenseSettings(TuneSettings):
    data: DenseDataSettings
    optim: TuneOptimSettings

    def __post_init__(self) -> None:
        if self.data.val is None and self.data.test is None:
            raise ValueError("data.val, data.test: give one of them at least, to measure what has been learnt")


@settings
class DetectorSettings(BackboneSettings):
    proposals: Positive = option(1000, "proposals per image")
    samples: Positive = option(512, "proposals per image that train the heads")
    anchor: Annotated[float, Field(gt=0)] = option(8.0, "side of an anchor relative to the stride of its map")
    least_score: Annotated[float, Field(ge=0, lt=1)] = option(0.05, "minimum score of a detection")


@settings
class DetectDataSettings(DenseDataSettings):
    train: Path = option(help="COCO's JSON of the training images")
    images: Path = option(help="folder of the training images")
    eval_images: Path | None = option(
        None, "folder of the validation and test images; null: that of the training images"
    )
    scale: tuple[Scale, Scale] = option((0.1, 2.0), "size of an image in training relative to the canvas")


@settings
class DetectOptimSettings(TuneOptimSettings):
    """The defaults of ViTDet for a ViT-B on COCO."""

    batch_size: Positive = option(64, "images per step over all processes")
    base_lr: Annotated[float, Field(gt=0)] = option(4e-4, "learning rate of the head per 256 images")
    warmup_epochs: NonNegative = option(0.15, "epochs of linear warm-up")
    weight_decay: NonNegative = option(0.1, "AdamW weight decay, on matrices only")
    layer_decay: LayerDecay = option(0.7, "ratio of the learning rates of consecutive blocks; 1: all equal")


@settings
class DetectSettings(DenseSettings):
    """All settings of a run."""

    data: DetectDataSettings
    model: DetectorSettings = dataclasses.field(default_factory=DetectorSettings)
    optim: DetectOptimSettings = dataclasses.field(default_factory=DetectOptimSettings)


@settings
class SegmenterSettings(BackboneSettings):
    image_size: Positive = option(512, "side of the encoder's square input, pixels")
    hidden: Positive = option(512, "channels of the head")


@settings
class SegmentDataSettings(DenseDataSettings):
    train: Path = option(
        help="training split: a folder with images/ and annotations/, or images/NAME of ADE20K's release"
    )
    classes: Annotated[int, Field(ge=2, le=255)] = option(150, "classes, K")
    reduce_zero_label: bool = option(
        True, "true: classes are 1 to K, 0 is ignored; false: classes are 0 to K - 1, 255 is ignored"
    )


@settings
class SegmentOptimSettings(TuneOptimSettings):
    """The defaults of MAE's segmentation with a ViT-B on ADE20K."""

    epochs: Annotated[float, Field(gt=0)] = option(127, "passes over the training images")
    batch_size: Positive = option(16, "images per step over all processes")
    base_lr: Annotated[float, Field(gt=0)] = option(1.6e-3, "learning rate of the head per 256 images")
    warmup_epochs: NonNegative = option(1.2, "epochs of linear warm-up")
    layer_decay: LayerDecay = option(0.65, "ratio of the learning rates of consecutive blocks; 1: all equal")


@settings
class SegmentSettings(DenseSettings):
    """All settings of a run."""

    data: SegmentDataSettings
    model: SegmenterSettings = dataclasses.field(default_factory=SegmenterSettings)
    optim: SegmentOptimSettings = dataclasses.field(default_factory=SegmentOptimSettings)
