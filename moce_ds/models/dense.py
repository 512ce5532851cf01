"""The dense ViT inside a checkpoint: one route through the expert layers, the decoder and the gates left out."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moce_ds.checkpoint_files import WEIGHTS, Checkpoint
from moce_ds.errors import ArtefactError
from moce_ds.models.mae import sincos_positions
from moce_ds.models.moce import expert_key
from moce_ds.models.spec import ModelSpec
from moce_ds.models.vit import Encoder, check_state, timm_vit
from moce_ds.models.warm_start import is_decoder

_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True)
class Route:
    """One expert of every expert layer, and the gate value that is folded into each."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]


DENSE = Route((), ())


def encoder_state(checkpoint: Checkpoint, spec: ModelSpec, route: Route) -> dict[str, Tensor]:
    """Weights of the route's dense ViT, by timm's names; reads none but their files.

    The gate value is folded in: `fc2.weight *= p`, `fc2.bias *= p` (docs/method.md, "Deployment").
    """
    chosen = {}
    layers = spec.experts.layers if spec.experts else ()
    for block, expert, weight in zip(layers, route.experts, route.weights, strict=True):
        for rest in _MLP:
            chosen[expert_key(block, expert, rest)] = (f"blocks.{block}.mlp.{rest}", weight if "fc2" in rest else 1.0)
    shared = ["cls_token", *(f"blocks.{block}.norm1.weight" for block in range(spec.shape.depth))]
    tensors = checkpoint.load(WEIGHTS, [*shared, *chosen])
    state = {"pos_embed": sincos_positions(spec.shape, spec.shape.width)}
    for name, tensor in tensors.items():
        if name in chosen:
            dense_name, weight = chosen[name]
            state[dense_name] = tensor * weight
        elif not is_decoder(name) and not name.startswith("gate."):
            state[name] = tensor
    return state


def as_encoder(state: Mapping[str, Tensor], spec: ModelSpec, provenance: dict[str, object], source: str) -> Encoder:
    """An encoder in memory, its weights checked against the shape."""
    model = timm_vit(spec.shape)
    check_state(model, state, source)
    model.load_state_dict(dict(state))
    return Encoder(model.eval(), spec.shape, spec.input, provenance)


def dense_encoder(checkpoint: Checkpoint) -> Encoder:
    """The encoder of a dense run's checkpoint. Raises ArtefactError where there are experts to choose from."""
    spec = ModelSpec.from_tree(checkpoint.manifest["model"])
    if spec.experts is not None:
        raise ArtefactError(f"{checkpoint.folder} holds experts: choose one with `moce export` and use what it writes.")
    provenance: dict[str, object] = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "route": None}
    return as_encoder(encoder_state(checkpoint, spec, DENSE), spec, provenance, str(checkpoint.folder))
