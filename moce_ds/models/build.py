"""The specification of a model, as stored in a checkpoint's manifest, and the construction of the model from it.

`VARIANTS` is the registry of the kinds of model: for each value of `model.arch` its class, and its relation to a dense
masked autoencoder. `common/config/model_kinds.py` has the parts that need no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moce_ds.common.config.model_kinds import ModelKind, model_kind_by_gate
from moce_ds.common.storage.files import valid_record
from moce_ds.data.clusters import Clusters
from moce_ds.data.transform import ImageInput
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder
from moce_ds.models.moce import ExpertShape, MakeLayer, Moce, upcycle
from moce_ds.models.sdr import Sdr, join_units, part_units, path_shape
from moce_ds.models.shapes import NO_WEIGHTS, LossWeights
from moce_ds.models.token_moe import TokenMoeAutoencoder
from moce_ds.models.vit import ViTShape

State = dict[str, Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a masked autoencoder, dense (`experts` is None) or with experts, and the format of its images."""

    shape: ViTShape
    decoder: DecoderShape
    mask_ratio: float
    input: ImageInput
    experts: ExpertShape | None

    def to_tree(self) -> dict[str, Any]:
        """Plain data for a manifest; `from_tree` is the inverse."""
        return asdict(self)

    @property
    def model_kind(self) -> ModelKind:
        """The kind of model."""
        return model_kind_by_gate(self.experts.gate if self.experts else None)

    @property
    def variant(self) -> "Variant":
        """The construction of this kind of model, and its relation to a dense one."""
        return VARIANTS[self.model_kind.arch]

    @property
    def dense(self) -> "ModelSpec":
        """The dense model that a route through the experts corresponds to."""
        shape = self.variant.route_shape(self.shape, self.experts) if self.experts else self.shape
        return replace(self, shape=shape, experts=None)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "ModelSpec":
        """Rebuild from a manifest. Raises ArtefactError, listing every fault, if the tree is invalid."""
        return valid_record(cls, tree, "The manifest's model", "a checkpoint", "moce pretrain")


def build_model(
    spec: ModelSpec, clusters: Clusters | None, make_layer: MakeLayer, weights: LossWeights = NO_WEIGHTS
) -> MaskedAutoencoder:
    """The model of a specification. `clusters` are required if it routes by cluster; `make_layer` makes expert layers.

    `weights` of the model's own losses are for training.
    """
    return spec.variant.build(spec, clusters, make_layer, weights)


def _build_dense(
    spec: ModelSpec, clusters: Clusters | None, make_layer: MakeLayer, weights: LossWeights
) -> MaskedAutoencoder:
    return MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)


def _build_token_moe(
    spec: ModelSpec, clusters: Clusters | None, make_layer: MakeLayer, weights: LossWeights
) -> MaskedAutoencoder:
    assert spec.experts is not None, "a TokenMoE has experts"
    num_experts = spec.experts.num_experts
    return TokenMoeAutoencoder(
        spec.shape,
        spec.decoder,
        spec.mask_ratio,
        spec.experts.layers,
        lambda make_mlp: make_layer(make_mlp, num_experts, False),
        weights,
    )


def _build_routed(kind: type[Moce]) -> "Build":
    """Returns the constructor of a model that routes images by cluster."""

    def build(
        spec: ModelSpec, clusters: Clusters | None, make_layer: MakeLayer, weights: LossWeights
    ) -> MaskedAutoencoder:
        assert clusters is not None and spec.experts is not None, "a model routed by clusters is built from clusters"
        return kind(
            spec.shape,
            spec.decoder,
            spec.mask_ratio,
            spec.experts,
            torch.from_numpy(clusters.embeddings_MD),
            torch.from_numpy(clusters.share_M),
            make_layer,
            weights,
        )

    return build


Build = Callable[[ModelSpec, Clusters | None, MakeLayer, LossWeights], MaskedAutoencoder]


def _same_shape(shape: ViTShape, experts: ExpertShape) -> ViTShape:
    return shape


def _expert_alone(state: State, block: int, expert: Mapping[str, Tensor]) -> State:
    return dict(expert)


@dataclass(frozen=True)
class Variant:
    """A kind of model.

    Attributes:
        build: makes the model of a specification.
        from_dense: its weights without the gate, from those of a dense MAE, the experts, and the relative size and seed
            of a perturbation.
        route_shape: the dense ViT of a route through the experts.
        dense_mlp: the dense MLP of a route in a block, from the state without experts and the MLP of the expert. It
            removes what it uses from that state.
    """

    build: Build
    from_dense: Callable[[State, ExpertShape, float, int], State] = upcycle
    route_shape: Callable[[ViTShape, ExpertShape], ViTShape] = _same_shape
    dense_mlp: Callable[[State, int, Mapping[str, Tensor]], State] = _expert_alone


VARIANTS = {
    "mae": Variant(_build_dense),
    "moce": Variant(_build_routed(Moce)),
    "token_moe": Variant(_build_token_moe),
    "sdr": Variant(
        _build_routed(Sdr),
        from_dense=lambda dense, experts, perturbation, seed: part_units(dense, experts),
        route_shape=path_shape,
        dense_mlp=join_units,
    ),
}
"""The kinds of model by `model.arch`."""
