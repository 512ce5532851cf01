"""The weights that a new run starts from: random ones, a dense model's made into experts, or those of another run."""

from pathlib import Path

import torch
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.checkpoint.weights import load_weights_strict
from moce_ds.errors import ArtefactError
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import ExpertShape, upcycle
from moce_ds.models.sdr import part_units
from moce_ds.models.warm_start import has_experts, is_decoder, is_expert, lacks_decoder, read_weights
from moce_ds.training.settings import PretrainRunSettings


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
        weights = _with_experts(weights, spec.experts, perturbation, run.seed)
        weights |= {name: p.detach().clone() for name, p in global_parameters(model) if "gate." in name}
    return weights, message


def take_weights(model: MaskedAutoencoder, weights: dict[str, Tensor], source: Path | None) -> None:
    """Give a model whose experts have their places those of the weights that it holds. Raises ArtefactError."""
    parameters = dict(global_parameters(model))
    here = {name: tensor for name, tensor in weights.items() if name in parameters or not is_expert(name)}
    load_weights_strict(parameters, here, str(source))


def _with_experts(dense: dict[str, Tensor], experts: ExpertShape, perturbation: float, seed: int) -> dict[str, Tensor]:
    if experts.gate == "path":
        return part_units(dense, experts)
    return upcycle(dense, experts, perturbation, seed)


def _random_dense(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    dense = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    return {name: p.detach() for name, p in dense.named_parameters()}
