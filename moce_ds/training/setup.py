"""From settings to everything a run needs before its first step."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moce_ds.checkpoint import format as checkpoint_files
from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_layout import ATTEMPTS, LAUNCHES
from moce_ds.checkpoint.weights import load_weights_strict
from moce_ds.clustering.clusters import Clusters, load_ids
from moce_ds.clustering.feature_store import check_encoder
from moce_ds.config import settings as configuration
from moce_ds.config.values import recorded_path
from moce_ds.data.shards import ShardSet
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import ExpertShape, Moce, upcycle
from moce_ds.models.sdr import part_units
from moce_ds.models.warm_start import has_experts, is_decoder, is_expert, lacks_decoder, read_weights
from moce_ds.moe.experts import choose_execution, run_grouped, run_one_by_one
from moce_ds.moe.gate import route_table
from moce_ds.moe.layer import ClusterMoE
from moce_ds.moe.placement import default_placement, held_experts, placement_by_traffic
from moce_ds.moe.token_layer import TokenMoE
from moce_ds.storage.checksums import FileRecord
from moce_ds.storage.files import atomic_folder, copy_tree, writes_to
from moce_ds.text import is_utf8
from moce_ds.training.settings import AnySettings, PretrainSettings, forbidden_changes, settings_of_run


@dataclass(frozen=True)
class ClusteredData:
    """The clusters of a run and the cluster of every image of its shard set."""

    clusters: Clusters
    ids_N: np.ndarray


def check_run(config: AnySettings) -> None:
    """Check that the run folder is free, or holds the same run.

    Raises:
        ConfigError: it is no folder; or holds something else, or a run with other settings that define the experiment,
            which are listed.
    """
    out, path = config.run.out, config.run.out / "config.yaml"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"run.out: {out} is a file; expected a folder, or nothing, there: choose another one.")
    if not is_utf8(out):
        raise ConfigError(f"run.out: {out} holds bytes that are no UTF-8, which TensorBoard refuses: choose another.")
    if path.exists():
        old = configuration.to_tree(settings_of_run(path, type(config)))
        changed = configuration.differences(old, configuration.to_tree(config))
        forbidden = forbidden_changes(set(changed), type(config))
        if forbidden:
            listed = "\n".join(f"  {key}: {changed[key][0]} -> {changed[key][1]}" for key in sorted(forbidden))
            raise ConfigError(
                f"{out} holds another run; these settings may not change when it is resumed:\n{listed}\n"
                "Give the settings of that run, or another run.out."
            )
    elif out.exists() and {path.name for path in out.iterdir()} - {
        ATTEMPTS,
        LAUNCHES,
    }:  # an earlier start may have failed
        raise ConfigError(f"run.out: {out} is not empty and holds no run (no config.yaml): choose another folder.")


def check_same_data(config: PretrainSettings, shards: ShardSet, data: ClusteredData | None) -> None:
    """Refuse to go on with other images or clusters than the run was trained on, whatever their path.

    Raises:
        ArtefactError: `data.shards` or `experts.clusters` was replaced since the newest checkpoint.
    """
    found = [(f"data.shards: {config.data.shards}", "shards_fingerprint", shards.fingerprint)]
    if data is not None:
        found.append((f"experts.clusters: {config.experts.clusters}", "clusters_hash", data.clusters.hash))
    refuse_other(config.run.out, found, f"start another run: run.init_from={config.run.out}")


def check_same_settings(config: AnySettings) -> None:
    """Refuse to go on with settings that differ from those of the newest checkpoint, whatever config.yaml says by now.

    Raises:
        ConfigError: settings that define the experiment are listed.
    """
    checkpoint = _newest_readable(config.run.out)
    if checkpoint is None:
        return
    now = configuration.to_tree(config)
    different = configuration.differences(_filled(checkpoint.manifest.get("config", {}), now), now)
    changed = {key: pair for key, pair in different.items() if not _one_path(*pair)}
    if forbidden := sorted(forbidden_changes(set(changed), type(config))):
        listed = "\n".join(f"  {key}: {changed[key][0]} -> {changed[key][1]}" for key in forbidden)
        raise ConfigError(
            f"{config.run.out} was trained with other settings up to step {checkpoint.step}:\n{listed}\n"
            f"Put {config.run.out / 'config.yaml'} back as the run wrote it, or give another run.out."
        )


def _filled(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The old values of the new keys, and the new ones of those that an earlier version did not have."""
    return {
        key: _filled(old[key], value)
        if isinstance(value, dict) and isinstance(old.get(key), dict)
        else old.get(key, value)
        for key, value in new.items()
    }


def _one_path(old: Any, new: Any) -> bool:
    """Whether both are texts of one path, which an earlier version wrote with a single `$`."""
    return isinstance(old, str) and isinstance(new, str) and recorded_path(old) == recorded_path(new)


def refuse_other(run: Path, found: list[tuple[str, str, str]], otherwise: str) -> None:
    """Refuse to go on with something else than the newest checkpoint was made with.

    Args:
        found: for each thing what it is, the record of it in a manifest, and its hash now.
        otherwise: what to do instead of putting it back.

    Raises:
        ArtefactError: one has changed; it is named.
    """
    checkpoint = _newest_readable(run)
    if checkpoint is None:
        return
    for named, record, now in found:
        then = checkpoint.manifest.get(record)
        if then not in (now, None):  # None: imported from elsewhere, which did not say
            raise ArtefactError(
                f"{named} is not what the run was trained with ({now[:12]} now, {then[:12]} at step "
                f"{checkpoint.step}): put back what was there, or {otherwise}."
            )


def _newest_readable(run: Path) -> checkpoint_files.Checkpoint | None:
    for step in reversed(checkpoint_files.steps_of(run)):
        with suppress(ArtefactError):  # a damaged one is named when the run goes on from the one before it
            return checkpoint_files.Checkpoint.open(checkpoint_files.step_folder(run, step))
    return None


def keep_settings(config: AnySettings, attempt: RunLease, runtime: Runtime) -> None:
    """Write the settings into the run folder, which makes it one. Called when nothing is left that can be refused.

    Raises:
        ArtefactError, SupersededError: the folder cannot be written to.
    """
    runtime.barrier()  # everyone has looked before anyone writes
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            text = configuration.to_yaml(config).encode()
            record = FileRecord(len(text), hashlib.sha256(text).hexdigest())
            attempt.note("config.yaml", record, step=0)  # first: a kill leaves settings that some attempt has noted
            with attempt.file(config.run.out / "config.yaml", step=0) as draft:
                draft.write_bytes(text)


def open_clusters(config: PretrainSettings, shards: ShardSet) -> ClusteredData | None:
    """The clusters of a run with experts, checked to be those of the shard set. Raises ArtefactError."""
    folder = config.experts.clusters
    if config.model.arch != "moce" or config.experts.gate == "token" or folder is None:
        return None
    clusters = Clusters.open(folder)
    check_encoder(folder, clusters.encoder_fingerprint, clusters.files)  # labels a task's images when the run is over
    check_paths(config, len(clusters.sizes_M))
    return ClusteredData(clusters, load_ids(folder, shards.fingerprint, shards.count))


def check_paths(config: PretrainSettings, clusters: int) -> None:
    """Raise ConfigError where the paths of SDR are more than the clusters, so that some groups would learn nothing."""
    own = config.experts
    if own.gate == "path" and own.num**own.stages > clusters:
        raise ConfigError(
            f"experts.stages: {own.num} groups in {own.stages} stages make {own.num**own.stages} paths for {clusters} "
            f"clusters: expected at most as many. Lower experts.stages, or cluster into {own.num**own.stages}."
        )


def keep_clusters(config: PretrainSettings, runtime: Runtime) -> None:
    """Put the clusters into the run folder, so that the run alone can label a task's images.

    Raises:
        ArtefactError: the folder cannot be written to.
    """
    source, target = config.experts.clusters, config.run.out / "clusters"
    with runtime.raise_on_all_ranks(), writes_to(target):
        if runtime.is_main and source is not None and not target.exists():
            with atomic_folder(target) as draft:
                copy_tree(source, draft)


def build_for_training(config: PretrainSettings, data: ClusteredData | None) -> MaskedAutoencoder:
    """The model with its first weights' random start: the same on every process, experts aside."""
    torch.manual_seed(config.run.seed)
    own, width = config.experts, config.vit_shape.width

    def make_layer(make_expert: Callable[[], nn.Module], num_experts: int, shared: bool) -> nn.Module:
        if own.gate == "token":
            return TokenMoE(make_expert, width, num_experts, own.ep_size, own.k)
        return ClusterMoE(make_expert, num_experts, own.ep_size, shared)

    return build_model(config.model_spec, data.clusters if data else None, make_layer)


def tune_execution(model: MaskedAutoencoder, config: PretrainSettings, device: torch.device) -> None:
    """How blocks and experts are computed; changes speed and memory, never the result."""
    own, engine = config.experts, config.engine
    rules = {"one_by_one": run_one_by_one, "grouped": run_grouped}
    for module in model.modules():
        if isinstance(module, ClusterMoE):
            bf16 = engine.precision == "bf16"
            auto = choose_execution(device, bf16, module.num_local_experts)
            module.execute = rules.get(own.execution, auto)
    model.checkpoint_activations = engine.checkpoint_activations
    if engine.compile:
        expert_blocks = set(config.expert_layers) if config.model.arch == "moce" else set()
        for index, block in enumerate(model.blocks):
            if index not in expert_blocks:
                block.compile()
        for block in model.decoder_blocks:
            block.compile()


def choose_placement(
    model: MaskedAutoencoder,
    config: PretrainSettings,
    data: ClusteredData | None,
    weights: dict[str, Tensor] | None,
    resume_from: checkpoint_files.Checkpoint | None,
) -> np.ndarray:
    """Where experts live for this start of the run, slot_LE: in order, or fitted to the route table at hand.

    The table is that of the first weights' gate, or of the checkpoint, whose files know nothing of the placement. A run
    resumed with the same `ep_size` keeps its placement, so that it goes on bit for bit.
    """
    own = config.experts
    layers = len(config.expert_layers) if config.model.arch == "moce" else 0
    if data is None or own.ep_size == 1 or not own.loader_locality:
        return default_placement(layers, own.num)
    assert isinstance(model, Moce)
    if resume_from is not None:
        saved = np.array(resume_from.entry("placement", "slot_LE"), dtype=np.int64)
        if resume_from.entry("placement", "ep_size") == own.ep_size:
            return saved
        expert_ML = np.array(resume_from.entry("routing", "expert_ML"), dtype=np.int64)
    else:
        gates = {name: parameter for name, parameter in global_parameters(model) if name.startswith("gate.")}
        given = {name: tensor for name, tensor in (weights or {}).items() if name in gates}
        load_weights_strict(gates, given, str(config.run.init_from))
        with torch.no_grad():
            expert_ML = route_table(model.gate, model.gate(), model.share_M, 1, own.balance)[:, :, 0].numpy()
    return placement_by_traffic(expert_ML, data.clusters.share_M, own.num, own.ep_size)


def place_experts(model: MaskedAutoencoder, slot_LE: np.ndarray, rank: int) -> None:
    """Tell every expert layer which global experts this rank holds."""
    layers = [m for m in model.modules() if isinstance(m, ClusterMoE | TokenMoE)]
    for layer, slot_E in zip(layers, slot_LE, strict=True):
        layer.set_local_experts(held_experts(slot_E, rank % layer.ep_size, layer.ep_size))


def first_weights(model: MaskedAutoencoder, config: PretrainSettings) -> tuple[dict[str, Tensor], str]:
    """A new run's weights by global names, all experts included, and a sentence that says where they come from.

    Without `init_from` the experts start from the model's own random MLPs, by the same rule (`upcycle`).

    Raises:
        ArtefactError: the weights cannot be read, or hold experts where a dense run is wanted.
    """
    source, spec = config.run.init_from, config.model_spec
    fresh = _random_dense(config, spec)
    if source is None:
        weights, said = dict(fresh), "Starting from random weights."
    else:
        weights, said = read_weights(source, config.run.replace_positions), f"Starting from {source}."
        if lacks_decoder(weights):
            weights |= {name: tensor for name, tensor in fresh.items() if is_decoder(name)}
            said = f"Starting from {source}, which holds an encoder only: the decoder starts fresh."
        if config.run.replace_positions:
            said += " Its position tables are replaced by fixed sine-cosine ones."
    if spec.experts is None:
        if has_experts(weights):
            raise ArtefactError(
                f"run.init_from: {source} holds experts; export one with `moce export` to start a dense run."
            )
    elif not has_experts(weights):
        weights = _with_experts(weights, spec.experts, config)
        gates = {name: p.detach().clone() for name, p in global_parameters(model) if "gate." in name}
        weights |= gates
    return weights, said


def _with_experts(dense: dict[str, Tensor], experts: ExpertShape, config: PretrainSettings) -> dict[str, Tensor]:
    if experts.gate == "path":
        return part_units(dense, experts)
    return upcycle(dense, experts, config.experts.perturbation, config.run.seed)


def take_weights(model: MaskedAutoencoder, weights: dict[str, Tensor], source: Path | None) -> None:
    """Give a model whose experts have their places those of the weights that it holds. Raises ArtefactError."""
    parameters = dict(global_parameters(model))
    here = {name: tensor for name, tensor in weights.items() if name in parameters or not is_expert(name)}
    load_weights_strict(parameters, here, str(source))


def _random_dense(config: PretrainSettings, spec: ModelSpec) -> dict[str, Tensor]:
    torch.manual_seed(config.run.seed)
    dense = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    return {name: p.detach() for name, p in dense.named_parameters()}
