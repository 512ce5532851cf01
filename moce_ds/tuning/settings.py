"""The settings that every tuning verb has; each adds its own.

As in pre-training, everything but `engine` and `run` defines the experiment, except for keys marked `may_change`.
"""

import dataclasses
from typing import Annotated

from pydantic import Field

from moce_ds.config import option, settings
from moce_ds.training.settings import Beta, EngineSettings, NonNegative, OptimSettings, Positive, RunSettings

LayerDecay = Annotated[float, Field(gt=0, le=1)]


@settings
class TuneOptimSettings(OptimSettings):
    """Pre-training's, with the defaults of MAE's fine-tuning of a ViT-B on ImageNet."""

    epochs: Annotated[float, Field(gt=0)] = option(100, "passes over the training images")
    batch_size: Positive = option(256, "images in a step, over all processes")
    base_lr: Annotated[float, Field(gt=0)] = option(5e-4, "learning rate of the head per 256 images")
    min_lr: NonNegative = option(1e-6, "learning rate at the end")
    warmup_epochs: NonNegative = option(5, "epochs of linear warm-up")
    betas: tuple[Beta, Beta] = option((0.9, 0.999), "AdamW betas")
    layer_decay: LayerDecay = option(0.65, "learning rate of a block over that of the next one; 1: all alike")
    ema: Annotated[float, Field(ge=0, lt=1)] = option(0.0, "decay of a running average of the weights; 0: none")
    validate_every: Annotated[float, Field(gt=0)] = option(
        5, "epochs between validations, where there is a validation split; the best weights are kept"
    )


@settings
class TuneDataSettings:
    workers: Annotated[int, Field(ge=0)] = option(2, "processes that prepare images for each process", may_change=True)


@settings
class TuneSettings:
    """What `tune` reads; `data` is the task's own."""

    data: TuneDataSettings
    optim: TuneOptimSettings = dataclasses.field(default_factory=TuneOptimSettings)
    engine: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    run: RunSettings
