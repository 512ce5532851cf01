"""The settings of a model: its sizes, its experts, one group per kind of model for its own options.

`ModelSettings`, `ExpertSettings`, `TokenMoeSettings` and `SdrSettings` are groups of `moce pretrain`. `ModelGroups`
checks them together and computes the model's shapes. Importing this module needs neither torch nor timm.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moce_ds.common.config.model_kinds import MOCE, SDR, TOKEN_MOE, ModelKind, model_kind_of_settings
from moce_ds.common.config.settings import NonNegative, OpenShare, Positive, PositiveFloat, Share, option, settings
from moce_ds.models.shapes import NO_WEIGHTS, DecoderShape, ExpertShape, LossWeights, ViTShape


@settings
class ModelSettings:
    arch: Literal["mae", "moce", "token_moe", "sdr"] = option(
        "mae",
        "mae: dense; moce: experts by the image's cluster; token_moe: experts by token; sdr: groups of hidden units by "
        "the digits of the cluster's number",
    )
    vit: str = option(
        "vit_base_patch16_224", "encoder size by timm's name; the next five settings override parts of it"
    )
    patch_size: Positive | None = option(None, "patch size, pixels")
    width: Positive | None = option(None, "width of the encoder")
    depth: Positive | None = option(None, "blocks of the encoder")
    heads: Positive | None = option(None, "attention heads")
    mlp_ratio: PositiveFloat | None = option(None, "ratio of an MLP's hidden width to the width")
    decoder_width: Positive = option(512, "width of the decoder")
    decoder_depth: Positive = option(8, "blocks of the decoder")
    decoder_heads: Positive = option(16, "attention heads of the decoder")
    mask_ratio: OpenShare = option(0.75, "share of hidden patches")

    @property
    def decoder(self) -> DecoderShape:
        """The size of the decoder."""
        return DecoderShape(self.decoder_width, self.decoder_depth, self.decoder_heads)

    def vit_shape(self, image_size: int | None) -> ViTShape:
        """The size of the encoder: that of `vit`, overridden by single settings."""
        from moce_ds.models.vit import shape_of  # imports timm, which --help does not need

        named = shape_of(self.vit)
        return ViTShape(
            image_size=image_size or named.image_size,
            patch_size=self.patch_size or named.patch_size,
            width=self.width or named.width,
            depth=self.depth or named.depth,
            heads=self.heads or named.heads,
            mlp_ratio=self.mlp_ratio or named.mlp_ratio,
        )


@settings
class ExpertSettings:
    """The experts of all kinds of model that have some. A dense model ignores them."""

    clusters: Path | None = option(None, "clusters folder from `moce cluster` (moce, sdr)")
    num: Positive = option(8, "experts per expert layer, E (sdr: groups of hidden units)")
    layers: list[Annotated[int, Field(ge=0)]] | None = option(
        None, "blocks with experts, from 0; null: the last and third-last block (moce, token_moe)"
    )
    k: Literal[1, 2] = option(1, "experts per image or token (moce, token_moe)")
    gate: Literal["cluster", "random"] = option(
        "cluster", "cluster: a gate by cluster; random: a fixed random table, as a control (moce)"
    )
    gate_sharing: Literal["per_layer", "tied"] = option("per_layer", "tied: all expert layers share one gate (moce)")
    embeddings: Literal["frozen", "learnable"] = option("frozen", "whether the cluster embeddings are trained (moce)")
    combine: Literal["prob", "straight_through"] = option(
        "straight_through",
        "prob: y = p E(x), the paper's; straight_through: y = E(x), with the gradient of log p (moce)",
    )
    shared_expert: bool = option(False, "y = p E(x) + (1 - p) E_shared(x); needs combine=prob (moce)")
    gate_temperature: PositiveFloat = option(1.0, "divides the gate's logits (moce)")
    gate_noise: NonNegative = option(1.0, "noise on the logits in training, times 1/E (moce)")
    gate_init: NonNegative = option(1.0, "initial standard deviation of the gate's logits (moce)")
    gate_lr_scale: NonNegative = option(1.0, "learning rate of the gate relative to the base rate (moce, token_moe)")
    perturbation: NonNegative = option(0.02, "relative noise on the initial weights of the experts (moce, token_moe)")
    imbalance_weight: NonNegative = option(0.01, "weight of the imbalance loss, which makes gates confident (moce)")
    imbalance_start: Share = option(0.2, "share of the training over which that loss is phased in (moce)")
    balance: Literal["loss", "sinkhorn"] = option(
        "sinkhorn", "how experts are balanced: by a balanced assignment, or by a loss (moce)"
    )
    balance_weight: NonNegative = option(0.1, "weight of the balance loss, with balance=loss (moce)")
    ep_size: Positive = option(1, "expert-parallel group size", may_change=True)
    loader_locality: bool = option(True, "read images on the ranks of their experts (moce, sdr)", may_change=True)
    execution: Literal["auto", "one_by_one", "grouped"] = option(
        "auto", "how a process runs its experts; auto: see docs/performance.md (moce, sdr)", may_change=True
    )


@settings
class TokenMoeSettings:
    """Options of model.arch=token_moe."""

    balance_weight: NonNegative = option(0.005, "weight of the importance loss and of the load loss")


@settings
class SdrSettings:
    """Options of model.arch=sdr."""

    stages: Positive = option(4, "stages of the encoder, one per digit of the cluster's number")
    common: OpenShare = option(0.5, "share of an MLP's hidden units that all paths share")
    distillation_weight: NonNegative = option(
        1.0, "weight of the distillation from the tokens of the initial dense MAE"
    )


@dataclasses.dataclass(frozen=True)
class ModelGroups:
    """The groups of settings that describe one model, and values derived from them.

    Attributes:
        shape: the size of the encoder.
    """

    model: ModelSettings
    experts: ExpertSettings
    token_moe: TokenMoeSettings
    sdr: SdrSettings
    shape: ViTShape

    @property
    def model_kind(self) -> ModelKind:
        """The kind of model."""
        return model_kind_of_settings(self.model.arch, self.experts.gate)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Blocks with experts: none for a dense model, all for SDR, otherwise by default V-MoE's "last 2".

        That is 9 and 11 of 12 (docs/method.md, "Gates").
        """
        depth = self.shape.depth
        if not self.model_kind.has_experts:
            return ()
        if self.experts.layers is not None:
            return tuple(self.experts.layers)
        if self.model.arch == "sdr":
            return tuple(range(depth))
        return tuple(sorted({max(0, depth - 3), depth - 1}))

    @property
    def common_units(self) -> int:
        """Hidden units of an MLP that all paths of SDR share; 0 for other models."""
        return round(self.sdr.common * self.shape.hidden) if self.model.arch == "sdr" else 0

    @property
    def wants_teacher(self) -> bool:
        """Whether the model is distilled from the initial dense MAE."""
        return self.model_kind.distils and self.sdr.distillation_weight > 0

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the model's own losses (docs/method.md, "Losses"). A random table has none."""
        experts = self.experts
        weights = {
            MOCE.gate: LossWeights(
                experts.imbalance_weight, experts.balance_weight if experts.balance == "loss" else None
            ),
            TOKEN_MOE.gate: LossWeights(token_balance=self.token_moe.balance_weight),
            SDR.gate: LossWeights(distillation=self.sdr.distillation_weight),
        }
        return weights.get(self.model_kind.gate, NO_WEIGHTS)

    def expert_shape(self, seed: int) -> ExpertShape | None:
        """The shape of the experts; None for a dense model. `seed`: random seed of the random table."""
        experts, model_kind = self.experts, self.model_kind
        if model_kind.gate is None:
            return None
        return ExpertShape(
            num_experts=experts.num,
            layers=self.expert_layers,
            gate=model_kind.gate,
            k=experts.k,
            temperature=experts.gate_temperature,
            tied=experts.gate_sharing == "tied",
            learnable=experts.embeddings == "learnable",
            init_scale=experts.gate_init,
            combine=experts.combine,
            shared=experts.shared_expert,
            seed=seed,
            stages=self.sdr.stages if self.model.arch == "sdr" else 0,
            common_units=self.common_units,
        )

    def check(self, init_from: Path | None) -> None:
        """Raise ValueError, naming the settings, if they do not describe a valid model.

        Args:
            init_from: initial weights of the run.
        """
        self._check_sizes()
        self._check_unused()
        if self.model_kind.has_experts:
            self._check_experts()
        if self.model.arch == "sdr":
            self._check_paths(init_from)

    def _check_sizes(self) -> None:
        shape, decoder = self.shape, self.model.decoder
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

    def _check_unused(self) -> None:
        """Refuse options of another kind of model, because the run would ignore them."""
        arch = self.model.arch
        groups: dict[str, Any] = {"token_moe": self.token_moe, "sdr": self.sdr}
        for name, group in groups.items():
            changed = [field.name for field in dataclasses.fields(group) if getattr(group, field.name) != field.default]
            if changed and name != arch:
                raise ValueError(
                    f"{name}.{changed[0]}: only model.arch={name} uses it, and model.arch is {arch}: leave it out, or "
                    f"set model.arch={name}"
                )
        if self.experts.gate != "cluster" and arch in ("token_moe", "sdr"):
            raise ValueError(
                f"experts.gate: only model.arch=moce uses it, and model.arch is {arch}: leave it out, or set "
                "model.arch=moce"
            )

    def _check_experts(self) -> None:
        experts, depth, arch = self.experts, self.shape.depth, self.model.arch
        if self.model_kind.routes_by_cluster and experts.clusters is None:
            raise ValueError(
                f"experts.clusters: required for model.arch={arch}; write the clusters with `moce cluster`"
            )
        if experts.k > experts.num:
            raise ValueError(f"experts.k={experts.k} exceeds experts.num={experts.num}")
        if experts.shared_expert and (experts.combine != "prob" or not self.model_kind.routes_by_cluster):
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

    def _check_paths(self, init_from: Path | None) -> None:
        experts, shape = self.experts, self.shape
        if experts.layers is not None or experts.k > 1 or experts.shared_expert:
            raise ValueError(
                "model.arch=sdr: leave out experts.layers, experts.k and experts.shared_expert; every block has "
                "groups of hidden units, and an image uses one of them"
            )
        if self.sdr.stages > shape.depth:
            raise ValueError(f"sdr.stages: {self.sdr.stages} parts of an encoder of {shape.depth} blocks")
        grouped = shape.hidden - self.common_units
        if not self.common_units or not grouped or grouped % experts.num:
            raise ValueError(
                f"sdr.common: {self.sdr.common} of {shape.hidden} hidden units leaves {grouped}, which do not make "
                f"experts.num={experts.num} groups"
            )
        if self.wants_teacher and init_from is None:
            raise ValueError(
                "run.init_from: required for model.arch=sdr: SDR's first phase is a dense MAE (model.arch=mae), the "
                "teacher of the second; or set sdr.distillation_weight=0"
            )


def _check_widths(width_key: str, width: int, heads_key: str, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{width_key}: {width} is not a multiple of {heads_key} {heads}")
    if width % 4:
        raise ValueError(f"{width_key}: {width} is not a multiple of 4, which sine-cosine positions need")
