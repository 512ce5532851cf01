"""The settings of `moce pretrain`, and which of them may change when a run is resumed.

Everything in `model`, `experts`, `token_moe`, `sdr`, `data` and `optim` defines the experiment: a resumed run must have
the same values, except for the keys marked `may_change`. All of `engine` and `run` may change, except `run.seed`.
`models/settings.py` has the groups that describe the model.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

from pydantic import Field

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.config.model_kinds import ModelKind, translate_tree
from moce_ds.common.config.settings import Beta, CropShare, NonNegative, Positive, from_tree, keys, option, settings
from moce_ds.common.config.settings import PositiveFloat as CacheSize
from moce_ds.common.config.settings import PositiveFloat as Deviation
from moce_ds.common.config.yaml_text import read_yaml_text
from moce_ds.common.errors import ConfigError
from moce_ds.data.transform import IMAGENET_MEAN, IMAGENET_STD, ImageInput
from moce_ds.models.settings import ExpertSettings, ModelGroups, ModelSettings, SdrSettings, TokenMoeSettings
from moce_ds.models.shapes import LossWeights, ViTShape

if TYPE_CHECKING:
    from moce_ds.models.build import ModelSpec


@settings
class DataSettings:
    shards: Path = option(help="shard set from `moce shards`")
    image_size: Positive | None = option(None, "side of an input image; null: that of model.vit")
    crop_scale: tuple[CropShare, CropShare] = option((0.2, 1.0), "area of a random crop")
    flip: bool = option(True, "flip images at random")
    center_crop: CropShare = option(0.875, "share of the shorter side kept in evaluation")
    mean: tuple[float, float, float] = option(IMAGENET_MEAN, "subtracted from each channel (0-1)")
    std: tuple[Deviation, Deviation, Deviation] = option(IMAGENET_STD, "divides each channel")
    threads: Positive = option(2, "decoding threads per process", may_change=True)
    order: Literal["random", "blocks"] = option(
        "random", "blocks: read blocks of 16 MiB in a random order, and shuffle the images of a window"
    )
    shuffle_window: Positive = option(1 << 18, "order=blocks: images that are shuffled together")
    cache: Path | None = option(None, "folder on a disk of each node that holds copies of blocks", may_change=True)
    cache_gib: CacheSize = option(64.0, "largest size of the cache of a node, in GiB", may_change=True)


@settings
class OptimSettings:
    epochs: Annotated[float, Field(gt=0)] = option(200, "passes over the shard set")
    batch_size: Positive = option(4096, "images per step over all processes")
    accumulation: Positive = option(1, "micro-batches per step and process", may_change=True)
    base_lr: Annotated[float, Field(gt=0)] = option(1.5e-4, "learning rate per 256 images")
    min_lr: NonNegative = option(0.0, "final learning rate")
    warmup_epochs: NonNegative = option(40, "epochs of linear warm-up")
    weight_decay: NonNegative = option(0.05, "AdamW weight decay, on matrices only")
    betas: tuple[Beta, Beta] = option((0.9, 0.95), "AdamW betas")
    clip: NonNegative = option(1.0, "maximum gradient norm; 0: no clipping")


@settings
class PretrainOptimSettings(OptimSettings):
    decay_tokens: bool = option(
        False, "also apply weight decay to cls_token and mask_token, as the public MAE does (timm's groups)"
    )


@settings
class EngineSettings:
    precision: Literal["fp32", "bf16"] = option("bf16", "bf16: autocast, weights stay fp32")
    tf32: bool = option(False, "GPUs compute what is left in fp32 as TF32: faster, 10 bits of mantissa")
    zero_stage: Literal[1, 2] = option(1, "what DeepSpeed partitions: 1: optimizer state; 2: also gradients")
    checkpoint_activations: bool = option(False, "recompute blocks in the backward pass instead of storing activations")
    compile: bool = option(False, "torch.compile the dense blocks; on a CPU this needs a C++ compiler")
    device: Literal["auto", "cpu"] = option("auto", "auto: a GPU for each process, if there are any; cpu: none is used")


@settings
class PretrainRunSettings(RunSettings):
    init_from: Path | None = option(
        None, "initial weights: a run, a checkpoint, .safetensors, or a .pth of the public MAE"
    )
    replace_positions: bool = option(False, "replace learned positions in init_from by the fixed ones")
    picture_every: Positive = option(1000, "steps between TensorBoard pictures (reconstructions, routing)")


@settings
class PretrainSettings:
    """All settings of a run."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    experts: ExpertSettings = dataclasses.field(default_factory=ExpertSettings)
    token_moe: TokenMoeSettings = dataclasses.field(default_factory=TokenMoeSettings)
    sdr: SdrSettings = dataclasses.field(default_factory=SdrSettings)
    data: DataSettings
    optim: PretrainOptimSettings = dataclasses.field(default_factory=PretrainOptimSettings)
    engine: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    run: PretrainRunSettings

    def __post_init__(self) -> None:
        self.groups.check(self.run.init_from)
        if self.data.crop_scale[0] > self.data.crop_scale[1]:
            raise ValueError(f"data.crop_scale: {list(self.data.crop_scale)}; expected [low, high]")

    @property
    def vit_shape(self) -> ViTShape:
        """The encoder's size."""
        return self.model.vit_shape(self.data.image_size)

    @property
    def groups(self) -> ModelGroups:
        """The groups that describe the model."""
        return ModelGroups(self.model, self.experts, self.token_moe, self.sdr, self.vit_shape)

    @property
    def model_kind(self) -> ModelKind:
        """The kind of model."""
        return self.groups.model_kind

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Blocks with experts; none of a dense model."""
        return self.groups.expert_layers

    @property
    def wants_teacher(self) -> bool:
        """Whether the dense MAE that the run starts from is to be imitated, too."""
        return self.groups.wants_teacher

    @property
    def model_spec(self) -> "ModelSpec":
        """The model on paper."""
        from moce_ds.models.build import ModelSpec

        experts = self.groups.expert_shape(self.run.seed)
        return ModelSpec(self.vit_shape, self.model.decoder, self.model.mask_ratio, self.image_input, experts)

    @property
    def ep_size(self) -> int:
        """Expert-parallel group size; 1 for a dense model."""
        return self.experts.ep_size if self.model_kind.has_experts else 1

    @property
    def routing_clusters(self) -> Path | None:
        """The folder of the clusters that route the images; None: nothing is routed by cluster."""
        return self.experts.clusters if self.model_kind.routes_by_cluster else None

    @property
    def loss_weights(self) -> LossWeights:
        """How much the losses of the model's own count."""
        return self.groups.loss_weights

    @property
    def image_input(self) -> ImageInput:
        """What the encoder's input is."""
        data = self.data
        return ImageInput(self.vit_shape.image_size, data.mean, data.std, data.center_crop)


class AnySettings(Protocol):
    """The settings of a verb that trains, as far as a run folder is concerned."""

    @property
    def run(self) -> RunSettings:
        """The settings of the run folder."""


S = TypeVar("S", bound=AnySettings)


def settings_of_run(path: Path, kind: type[S]) -> S:
    """The settings in a run's `config.yaml`, which another version of this program may have written.

    What that version did not have is at its default, which is what it did. What this version does not have is left out
    where it may change (all of `engine` and `run`), else refused.

    Raises:
        ConfigError: the file cannot be read, or names what this version does not have; every fault is listed.
    """
    tree, known = translate_tree(read_yaml_text(path)), {key for key, _ in keys(kind)}
    for group in ("engine", "run"):
        if isinstance(tree.get(group), dict):
            tree[group] = {name: value for name, value in tree[group].items() if f"{group}.{name}" in known}
    try:
        return from_tree(kind, tree, str(path))
    except ConfigError as error:
        start = f"from its weights: run.init_from={path.parent}" if kind is PretrainSettings else "in another folder"
        raise ConfigError(
            f"{error}\nThe run was begun by another version of moce, or its file was edited. Go on with that version, "
            f"restore the file, or start another run {start}."
        ) from None


def forbidden_changes(changed: set[str], kind: type[AnySettings]) -> set[str]:
    """Of the dotted keys that differ from the run's own settings, those that make it another experiment."""
    fields = dict(keys(kind))
    free = {key for key, field in fields.items() if field.metadata.get("may_change")}
    return {
        key for key in changed if key == "run.seed" or (key.split(".")[0] not in ("run", "engine") and key not in free)
    }
