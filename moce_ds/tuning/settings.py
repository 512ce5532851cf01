"""The settings that every tuning verb has (`TuneSettings`), and those of `moce finetune`.

As in pre-training, everything but `engine` and `run` defines the experiment, except for keys marked `may_change`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.config.settings import Beta, CropShare, NonNegative, OpenShare, Positive, Share, option, settings
from moce_ds.evaluation.settings import Metric
from moce_ds.training.settings import EngineSettings, OptimSettings

LayerDecay = Annotated[float, Field(gt=0, le=1)]
RandAugment = Annotated[str, Field(pattern=r"^rand(-(m|n|p|mstd|mmax|inc|w|t)\d+(\.\d+)?)*$")]
SmallShare = Annotated[float, Field(ge=0, lt=1)]


@settings
class TuneOptimSettings(OptimSettings):
    """Pre-training's, with the defaults of MAE's fine-tuning of a ViT-B on ImageNet."""

    epochs: Annotated[float, Field(gt=0)] = option(100, "passes over the training images")
    batch_size: Positive = option(256, "images per step over all processes")
    base_lr: Annotated[float, Field(gt=0)] = option(5e-4, "learning rate of the head per 256 images")
    min_lr: NonNegative = option(1e-6, "final learning rate")
    warmup_epochs: NonNegative = option(5, "epochs of linear warm-up")
    betas: tuple[Beta, Beta] = option((0.9, 0.999), "AdamW betas")
    layer_decay: LayerDecay = option(0.65, "ratio of the learning rates of consecutive blocks; 1: all equal")
    ema: SmallShare = option(0.0, "decay of a running average of the weights; 0: none")
    validate_every: Annotated[float, Field(gt=0)] = option(
        5, "epochs between validations, if there is a validation split; the best weights are kept"
    )


@settings
class TuneDataSettings:
    workers: Annotated[int, Field(ge=0)] = option(2, "data workers per process", may_change=True)


@settings
class TuneSettings:
    """What `tune` reads; `data` is the task's own."""

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
            raise ValueError("data.val_share: there are validation images (data.val) already; expected one of the two")


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
