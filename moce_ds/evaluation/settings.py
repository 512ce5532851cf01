"""The settings of `moce knn` and `moce probe`, and the metrics that there are."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moce_ds.config.settings import option, settings
from moce_ds.models.encode_settings import EncodeSettings

Metric = Literal["top1", "mean_per_class", "map11"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


@settings
class KnnSettings(EncodeSettings):
    """The vote of the nearest training images."""

    k: PositiveInt = option(20, "neighbours that vote; all training images where there are fewer")
    temperature: Annotated[float, Field(gt=0)] = option(0.07, "of the vote; smaller: the nearest ones weigh more")


@settings
class LarsSettings:
    """How the classifier of MAE's recipe is trained."""

    base_lr: list[Annotated[float, Field(gt=0)]] = option(
        [0.1, 1.0, 10.0, 30.0, 100.0],
        "learning rates per 256 images to choose from; MAE's on ImageNet is 0.1",
        min_length=1,
    )
    epochs: PositiveInt = option(90, "passes over the training images")
    warmup_epochs: Annotated[float, Field(ge=0)] = option(10.0, "epochs of linear warm-up")
    batch_size: Annotated[int, Field(ge=2)] = option(256, "images a step (MAE: 16384, of 1.28 million)")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "of LARS")
    weight_decay: Annotated[float, Field(ge=0)] = option(0.0, "of LARS")


@settings
class ProbeSettings(EncodeSettings):
    """Which linear classifier, and among which strengths to choose."""

    method: Literal["logistic", "lars", "closed_form"] = option(
        "logistic", "logistic regression; lars: MAE's recipe; closed_form: ridge regression, the fastest"
    )
    l2: list[Positive] = option(
        [1.0, 1e-1, 1e-2, 1e-3, 1e-4], "regularisations to choose from (logistic, closed_form)", min_length=1
    )
    lars: LarsSettings = option(LarsSettings(), "training by LARS")
    validation_share: Share = option(0.2, "training images that choose, where there is no split for validation")
    seed: Seed = option(0, "of that share, and of the order of training by LARS")
