"""Sizes of a model and weights of its losses. Settings use them, so this module needs neither torch nor timm."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

Size = Annotated[int, Field(gt=0, le=100_000)]
"""Limits for values read from a file, so that a damaged file does not request an absurd amount of memory."""


@dataclass(frozen=True)
class ViTShape:
    """The size of a vision transformer with one cls token.

    `pooled_norm`: the final norm follows the mean of the patch tokens, as in the fine-tuned models of the public MAE,
    instead of preceding it.
    """

    image_size: Size
    patch_size: Size
    width: Size
    depth: Annotated[int, Field(gt=0, le=1000)]
    heads: Size
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = 4.0
    pooled_norm: bool = False

    @property
    def num_patches(self) -> int:
        """N, patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden(self) -> int:
        """H, hidden units of an MLP, rounded as timm does."""
        return int(self.width * self.mlp_ratio)

    def with_hidden(self, units: int) -> "ViTShape":
        """The same shape with `units` hidden units per MLP."""
        ratio = units / self.width
        exact = int(self.width * ratio) == units  # the quotient may be rounded down
        return replace(self, mlp_ratio=ratio if exact else math.nextafter(ratio, math.inf))

    def timm_arguments(self) -> dict[str, Any]:
        """Keyword arguments for timm's VisionTransformer without a classifier."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "num_classes": 0,
            **({"global_pool": "avg", "fc_norm": True} if self.pooled_norm else {}),
        }


@dataclass(frozen=True)
class DecoderShape:
    """The size of the decoder, which only pre-training uses."""

    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class ExpertShape:
    """The number of experts, their blocks (counted from 0), and the kind of gate.

    Attributes:
        num_experts, layers: E, and the blocks with experts.
        gate: the name of the gate in manifests (`common/config/model_kinds.py`): "cluster", "random" (a fixed table,
            the control experiment), "token" (TokenMoE) or "path" (SDR).
        k: experts an image is sent to.
        temperature: divides the gate's logits.
        tied: one gate for all layers.
        learnable: whether the cluster embeddings learn.
        init_scale: standard deviation of the gate's first logits.
        combine: "prob" or "straight_through".
        shared: whether each layer has a shared expert too.
        seed: random seed of the random table.
        stages, common_units: for SDR: the digits of a path, and the hidden units of an MLP that all paths share.
    """

    num_experts: int
    layers: tuple[int, ...]
    gate: str = "cluster"
    k: int = 1
    temperature: float = 1.0
    tied: bool = False
    learnable: bool = False
    init_scale: float = 1.0
    combine: str = "straight_through"
    shared: bool = False
    seed: int = 0
    stages: int = 0
    common_units: int = 0

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "ExpertShape":
        """Rebuild from JSON, where tuples are lists."""
        return cls(**{**tree, "layers": tuple(tree["layers"])})


@dataclass(frozen=True)
class LossWeights:
    """Weights of the model's own losses; the weight of reconstruction is 1 (docs/method.md, "Losses").

    None: the loss is computed for the metrics but not part of the sum.

    Attributes:
        imbalance, balance: weights for MoCE's gate.
        token_balance: weight of TokenMoE's importance and load losses.
        distillation: weight of SDR's distance from the teacher's tokens.
    """

    imbalance: float | None = None
    balance: float | None = None
    token_balance: float | None = None
    distillation: float | None = None


NO_WEIGHTS = LossWeights()
"""Only the reconstruction loss."""
