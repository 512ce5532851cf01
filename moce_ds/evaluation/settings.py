"""The settings of `moce knn` and `moce probe`, and the available metrics."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from moce_ds.common.config.settings import NonNegative, OpenShare, PositiveFloat, Seed, option, settings, to_tree
from moce_ds.encoders.settings import EncodeSettings

Metric = Literal["top1", "mean_per_class", "map11"]


@settings
class KnnSettings(EncodeSettings):
    """The vote of the nearest training images."""

    k: PositiveInt = option(20, "number of neighbours; at most all training images")
    temperature: PositiveFloat = option(
        0.07, "temperature of the vote; a smaller one gives the nearest neighbours more weight"
    )


@settings
class LarsSettings:
    """Training of the classifier with MAE's recipe."""

    base_lr: list[PositiveFloat] = option(
        [0.1, 1.0, 10.0, 30.0, 100.0],
        "candidate learning rates per 256 images; MAE uses 0.1 on ImageNet",
        min_length=1,
    )
    epochs: PositiveInt = option(90, "passes over the training images")
    warmup_epochs: NonNegative = option(10.0, "epochs of linear warm-up")
    batch_size: Annotated[int, Field(ge=2)] = option(256, "images per step (MAE: 16384, of 1.28 million)")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "momentum of LARS")
    weight_decay: NonNegative = option(0.0, "weight decay of LARS")


@settings
class SgdSettings:
    """Training of logistic regression in minibatches, for sets too large for method=logistic."""

    epochs: PositiveInt = option(20, "passes over the training images")
    batch_size: PositiveInt = option(1024, "images per step")
    lr: PositiveFloat = option(0.03, "peak learning rate of Adam")


@settings
class ProbeSettings(EncodeSettings):
    """The linear classifier, and the strengths to choose from."""

    method: Literal["logistic", "lars", "closed_form", "sgd"] = option(
        "logistic",
        "logistic regression; sgd: the same in minibatches, for large sets; lars: MAE's recipe; closed_form: ridge "
        "regression, the fastest",
    )
    l2: list[PositiveFloat] = option(
        [1.0, 1e-1, 1e-2, 1e-3, 1e-4], "candidate regularisation strengths (logistic, sgd, closed_form)", min_length=1
    )
    lars: LarsSettings = option(LarsSettings(), "training with LARS")
    sgd: SgdSettings = option(SgdSettings(), "training in minibatches")
    validation_share: OpenShare = option(
        0.2, "share of the training images held out for validation if there is no validation split"
    )
    seed: Seed = option(0, "random seed of that share and of the order of images in LARS and sgd")


def decisive(config: Any) -> dict[str, Any]:
    """The settings of a measurement that identify its result, as plain data.

    Without the group `sgd` where it is not used: earlier versions did not have it, and their results stay valid.
    """
    tree = to_tree(config)
    if tree.get("method") != "sgd":
        tree.pop("sgd", None)
    return tree
