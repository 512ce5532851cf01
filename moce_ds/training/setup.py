"""From settings to everything a run needs before its first step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from torch import nn

from moce_ds import checkpoint_files
from moce_ds import config as configuration
from moce_ds.clustering.clusters import Clusters, load_ids
from moce_ds.data.shards import ShardSet
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.files import atomic_file, atomic_folder, copy_tree
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import upcycle
from moce_ds.models.spec import ModelSpec, build_model, give_weights
from moce_ds.models.warm_start import has_experts, is_decoder, is_expert, lacks_decoder, read_weights
from moce_ds.moe.layer import ClusterMoE
from moce_ds.runtime import Runtime
from moce_ds.training.checkpoint import global_parameters
from moce_ds.training.settings import PretrainSettings, forbidden_changes


@dataclass(frozen=True)
class ClusteredData:
    """The clusters of a run and the cluster of every image of its shard set."""

    clusters: Clusters
    ids_N: np.ndarray


def open_run(config: PretrainSettings) -> checkpoint_files.Checkpoint | None:
    """Check that the run folder is free, or holds the same run; returns the checkpoint to resume from.

    Raises:
        ConfigError: the folder holds a run with other settings that define the experiment; they are listed.
    """
    out, path = config.run.out, config.run.out / "config.yaml"
    if path.exists():
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = configuration.differences(old, configuration.to_tree(config))
        forbidden = forbidden_changes(set(changed))
        if forbidden:
            listed = "\n".join(f"  {key}: {changed[key][0]} -> {changed[key][1]}" for key in sorted(forbidden))
            raise ConfigError(
                f"{out} holds another run; these settings may not change when it is resumed:\n{listed}\n"
                "Give the settings of that run, or another run.out."
            )
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"run.out: {out} is not empty and holds no run (no config.yaml): choose another folder.")
    return checkpoint_files.latest(out)


def keep_settings(config: PretrainSettings, runtime: Runtime) -> None:
    """Write the settings into the run folder, which makes it one. Called when nothing is left that can be refused."""
    runtime.barrier()  # everyone has looked before anyone writes
    if runtime.is_main:
        with atomic_file(config.run.out / "config.yaml") as temporary:
            temporary.write_text(configuration.to_yaml(config), encoding="utf-8")


def open_clusters(config: PretrainSettings, shards: ShardSet) -> ClusteredData | None:
    """The clusters of a run with experts, checked to be those of the shard set. Raises ArtefactError."""
    if config.model.arch != "moce":
        return None
    folder = config.experts.clusters
    assert folder is not None, "checked by the settings"
    clusters = Clusters.load(folder)
    return ClusteredData(clusters, load_ids(folder, shards.fingerprint, shards.count))


def keep_clusters(config: PretrainSettings) -> None:
    """Put the clusters into the run folder, so that the run alone can label a task's images."""
    source, target = config.experts.clusters, config.run.out / "clusters"
    if source is not None and not target.exists():
        with atomic_folder(target) as draft:
            copy_tree(source, draft)


def build_for_training(config: PretrainSettings, data: ClusteredData | None) -> MaskedAutoencoder:
    """The model with its first weights' random start: the same on every process, experts aside."""
    torch.manual_seed(config.run.seed)

    def make_layer(make_expert: Callable[[], nn.Module], num_experts: int) -> nn.Module:
        return ClusterMoE(make_expert, num_experts, config.experts.ep_size)

    return build_model(config.model_spec, data.clusters if data else None, make_layer)


def warm_start(model: MaskedAutoencoder, config: PretrainSettings, runtime: Runtime) -> str:
    """Give a new run its first weights; returns a sentence that says which.

    Without `init_from` the experts start from the model's own random MLPs, by the same rule (`upcycle`).

    Raises:
        ArtefactError: the weights cannot be read or do not fit.
    """
    source, spec = config.run.init_from, config.model_spec
    if source is None:
        if spec.experts is None:
            return "Starting from random weights."
        weights, said = _random_dense(config, spec), "Starting from random weights."
    else:
        weights, said = read_weights(source), f"Starting from {source}."
        if lacks_decoder(weights):
            fresh = _random_dense(config, spec)
            weights |= {name: tensor for name, tensor in fresh.items() if is_decoder(name)}
            said = f"Starting from {source}, which holds an encoder only: the decoder starts fresh."
    if spec.experts is None and has_experts(weights):
        raise ArtefactError(
            f"run.init_from: {source} holds experts; export one with `moce export` to start a dense run."
        )
    parameters = dict(global_parameters(model, runtime.rank))
    if spec.experts is not None and not has_experts(weights):
        weights = upcycle(weights, spec.experts, config.experts.perturbation, config.run.seed)
        gate = {name: p.detach().clone() for name, p in parameters.items() if name.startswith("gate.")}
        weights |= gate
    here = {name: tensor for name, tensor in weights.items() if name in parameters or not is_expert(name)}
    give_weights(parameters, here, str(source))
    return said


def _random_dense(config: PretrainSettings, spec: ModelSpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(config.run.seed)
    dense = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    return {name: p.detach() for name, p in dense.named_parameters()}
