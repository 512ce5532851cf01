"""A model on paper: what a checkpoint's manifest says of it, and how to build it from that."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moce_ds.clustering.clusters import Clusters
from moce_ds.data.transform import ImageInput
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder
from moce_ds.models.moce import ExpertShape, MakeLayer, Moce
from moce_ds.models.sdr import Sdr, path_shape
from moce_ds.models.shapes import NO_WEIGHTS, LossWeights
from moce_ds.models.token_moe import TokenMoeAutoencoder
from moce_ds.models.vit import ViTShape
from moce_ds.storage.files import valid_record


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a masked autoencoder, dense (`experts` is None) or with experts, and its images."""

    shape: ViTShape
    decoder: DecoderShape
    mask_ratio: float
    input: ImageInput
    experts: ExpertShape | None

    def to_tree(self) -> dict[str, Any]:
        """Plain data for a manifest; `from_tree` is the inverse."""
        return asdict(self)

    @property
    def dense(self) -> "ModelSpec":
        """The dense model that a route through the experts is."""
        if self.experts is not None and self.experts.gate == "path":
            return replace(self, shape=path_shape(self.shape, self.experts), experts=None)
        return replace(self, experts=None)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "ModelSpec":
        """Rebuild from a manifest. Raises ArtefactError where it is not what `to_tree` gives; every fault is listed."""
        return valid_record(cls, tree, "The manifest's model", "a checkpoint", "moce pretrain")


def build_model(
    spec: ModelSpec, clusters: Clusters | None, make_layer: MakeLayer, weights: LossWeights = NO_WEIGHTS
) -> MaskedAutoencoder:
    """The model of a spec; one routed by clusters needs them. `make_layer` makes its expert layers.

    `weights` of its own losses are for training.
    """
    experts = spec.experts
    if experts is None:
        return MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    if experts.gate == "token":
        return TokenMoeAutoencoder(
            spec.shape,
            spec.decoder,
            spec.mask_ratio,
            experts.layers,
            lambda make_mlp: make_layer(make_mlp, experts.num_experts, False),
            weights,
        )
    assert clusters is not None, "a model routed by clusters is built from clusters"
    kind = Sdr if experts.gate == "path" else Moce
    return kind(
        spec.shape,
        spec.decoder,
        spec.mask_ratio,
        experts,
        torch.from_numpy(clusters.embeddings_MD),
        torch.from_numpy(clusters.share_M),
        make_layer,
        weights,
    )
