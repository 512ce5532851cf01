"""The common settings of tuning verbs (`TuneSettings`), and those of `moce finetune`, `detect` and `segment`.

As in pre-training, everything but `engine` and `run` defines the experiment, except for keys marked `may_change`. This
module imports no package of the verbs, so `--help` answers at once.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.config.settings import (
    Beta,
    CropShare,
    NonNegative,
    OpenShare,
    Positive,
    PositiveFloat,
    Share,
    option,
    settings,
)
from moce_ds.data.image_file import MAX_PIXELS
from moce_ds.evaluation.settings import Metric
from moce_ds.training.settings import EngineSettings, OptimSettings

LayerDecay = Annotated[float, Field(gt=0, le=1)]
RandAugment = Annotated[str, Field(pattern=r"^rand(-(m|n|p|mstd|mmax|inc|w|t)\d+(\.\d+)?)*$")]
SmallShare = Annotated[float, Field(ge=0, lt=1)]


@settings
class TuneOptimSettings(OptimSettings):
    """The settings of pre-training, with the defaults of MAE's fine-tuning of a ViT-B on ImageNet."""

    epochs: PositiveFloat = option(100, "passes over the training images")
    batch_size: Positive = option(256, "images per step over all processes")
    base_lr: PositiveFloat = option(5e-4, "learning rate of the head per 256 images")
    min_lr: NonNegative = option(1e-6, "final learning rate")
    warmup_epochs: NonNegative = option(5, "epochs of linear warm-up")
    betas: tuple[Beta, Beta] = option((0.9, 0.999), "AdamW betas")
    layer_decay: LayerDecay = option(0.65, "ratio of the learning rates of consecutive blocks; 1: all equal")
    ema: SmallShare = option(0.0, "decay of a running average of the weights; 0: none")
    validate_every: PositiveFloat = option(
        5, "epochs between validations, if there is a validation split; the best weights are kept"
    )


@settings
class TuneDataSettings:
    workers: Annotated[int, Field(ge=0)] = option(2, "data workers per process", may_change=True)


@settings
class TuneSettings:
    """The settings that `tune` reads; each task has its own `data`."""

    data: TuneDataSettings
    optim: TuneOptimSettings = dataclasses.field(default_factory=TuneOptimSettings)
    engine: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    run: RunSettings


@settings
class FinetuneDataSettings(TuneDataSettings):
    encoder: Path = option(help="ENCODER of the command line")
    train: Path = option(help="--train of the command line")
    test: Path = option(help="--test of the command line")
    val: Path | None = option(None, "--val of the command line, if it is a folder")
    val_share: OpenShare | None = option(None, "--val of the command line, if it is a share of the training images")
    metric: Metric | None = option(
        None, "metric for the best weights: top1, mean_per_class, map11; null: top1, or map11 with several labels"
    )
    image_size: Positive | None = option(None, "side of an input image; null: the encoder's")

    def __post_init__(self) -> None:
        if self.val is not None and self.val_share is not None:
            raise ValueError("data.val_share: data.val is given too; expected one of the two")


@settings
class AugmentSettings:
    crop_scale: tuple[CropShare, CropShare] = option((0.08, 1.0), "area of a random crop")
    flip: bool = option(True, "flip images at random")
    rand_augment: RandAugment | None = option("rand-m9-mstd0.5-inc1", "RandAugment in timm's notation; null: none")
    color_jitter: NonNegative = option(0.0, "strength of colour jitter, without RandAugment")
    erase: Share = option(0.25, "probability of erasing a rectangle")
    mixup: NonNegative = option(0.8, "alpha of mixup; 0: none")
    cutmix: NonNegative = option(1.0, "alpha of cutmix; 0: none; with both, one of them at random")
    smoothing: SmallShare = option(0.1, "label smoothing")
    drop_path: SmallShare = option(0.1, "stochastic depth: drop probability of the last block; 0 for the first")

    def __post_init__(self) -> None:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"augment.crop_scale: {list(self.crop_scale)}; expected [low, high]")


@settings
class FinetuneSettings(TuneSettings):
    """Settings of `moce finetune`."""

    data: FinetuneDataSettings
    augment: AugmentSettings = dataclasses.field(default_factory=AugmentSettings)


@settings
class BackboneSettings:
    image_size: Positive = option(1024, "side of the encoder's square input, pixels")
    channels: Positive = option(256, "channels of the feature pyramid")
    window: Annotated[int, Field(ge=0)] = option(
        0, "tokens along an attention window, except for four global blocks; 0: all blocks are global"
    )
    drop_path: SmallShare = option(0.1, "stochastic depth: drop probability of the last block")
    frozen: bool = option(False, "train only the pyramid and the heads")


@settings
class DenseDataSettings(TuneDataSettings):
    encoder: Path = option(help="encoder folder from `moce export`, a dense run, or a .pth file of the public MAE")
    val: Path | None = option(None, "validation split, in the format of data.train, for the best weights")
    test: Path | None = option(None, "split of the final measures; null: the validation split")
    scale: tuple[PositiveFloat, PositiveFloat] = option(
        (0.5, 2.0), "size of an image in training relative to the canvas"
    )
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
            raise ValueError("data.val, data.test: give at least one of them, to evaluate the model")


@settings
class DetectorSettings(BackboneSettings):
    proposals: Positive = option(1000, "proposals per image")
    samples: Positive = option(512, "proposals per image that train the heads")
    anchor: PositiveFloat = option(8.0, "side of an anchor relative to the stride of its map")
    least_score: SmallShare = option(0.05, "minimum score of a detection")


@settings
class DetectDataSettings(DenseDataSettings):
    train: Path = option(help="COCO's JSON of the training images")
    images: Path = option(help="folder of the training images")
    eval_images: Path | None = option(
        None, "folder of the validation and test images; null: that of the training images"
    )
    scale: tuple[PositiveFloat, PositiveFloat] = option(
        (0.1, 2.0), "size of an image in training relative to the canvas"
    )


@settings
class DetectOptimSettings(TuneOptimSettings):
    """The defaults of ViTDet for a ViT-B on COCO."""

    batch_size: Positive = option(64, "images per step over all processes")
    base_lr: PositiveFloat = option(4e-4, "learning rate of the head per 256 images")
    warmup_epochs: NonNegative = option(0.15, "epochs of linear warm-up")
    weight_decay: NonNegative = option(0.1, "AdamW weight decay, on matrices only")
    layer_decay: LayerDecay = option(0.7, "ratio of the learning rates of consecutive blocks; 1: all equal")


@settings
class DetectSettings(DenseSettings):
    """Settings of `moce detect`."""

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

    epochs: PositiveFloat = option(127, "passes over the training images")
    batch_size: Positive = option(16, "images per step over all processes")
    base_lr: PositiveFloat = option(1.6e-3, "learning rate of the head per 256 images")
    warmup_epochs: NonNegative = option(1.2, "epochs of linear warm-up")
    layer_decay: LayerDecay = option(0.65, "ratio of the learning rates of consecutive blocks; 1: all equal")


@settings
class SegmentSettings(DenseSettings):
    """Settings of `moce segment`."""

    data: SegmentDataSettings
    model: SegmenterSettings = dataclasses.field(default_factory=SegmenterSettings)
    optim: SegmentOptimSettings = dataclasses.field(default_factory=SegmentOptimSettings)
