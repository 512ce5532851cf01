"""The model of a run: built, its experts in their places, with its first weights where the run is new.

Axes: L expert layers, M clusters, E experts, K experts an image is sent to.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.checkpoint.format import OPTIMIZER, Checkpoint
from moce_ds.common.errors import ArtefactError, ConfigError
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
from moce_ds.training.initial_weights import read_weights
from moce_ds.training.settings import EngineSettings, ExpertSettings, PretrainRunSettings


def placed_model(
    spec: ModelSpec,
    loss_weights: LossWeights,
    experts: ExpertSettings,
    engine: EngineSettings,
    run: PretrainRunSettings,
    clusters: Clusters | None,
    resume_from: Checkpoint | None,
    runtime: Runtime,
) -> tuple[MaskedAutoencoder, NDArray[np.int64]]:
    """The model with its experts in their places, slot_LE; for a new run with its initial weights.

    Raises:
        ArtefactError: the first weights cannot be read, or do not fit.
        ConfigError: the checkpoint holds weights alone.
    """
    if resume_from and not resume_from.names(OPTIMIZER):
        raise ConfigError(
            f"run.out: {run.out} holds weights without the optimizer's state, from which no run can resume: "
            f"start a new one in another folder, with run.init_from={run.out}."
        )
    model = build_for_training(spec, clusters, experts.ep_size, run.seed, loss_weights)
    weights, message = None, ""
    if resume_from is None:
        weights, message = first_weights(model, spec, run, experts.perturbation)
    slot_LE = choose_placement(model, experts, clusters, weights, run.init_from, resume_from)
    place_experts(model, slot_LE, runtime.rank)
    tune_execution(model, experts.execution, engine, runtime.device)
    if weights is not None:
        take_weights(model, weights, run.init_from)
        runtime.say(message)
    return model, slot_LE


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


def choose_placement(
    model: MaskedAutoencoder,
    experts: ExpertSettings,
    clusters: Clusters | None,
    weights: dict[str, Tensor] | None,
    source: Path | None,
    resume_from: Checkpoint | None,
) -> NDArray[np.int64]:
    """Where experts live for this start of the run, slot_LE: in order, or fitted to the route table at hand.

    The table is that of the first weights' gate, or of the checkpoint, whose files know nothing of the placement. A run
    resumed with the same `ep_size` keeps its placement, so that it resumes bit for bit.

    Args:
        clusters: that route the images; None: nothing is routed by cluster.
        weights: the first ones, where the run is new; source: where they come from.
    """
    if clusters is None or experts.ep_size == 1 or not experts.loader_locality:
        return default_placement(len(expert_layers(model)), experts.num)
    assert isinstance(model, Moce)
    if resume_from is not None:
        saved = np.array(resume_from.entry("placement", "slot_LE"), dtype=np.int64)
        if resume_from.entry("placement", "ep_size") == experts.ep_size:
            return saved
        expert_ML = resume_from.routes.expert_ML
    else:
        gates = {name: parameter for name, parameter in global_parameters(model) if is_cluster_gate(name)}
        given = {name: tensor for name, tensor in (weights or {}).items() if name in gates}
        load_weights_strict(gates, given, str(source))
        with torch.no_grad():
            expert_MLK = route_table(model.gate, model.gate(), model.share_M, 1, experts.balance)
        expert_ML = expert_MLK[:, :, 0].numpy()
    return placement_by_traffic(expert_ML, clusters.share_M, experts.num, experts.ep_size)


def place_experts(model: MaskedAutoencoder, slot_LE: NDArray[np.int64], rank: int) -> None:
    """Tell every expert layer which global experts this rank holds."""
    for layer, slot_E in zip(expert_layers(model).values(), slot_LE, strict=True):
        layer.set_local_experts(held_experts(slot_E, rank % layer.ep_size, layer.ep_size))


def first_weights(
    model: MaskedAutoencoder, spec: ModelSpec, run: PretrainRunSettings, perturbation: float
) -> tuple[dict[str, Tensor], str]:
    """A new run's weights by global names, all experts included, and a sentence that says where they come from.

    Without `run.init_from` the experts start from the model's own random MLPs, by the same rule (`upcycle`).

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
        weights, message = read_weights(source, run.replace_positions), f"Starting from {source}."
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
