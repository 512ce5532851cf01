"""The model of a run: built, its experts in their places, with its first weights or those of a checkpoint.

Axes: L expert layers, M clusters, E experts, K experts an image is sent to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.checkpoint.deepspeed_state import global_parameters, load_checkpoint
from moce_ds.checkpoint.shared_read import SharedReader
from moce_ds.common.errors import ArtefactError
from moce_ds.data.clusters import Clusters
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce
from moce_ds.models.parameters import (
    has_experts,
    is_cluster_gate,
    is_decoder,
    is_expert,
    is_gate,
    lacks_decoder,
    load_weights_strict,
)
from moce_ds.models.shapes import NO_WEIGHTS, LossWeights
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.deepspeed_token_layer import TokenMoeLayer
from moce_ds.moe.expert_layer import choose_execution, run_grouped, run_one_by_one
from moce_ds.moe.gate import route_table
from moce_ds.moe.placement import default_placement, held_experts, placement_by_traffic
from moce_ds.training.engine import Engine
from moce_ds.training.initial_weights import read_weights
from moce_ds.training.settings import EngineSettings, ExpertSettings, PretrainRunSettings


def build_for_training(
    spec: ModelSpec, clusters: Clusters | None, ep_size: int, seed: int, loss_weights: LossWeights = NO_WEIGHTS
) -> MaskedAutoencoder:
    """The model with random weights: the same on every process, experts aside."""
    torch.manual_seed(seed)

    def make_layer(make_expert: Callable[[], nn.Module], num_experts: int, shared: bool) -> nn.Module:
        assert spec.experts is not None, "a dense model has no layer of experts"
        if not spec.model_kind.routes_by_cluster:
            return TokenMoeLayer(make_expert, spec.shape.width, num_experts, ep_size, spec.experts.k)
        return ClusterMoE(make_expert, num_experts, ep_size, shared)

    return build_model(spec, clusters, make_layer, loss_weights)


def expert_layers(model: MaskedAutoencoder) -> dict[int, ClusterMoE | TokenMoeLayer]:
    """The layers of experts by block."""
    return {b: block.mlp for b, block in enumerate(model.blocks) if isinstance(block.mlp, ClusterMoE | TokenMoeLayer)}


def tune_execution(model: MaskedAutoencoder, execution: str, engine: EngineSettings, device: torch.device) -> None:
    """How blocks and experts are computed; changes speed and memory, never the result.

    Args:
        execution: of experts: "one_by_one", "grouped", or "auto".
    """
    rules = {"one_by_one": run_one_by_one, "grouped": run_grouped}
    layers = expert_layers(model)
    for layer in layers.values():
        if isinstance(layer, ClusterMoE):
            auto = choose_execution(device, engine.precision == "bf16", layer.experts)
            layer.execute = rules.get(execution, auto)
    model.checkpoint_activations = engine.checkpoint_activations
    if engine.compile:
        for index, block in enumerate(model.blocks):
            if index not in layers:
                block.compile()
        for block in model.decoder_blocks:
            block.compile()


def initialise(
    model: MaskedAutoencoder,
    spec: ModelSpec,
    experts: ExpertSettings,
    run: PretrainRunSettings,
    clusters: Clusters | None,
    runtime: Runtime,
) -> NDArray[np.int64]:
    """Give the model of a new run its first weights, its experts in their places, slot_LE. A collective.

    Called before the engine copies the weights.

    Raises:
        ArtefactError: the first weights cannot be read, or do not fit.
    """
    weights, message = first_weights(model, spec, run, experts.perturbation, runtime)
    slot_LE = _first_placement(model, experts, clusters, weights, run.init_from)
    place_experts(model, slot_LE, runtime.rank)
    take_weights(model, weights, run.init_from)
    runtime.say(message)
    return slot_LE


def load_placed(
    engine: Engine, experts: ExpertSettings, clusters: Clusters | None, reader: SharedReader
) -> NDArray[np.int64]:
    """Load a checkpoint into the engine, its experts in their places, slot_LE. A collective.

    Raises:
        DamagedError: a file is damaged.
        ArtefactError: the checkpoint does not fit the model.
    """
    slot_LE = _placement_after(engine.module, experts, clusters, reader)
    place_experts(engine.module, slot_LE, reader.runtime.rank)
    load_checkpoint(engine, reader)
    return slot_LE


def _first_placement(
    model: MaskedAutoencoder,
    experts: ExpertSettings,
    clusters: Clusters | None,
    weights: dict[str, Tensor],
    source: Path | None,
) -> NDArray[np.int64]:
    """Where the experts of a new run live, slot_LE: in order, or fitted to the routes of its first weights' gate.

    Args:
        clusters: that route the images; None: nothing is routed by cluster.
        source: where the weights come from.
    """
    if clusters is None or not _is_fitted(experts):
        return default_placement(len(expert_layers(model)), experts.num)
    assert isinstance(model, Moce)
    gates = {name: parameter for name, parameter in global_parameters(model) if is_cluster_gate(name)}
    given = {name: tensor for name, tensor in weights.items() if name in gates}
    load_weights_strict(gates, given, str(source))
    with torch.no_grad():
        expert_MLK = route_table(model.gate, model.gate(), model.share_M, 1, experts.balance)
    return placement_by_traffic(expert_MLK[:, :, 0].numpy(), clusters.share_M, experts.num, experts.ep_size)


def _placement_after(
    model: MaskedAutoencoder, experts: ExpertSettings, clusters: Clusters | None, reader: SharedReader
) -> NDArray[np.int64]:
    """Where experts live after a checkpoint, slot_LE: with the same `ep_size` in the same places, so that the run
    resumes bit for bit; else fitted to its routes. Its files know nothing of the placement. A collective."""
    if clusters is None or not _is_fitted(experts):
        return default_placement(len(expert_layers(model)), experts.num)
    if reader.checkpoint.entry("placement", "ep_size") == experts.ep_size:
        return np.array(reader.checkpoint.entry("placement", "slot_LE"), dtype=np.int64)
    return placement_by_traffic(reader.routes().expert_ML, clusters.share_M, experts.num, experts.ep_size)


def placed(experts: ExpertSettings, slot_LE: NDArray[np.int64]) -> dict[str, Any]:
    """What a manifest says of the places of experts."""
    return {"placement": {"ep_size": experts.ep_size, "slot_LE": slot_LE.tolist()}}


def _is_fitted(experts: ExpertSettings) -> bool:
    """Whether experts are placed where the images are that choose them."""
    return experts.ep_size > 1 and experts.loader_locality


def place_experts(model: MaskedAutoencoder, slot_LE: NDArray[np.int64], rank: int) -> None:
    """Tell every expert layer which global experts this rank holds."""
    for layer, slot_E in zip(expert_layers(model).values(), slot_LE, strict=True):
        layer.set_local_experts(held_experts(slot_E, rank % layer.ep_size, layer.ep_size))


def first_weights(
    model: MaskedAutoencoder, spec: ModelSpec, run: PretrainRunSettings, perturbation: float, runtime: Runtime
) -> tuple[dict[str, Tensor], str]:
    """A new run's weights by global names, all experts included, and a sentence that says where they come from.

    Without `run.init_from` the experts start from the model's own random MLPs, by the same rule (`upcycle`). A
    collective: the processes share the reading of a checkpoint.

    Args:
        model: gives the gates' weights where the source has none.
        perturbation: relative noise on the experts' weights.

    Raises:
        ArtefactError: the weights cannot be read, or hold experts where a dense run is wanted.
    """
    source = run.init_from
    fresh = _random_dense(spec, run.seed)
    if source is None:
        weights, message = dict(fresh), "Starting from random weights."
    else:
        weights, message = read_weights(source, run.replace_positions, runtime), f"Starting from {source}."
        if lacks_decoder(weights):
            weights |= {name: tensor for name, tensor in fresh.items() if is_decoder(name)}
            message = f"Starting from {source}, which holds an encoder only: the decoder starts fresh."
        if run.replace_positions:
            message += " Its position tables are replaced by fixed sine-cosine ones."
    if spec.experts is None:
        if has_experts(weights):
            raise ArtefactError(
                f"run.init_from: {source} holds experts; export one with `moce export` to start a dense run."
            )
    elif not has_experts(weights):
        weights = spec.variant.from_dense(weights, spec.experts, perturbation, run.seed)
        weights |= {name: p.detach().clone() for name, p in global_parameters(model) if is_gate(name)}
    return weights, message


def take_weights(model: MaskedAutoencoder, weights: dict[str, Tensor], source: Path | None) -> None:
    """Give a model whose experts have their places those of the weights that it holds. Raises ArtefactError."""
    parameters = dict(global_parameters(model))
    here = {name: tensor for name, tensor in weights.items() if name in parameters or not is_expert(name)}
    load_weights_strict(parameters, here, str(source))


def _random_dense(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    dense = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    return {name: p.detach() for name, p in dense.named_parameters()}
