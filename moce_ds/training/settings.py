"""The settings of `moce pretrain`, and what of them may change when a run is resumed.

Everything in `model`, `experts`, `data` and `optim` defines the experiment: a resumed run must have the same, except
for the keys marked `may_change`. All of `engine` and `run` may change, except `run.seed`.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

from pydantic import Field

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.config.settings import from_tree, keys, option, settings
from moce_ds.config.yaml_text import read_yaml_text
from moce_ds.data.transform import IMAGENET_MEAN, IMAGENET_STD, ImageInput
from moce_ds.errors import ConfigError
from moce_ds.models.shapes import DecoderShape, ExpertShape, LossWeights, ViTShape

if TYPE_CHECKING:
    from moce_ds.models.build import ModelSpec

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]
Deviation = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@settings
class ModelSettings:
    arch: Literal["mae", "moce"] = option("mae", "mae (dense) or moce (experts by cluster)")
    vit: str = option("vit_base_patch16_224", "encoder size by timm's name; the next five replace parts of it")
    patch_size: Positive | None = option(None, "side of a patch, pixels")
    width: Positive | None = option(None, "width of the encoder")
    depth: Positive | None = option(None, "blocks of the encoder")
    heads: Positive | None = option(None, "attention heads")
    mlp_ratio: Annotated[float, Field(gt=0)] | None = option(None, "hidden width of an MLP over the width")
    decoder_width: Positive = option(512, "width of the decoder")
    decoder_depth: Positive = option(8, "blocks of the decoder")
    decoder_heads: Positive = option(16, "attention heads of the decoder")
    mask_ratio: OpenShare = option(0.75, "share of the patches that is hidden")

    @property
    def decoder(self) -> DecoderShape:
        """The decoder's size."""
        return DecoderShape(self.decoder_width, self.decoder_depth, self.decoder_heads)


@settings
class ExpertSettings:
    clusters: Path | None = option(None, "clusters folder from `moce cluster` (not needed for gate=token)")
    num: Positive = option(8, "experts in each expert layer, E")
    layers: list[Annotated[int, Field(ge=0)]] | None = option(
        None, "blocks whose MLP becomes experts, from 0; null: the last and the last but two"
    )
    gate: Literal["cluster", "random", "token", "path"] = option(
        "cluster",
        "what chooses experts: the image's cluster; a fixed random table (control); each token (TokenMoE); the digits "
        "of the cluster's number (SDR)",
    )
    k: Literal[1, 2] = option(1, "experts that an image is sent to")
    gate_sharing: Literal["per_layer", "tied"] = option("per_layer", "tied: all expert layers have one gate")
    embeddings: Literal["frozen", "learnable"] = option("frozen", "whether the cluster embeddings learn")
    combine: Literal["prob", "straight_through"] = option(
        "straight_through", "prob: y = p E(x), the paper's; straight_through: y = E(x), with the gradient of log p"
    )
    shared_expert: bool = option(False, "y = p E(x) + (1 - p) E_shared(x); needs combine=prob")
    gate_temperature: Annotated[float, Field(gt=0)] = option(1.0, "divides the gate's logits")
    gate_noise: NonNegative = option(1.0, "noise on the logits while training, times 1/E")
    gate_init: NonNegative = option(1.0, "standard deviation of the gate's first logits")
    gate_lr_scale: NonNegative = option(1.0, "learning rate of the gate over the base rate")
    perturbation: NonNegative = option(0.02, "relative noise on the experts' first weights")
    imbalance_weight: NonNegative = option(0.01, "weight of the loss that makes gates confident")
    imbalance_start: Share = option(0.2, "share of the training after which that loss is fully phased in")
    balance: Literal["loss", "sinkhorn"] = option(
        "sinkhorn", "how every expert is kept used: by a balanced choice of experts, or by a loss"
    )
    balance_weight: NonNegative = option(0.1, "weight of the balance loss (with balance=loss)")
    token_balance_weight: NonNegative = option(0.005, "weight of importance and of load loss (with gate=token)")
    stages: Positive = option(4, "parts of the encoder, each for one digit of the cluster's number (with gate=path)")
    common: OpenShare = option(0.5, "share of an MLP's hidden units that all paths have (with gate=path)")
    distillation_weight: NonNegative = option(
        1.0, "weight of staying near the tokens of the dense MAE that the run starts from (with gate=path)"
    )
    ep_size: Positive = option(1, "neighbouring ranks that share one set of experts", may_change=True)
    loader_locality: bool = option(True, "read images where their expert lives", may_change=True)
    execution: Literal["auto", "one_by_one", "grouped"] = option(
        "auto", "how a process runs its experts; auto: the rule of docs/performance.md", may_change=True
    )


@settings
class DataSettings:
    shards: Path = option(help="shard set from `moce shards`")
    image_size: Positive | None = option(None, "side of an input image; null: that of model.vit")
    crop_scale: tuple[CropShare, CropShare] = option((0.2, 1.0), "area of a random crop")
    flip: bool = option(True, "flip images at random")
    center_crop: CropShare = option(0.875, "share of the shorter side kept in evaluation")
    mean: tuple[float, float, float] = option(IMAGENET_MEAN, "subtracted from each channel (0-1)")
    std: tuple[Deviation, Deviation, Deviation] = option(IMAGENET_STD, "divides each channel")
    threads: Positive = option(2, "decoding threads of each process", may_change=True)


@settings
class OptimSettings:
    epochs: Annotated[float, Field(gt=0)] = option(200, "passes over the shard set")
    batch_size: Positive = option(4096, "images in a step, over all processes")
    accumulation: Positive = option(1, "parts in which a process computes its share of a step", may_change=True)
    base_lr: Annotated[float, Field(gt=0)] = option(1.5e-4, "learning rate per 256 images")
    min_lr: NonNegative = option(0.0, "learning rate at the end")
    warmup_epochs: NonNegative = option(40, "epochs of linear warm-up")
    weight_decay: NonNegative = option(0.05, "AdamW weight decay, on matrices only")
    betas: tuple[Beta, Beta] = option((0.9, 0.95), "AdamW betas")
    clip: NonNegative = option(1.0, "largest gradient norm; 0: no clipping")


@settings
class PretrainOptimSettings(OptimSettings):
    decay_tokens: bool = option(
        False, "weight decay on cls_token and mask_token too, as in the public MAE (timm's groups)"
    )


@settings
class EngineSettings:
    precision: Literal["fp32", "bf16"] = option("bf16", "bf16: autocast, weights stay fp32")
    zero_stage: Literal[1, 2] = option(1, "what DeepSpeed shards: 1 optimizer state, 2 gradients too")
    checkpoint_activations: bool = option(False, "compute a block again in the backward pass instead of keeping it")
    compile: bool = option(False, "torch.compile the dense blocks")


@settings
class PretrainRunSettings(RunSettings):
    init_from: Path | None = option(None, "weights to start from: a run, a checkpoint, .safetensors, or an MAE .pth")
    replace_positions: bool = option(False, "of init_from: give up learned positions for fixed ones")
    picture_every: Positive = option(1000, "steps between pictures (reconstructions, routing) for TensorBoard")


@settings
class PretrainSettings:
    """All settings of a run."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    experts: ExpertSettings = dataclasses.field(default_factory=ExpertSettings)
    data: DataSettings
    optim: PretrainOptimSettings = dataclasses.field(default_factory=PretrainOptimSettings)
    engine: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    run: PretrainRunSettings

    def __post_init__(self) -> None:
        shape, decoder = self.vit_shape, self.model.decoder
        _check_widths("model.width", shape.width, "model.heads", shape.heads)
        _check_widths("model.decoder_width", decoder.width, "model.decoder_heads", decoder.heads)
        if shape.image_size % shape.patch_size:
            raise ValueError(
                f"data.image_size: {shape.image_size} is not a multiple of model.patch_size {shape.patch_size}"
            )
        kept = int(shape.num_patches * (1 - self.model.mask_ratio))
        if not 0 < kept < shape.num_patches:
            raise ValueError(
                f"model.mask_ratio: {self.model.mask_ratio} leaves {kept} of {shape.num_patches} patches visible; "
                "expected at least one visible and one hidden"
            )
        if self.data.crop_scale[0] > self.data.crop_scale[1]:
            raise ValueError(f"data.crop_scale: {list(self.data.crop_scale)}; expected [low, high]")
        if self.model.arch == "moce":
            self._check_experts()

    def _check_experts(self) -> None:
        experts, depth = self.experts, self.vit_shape.depth
        if experts.clusters is None and experts.gate != "token":
            raise ValueError("experts.clusters: required for model.arch=moce; write the clusters with `moce cluster`")
        if experts.k > experts.num:
            raise ValueError(f"experts.k: {experts.k} experts an image of experts.num {experts.num}")
        if experts.shared_expert and (experts.combine != "prob" or experts.gate == "token"):
            raise ValueError(
                "experts.shared_expert: needs experts.combine=prob and a gate by cluster, since its weight is 1 - p"
            )
        if experts.num % experts.ep_size:
            raise ValueError(f"experts.num: {experts.num} is not a multiple of experts.ep_size {experts.ep_size}")
        layers = self.expert_layers
        if not layers or len(set(layers)) != len(layers) or list(layers) != sorted(layers):
            raise ValueError(f"experts.layers: {list(layers)}; expected different blocks in rising order")
        if layers[-1] >= depth:
            raise ValueError(
                f"experts.layers: block {layers[-1]} is beyond the encoder's {depth} blocks (0-{depth - 1})"
            )
        if experts.gate == "path":
            self._check_paths()

    def _check_paths(self) -> None:
        experts, shape = self.experts, self.vit_shape
        if experts.layers is not None or experts.k > 1 or experts.shared_expert:
            raise ValueError(
                "experts.gate=path: leave out experts.layers, experts.k and experts.shared_expert; every block has "
                "groups of hidden units, of which an image computes one"
            )
        if experts.stages > shape.depth:
            raise ValueError(f"experts.stages: {experts.stages} parts of an encoder of {shape.depth} blocks")
        grouped = shape.hidden - self._common_units
        if not self._common_units or not grouped or grouped % experts.num:
            raise ValueError(
                f"experts.common: {experts.common} of {shape.hidden} hidden units leaves {grouped}, which do not make "
                f"experts.num={experts.num} groups"
            )
        if self.wants_teacher and self.run.init_from is None:
            raise ValueError(
                "run.init_from: required for experts.gate=path: SDR's first phase is a dense MAE (model.arch=mae), the "
                "teacher of the second; or set experts.distillation_weight=0"
            )

    @property
    def vit_shape(self) -> ViTShape:
        """The encoder's size, settings given one by one replacing those of `model.vit`."""
        from moce_ds.models.vit import shape_of  # brings timm along, which --help has no need of

        named, own = shape_of(self.model.vit), self.model
        return ViTShape(
            image_size=self.data.image_size or named.image_size,
            patch_size=own.patch_size or named.patch_size,
            width=own.width or named.width,
            depth=own.depth or named.depth,
            heads=own.heads or named.heads,
            mlp_ratio=own.mlp_ratio or named.mlp_ratio,
        )

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Blocks with experts; by default V-MoE's "last 2" (docs/method.md, "Gates"): 9 and 11 of 12; of SDR all."""
        if self.experts.layers is not None:
            return tuple(self.experts.layers)
        depth = self.vit_shape.depth
        if self.experts.gate == "path":
            return tuple(range(depth))
        return tuple(sorted({max(0, depth - 3), depth - 1}))

    @property
    def _common_units(self) -> int:
        """Hidden units of an MLP that all paths of SDR have; 0 with other gates."""
        return round(self.experts.common * self.vit_shape.hidden) if self.experts.gate == "path" else 0

    @property
    def wants_teacher(self) -> bool:
        """Whether the dense MAE that the run starts from is to be imitated, too."""
        return self.model.arch == "moce" and self.experts.gate == "path" and self.experts.distillation_weight > 0

    @property
    def model_spec(self) -> "ModelSpec":
        """The model on paper."""
        from moce_ds.models.build import ModelSpec

        experts = None
        if self.model.arch == "moce":
            own = self.experts
            experts = ExpertShape(
                num_experts=own.num,
                layers=self.expert_layers,
                gate=own.gate,
                k=own.k,
                temperature=own.gate_temperature,
                tied=own.gate_sharing == "tied",
                learnable=own.embeddings == "learnable",
                init_scale=own.gate_init,
                combine=own.combine,
                shared=own.shared_expert,
                seed=self.run.seed,
                stages=own.stages if own.gate == "path" else 0,
                common_units=self._common_units,
            )
        return ModelSpec(self.vit_shape, self.model.decoder, self.model.mask_ratio, self.image_input, experts)

    @property
    def routing_clusters(self) -> Path | None:
        """The folder of the clusters that route the images; None: nothing is routed by cluster."""
        by_cluster = self.model.arch == "moce" and self.experts.gate != "token"
        return self.experts.clusters if by_cluster else None

    @property
    def loss_weights(self) -> LossWeights:
        """How much the losses of the model's own count (docs/method.md, "Losses")."""
        own = self.experts
        if self.model.arch == "mae" or own.gate == "random":  # a random table learns nothing
            return LossWeights()
        if own.gate == "token":
            return LossWeights(token_balance=own.token_balance_weight)
        if own.gate == "path":
            return LossWeights(distillation=own.distillation_weight)
        return LossWeights(own.imbalance_weight, own.balance_weight if own.balance == "loss" else None)

    @property
    def image_input(self) -> ImageInput:
        """What the encoder's input is."""
        data = self.data
        return ImageInput(self.vit_shape.image_size, data.mean, data.std, data.center_crop)


def _check_widths(width_key: str, width: int, heads_key: str, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{width_key}: {width} is not a multiple of {heads_key} {heads}")
    if width % 4:
        raise ValueError(f"{width_key}: {width} is not a multiple of 4, which sine-cosine positions need")


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """How the global batch is cut: `micro` images a process at a time, `micro_global` over all processes."""

    global_batch: int
    world_size: int
    accumulation: int

    @property
    def micro_global(self) -> int:
        """Images of one micro-batch over all processes."""
        return self.global_batch // self.accumulation

    @property
    def micro(self) -> int:
        """Images of one micro-batch of one process."""
        return self.micro_global // self.world_size


def batch_arithmetic(config: PretrainSettings, world_size: int) -> BatchArithmetic:
    """Check the settings against the number of processes. Raises ConfigError."""
    batches = shared_batch(config.optim, world_size)
    if config.model.arch == "moce" and world_size % config.experts.ep_size:
        raise ConfigError(
            f"experts.ep_size: got {config.experts.ep_size}; it must divide the number of processes, {world_size}."
        )
    return batches


def shared_batch(optim: OptimSettings, world_size: int) -> BatchArithmetic:
    """How so many processes share a batch. Raises ConfigError where they cannot."""
    if optim.batch_size % (world_size * optim.accumulation):
        raise ConfigError(
            f"optim.batch_size: {optim.batch_size} is not divisible by {world_size} processes x "
            f"optim.accumulation {optim.accumulation} = {world_size * optim.accumulation}."
        )
    return BatchArithmetic(optim.batch_size, world_size, optim.accumulation)


class AnySettings(Protocol):
    """The settings of a verb that trains, as far as a run folder is concerned."""

    @property
    def run(self) -> RunSettings: ...


S = TypeVar("S", bound=AnySettings)


def settings_of_run(path: Path, kind: type[S]) -> S:
    """The settings in a run's `config.yaml`, which another version of this program may have written.

    What that version did not have is at its default, which is what it did. What this version does not have is left out
    where it may change (all of `engine` and `run`), else refused.

    Raises:
        ConfigError: the file cannot be read, or names what this version does not have; every fault is listed.
    """
    tree, known = read_yaml_text(path), {key for key, _ in keys(kind)}
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
