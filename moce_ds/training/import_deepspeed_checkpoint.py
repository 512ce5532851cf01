"""Converts a checkpoint that DeepSpeed's `engine.save_checkpoint` wrote of a model of this package to a run folder.

    DIR/latest                                               the newest tag
    DIR/TAG/mp_rank_00_model_states.pt                       all parameters except experts, and counters
    DIR/TAG/layer_0_expert_3_mp_rank_00_model_states.pt      one expert, by index of the expert layer and of the expert
    DIR/TAG/..._optim_states.pt                              ZeRO's shards of the optimizer state; not read

The files are pickles. They are read with `weights_only=True`, so that nothing in them is executed.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.checkpoint.format import ROUTING, step_folder, write_checkpoint
from moce_ds.checkpoint.records import RoutingTable
from moce_ds.checkpoint.run_folder import ATTEMPTS, CLUSTERS, CONFIG
from moce_ds.checkpoint.weight_files import read_torch_file
from moce_ds.common.config import settings as configuration
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.checksums import records_of, write_checked
from moce_ds.common.storage.files import atomic_folder, copy_tree, writes_to
from moce_ds.data.clusters import Clusters, load_ids
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce
from moce_ds.models.parameters import expert_key, load_weights_strict, native_expert, with_plain_gate
from moce_ds.models.shapes import ExpertShape
from moce_ds.moe.deepspeed_layer import NUMBER
from moce_ds.moe.placement import default_placement
from moce_ds.training.inputs import ClusteredData
from moce_ds.training.placed_model import build_for_training
from moce_ds.training.router import Router
from moce_ds.training.settings import PretrainSettings

_SHARED_FILE = "mp_rank_00_model_states.pt"
_EXPERT_FILE = re.compile(r"^layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt$")
_SHOWN = 12  # names in a message
_ALONE = Runtime.alone(torch.device("cpu"))


@dataclass(frozen=True)
class Native:
    """A checkpoint that DeepSpeed wrote.

    Attributes:
        folder: the folder of the tag.
        state: the saved parameters and buffers, experts under their global names.
        step, images_read: optimizer steps, and images read in them.
        version: the version of DeepSpeed that the checkpoint names.
    """

    folder: Path
    state: dict[str, Tensor]
    step: int
    images_read: int
    version: str

    @property
    def precision(self) -> str:
        """The data types of the saved weights, tables excluded, such as "float32"."""
        dtypes = {tensor.dtype for name, tensor in self.state.items() if name.endswith(".weight")}
        return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def import_native(folder: Path, out: Path, config: PretrainSettings, tag: str | None = None) -> Native:
    """Write the run folder `out` with one checkpoint, weights only, from a folder that DeepSpeed wrote.

    Weights become fp32. The optimizer state is not imported: ZeRO has partitioned it for the processes that wrote it.

    Args:
        folder: the folder that `engine.save_checkpoint` was given.
        out: must not exist.
        config: settings of the run that trained the model; its clusters are copied.
        tag: the checkpoint to import; None: the one that `latest` names.

    Raises:
        ConfigError: `out` exists.
        ArtefactError: a file is missing, damaged, or contains more than tensors and plain values; or the parameters do
            not match the model, or the clusters are not those of the training. The message lists what does not match.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: import into another folder, or remove it.")
    spec, experts, seed = config.model_spec, config.experts, config.run.seed
    native = read_native(_tag_folder(folder, tag), spec.experts)
    data = _clustered_data(config.routing_clusters)
    model = build_for_training(spec, data.clusters if data else None, 1, seed)
    _load_state(model, native)
    slot_LE, routing = default_placement(len(spec.experts.layers) if spec.experts else 0, experts.num), None
    if data and isinstance(model, Moce):
        routing = Router(model, data.ids_N, slot_LE, experts, seed, _ALONE).record(native.step)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=out))
    made_from = {"config": configuration.to_tree(config), "model": spec.to_tree(), **_hashes(data)}
    manifest = _manifest(native, made_from, routing, slot_LE)
    with writes_to(out), atomic_folder(out) as draft:
        _write_run(draft, configuration.to_yaml(config), config.routing_clusters, model, manifest)
    return native


def read_native(folder: Path, experts: ExpertShape | None) -> Native:
    """Read the files of one tag. `experts`: those of the model. Raises ArtefactError."""
    shared = _read(folder / _SHARED_FILE)
    step, images = (shared.get(counter) for counter in ("global_steps", "global_samples"))
    if not isinstance(step, int) or not isinstance(images, int) or not 0 <= step < 10**8:
        raise ArtefactError(
            f"{folder / _SHARED_FILE}: global_steps is {step!r}, global_samples {images!r}; expected counts."
        )
    state = _tensors(shared.get("module"), folder / _SHARED_FILE)
    state = {with_plain_gate(name): tensor for name, tensor in state.items()}
    for block, path in _expert_files(folder, experts):
        state |= _expert(path, block)
    return Native(folder, state, step, images, str(shared.get("ds_version")))


def _tag_folder(folder: Path, tag: str | None) -> Path:
    """The folder of a tag; `folder` itself if it is the folder of a tag."""
    if tag is None and (folder / _SHARED_FILE).exists():
        return folder
    if tag is None:
        latest = folder / "latest"
        if not latest.is_file():
            raise ArtefactError(
                f"{folder} holds neither `latest` nor {_SHARED_FILE}: expected the output of DeepSpeed's "
                f"save_checkpoint; folders here: {_listed(_folders(folder))}."
            )
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag not in _folders(folder):  # `latest` must not name a path outside
        raise ArtefactError(f"{folder} holds no checkpoint {tag!r}; folders here: {_listed(_folders(folder))}.")
    return folder / tag


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more]) or "none"


def _expert_files(folder: Path, experts: ExpertShape | None) -> list[tuple[int, Path]]:
    """The file of every expert with the expert's block; none for a dense model."""
    layers, num = (experts.layers, experts.num_experts) if experts else ((), 0)
    wanted = {(layer, expert) for layer in range(len(layers)) for expert in range(num)}
    matches = (_EXPERT_FILE.match(path.name) for path in folder.iterdir())
    found = {(int(match[1]), int(match[2])): folder / match[0] for match in matches if match}
    named = {"missing": wanted - found.keys(), "not in the settings": found.keys() - wanted}
    faults = [
        f"{what}: {_listed([f'layer {layer} expert {expert}' for layer, expert in sorted(which)])}"
        for what, which in named.items()
        if which
    ]
    if faults:
        summary = f"{folder}: the settings give {num} experts in each of {len(layers)} layers; the files differ:"
        raise ArtefactError("\n  ".join([summary, *faults]))
    return [(layers[layer], path) for (layer, _), path in sorted(found.items())]


def _expert(path: Path, block: int) -> dict[str, Tensor]:
    """The tensors of one expert by global names. The tensor `NUMBER`, which `ClusterMoE` saves, overrides the number of
    the expert in the names."""
    state = _tensors(_read(path), path)
    found = {name: expert for name in state if (expert := native_expert(name))}
    parts = {expert.rest: name for name, expert in found.items()}
    places = {(expert.block, expert.number) for expert in found.values()}
    if len(parts) != len(state) or {place for place, _ in places} != {block} or len(places) != 1:
        raise ArtefactError(f"{path}: expected one expert of block {block}, found {_listed(sorted(state))}.")
    tensors = {rest: state[name] for rest, name in parts.items()}
    ((_, counted),) = places
    number: Any = tensors.pop(NUMBER).tolist() if NUMBER in tensors else counted
    return {expert_key(block, number, rest): tensor for rest, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Any]:
    """The content of a file by key. Raises ArtefactError."""
    if not path.is_file():
        raise ArtefactError(f"{path} not found: expected a file that save_checkpoint writes with ZeRO stage 0, 1 or 2.")
    content = read_torch_file(path, str(path))
    if not isinstance(content, dict):
        raise ArtefactError(
            f"{path} holds a {type(content).__name__}; expected a dict, as DeepSpeed's save_checkpoint writes."
        )
    return content


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The dense tensors of a file by name. Raises ArtefactError if it contains anything else."""
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in state.items()):
        raise ArtefactError(f"{path} holds no weights: expected dense tensors by name.")
    return dict(state)


def _is_plain(tensor: Any) -> bool:
    """Whether it is a dense CPU tensor of real numbers."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.is_floating_point() or tensor.dtype == torch.int64


def _clustered_data(folder: Path | None) -> ClusteredData | None:
    """The clusters in a folder; None without one, for a model that does not route by clusters. Raises ArtefactError."""
    if folder is None:
        return None
    clusters = Clusters.open(folder)
    return ClusteredData(clusters, load_ids(folder, clusters.shards_fingerprint, int(clusters.sizes_M.sum())))


def _load_state(model: MaskedAutoencoder, native: Native) -> None:
    """Copy the weights into a model that holds all experts, and check that its fixed tables equal the saved ones.

    Raises:
        ArtefactError: weights or tables do not match.
    """
    buffers = dict(model.named_buffers())
    weights = {name: tensor for name, tensor in native.state.items() if name not in buffers}
    load_weights_strict(dict(global_parameters(model)), weights, str(native.folder))
    other = [name for name, table in buffers.items() if not _same_table(native.state.get(name), table)]
    if other:
        raise ArtefactError(
            f"{native.folder} was trained with other tables than those of the settings and clusters: "
            f"{', '.join(other)}. Give the config.yaml and the experts.clusters of that run."
        )


def _same_table(saved: Tensor | None, table: Tensor) -> bool:
    """Whether a fixed table was saved and is equal, up to the precision of the saved one."""
    if saved is None or saved.shape != table.shape:
        return False
    return torch.allclose(saved.float(), table.to(saved.dtype).float(), rtol=1e-2, atol=1e-4)


def _hashes(data: ClusteredData | None) -> dict[str, str | None]:
    """The inputs of the training as a manifest names them; None if they are unknown."""
    return {
        "clusters_hash": data.clusters.hash if data else None,
        "shards_fingerprint": data.clusters.shards_fingerprint if data else None,
    }


def _manifest(
    native: Native, made_from: dict[str, Any], routing: RoutingTable | None, slot_LE: NDArray[np.int64]
) -> dict[str, Any]:
    """The manifest of the checkpoint without its files."""
    return {
        "step": native.step,
        "skipped": 0,
        **made_from,
        "images_read": native.images_read,
        "routing": routing,
        "placement": {"ep_size": 1, "slot_LE": slot_LE.tolist()},
        "dealt_by": [],
        "imported_from": {"folder": str(native.folder), "deepspeed": native.version, "precision": native.precision},
    }


def _write_run(
    draft: Path, settings: str, clusters: Path | None, model: MaskedAutoencoder, manifest: dict[str, Any]
) -> None:
    """Write settings (YAML), clusters, routes and the checkpoint, as pre-training does."""
    if clusters is not None:
        manifest["routing"].write(draft / ROUTING)
        copy_tree(clusters, draft / CLUSTERS)
    (draft / CONFIG).write_text(settings, encoding="utf-8")
    (draft / ATTEMPTS).mkdir()
    write_checked(draft / ATTEMPTS / "0001.json", {"files": records_of(draft, [CONFIG])})
    weights = {name: parameter.detach() for name, parameter in global_parameters(model)}
    write_checkpoint(step_folder(draft, manifest["step"]), weights, {}, manifest)
