"""What DeepSpeed's own `engine.save_checkpoint` wrote of one of our models, turned into a run folder of ours.

    DIR/latest                                               the newest tag
    DIR/TAG/mp_rank_00_model_states.pt                       everything that is not an expert, and counters
    DIR/TAG/layer_0_expert_3_mp_rank_00_model_states.pt      one expert, by expert layer (counted) and number
    DIR/TAG/..._optim_states.pt                              ZeRO's shards of the optimizer; not read

The files are pickles. They are read with `weights_only=True`, so that nothing in them is executed.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.checkpoint.format import step_folder, write_checkpoint
from moce_ds.checkpoint.parameters import expert_key, native_expert, with_plain_gate
from moce_ds.checkpoint.run_layout import ATTEMPTS, CLUSTERS, CONFIG, ROUTING
from moce_ds.checkpoint.weights import load_weights_strict
from moce_ds.clustering.clusters import Clusters, load_ids
from moce_ds.config import settings as configuration
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce
from moce_ds.models.shapes import ExpertShape
from moce_ds.models.warm_start import read_torch_file
from moce_ds.moe.layer import NUMBER
from moce_ds.moe.placement import default_placement
from moce_ds.storage.checksums import records_of, write_checked
from moce_ds.storage.files import atomic_folder, copy_tree, writes_to
from moce_ds.training.inputs import ClusteredData
from moce_ds.training.model import build_for_training
from moce_ds.training.router import Router
from moce_ds.training.settings import PretrainSettings

_SHARED_FILE = "mp_rank_00_model_states.pt"
_EXPERT_FILE = re.compile(r"^layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt$")
_ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class Native:
    """A checkpoint of DeepSpeed's, experts by their global names.

    Attributes:
        folder: of the tag.
        state: parameters and buffers as they were saved.
        step, images_read: optimizer steps taken, and images in them.
        version: of the DeepSpeed that wrote it, as it says.
    """

    folder: Path
    state: dict[str, Tensor]
    step: int
    images_read: int
    version: str

    @property
    def precision(self) -> str:
        """The types that weights (not tables) were saved in, such as "float32"."""
        dtypes = {tensor.dtype for name, tensor in self.state.items() if name.endswith(".weight")}
        return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def import_native(folder: Path, out: Path, config: PretrainSettings, tag: str | None = None) -> Native:
    """Write the run folder `out` with one checkpoint, weights only, from a folder of DeepSpeed's.

    Weights become fp32. What ZeRO keeps of the optimizer is left: it is cut for the processes that wrote it.

    Args:
        folder: what `engine.save_checkpoint` was given.
        out: must not exist.
        config: settings of the run that made the model; its clusters are copied.
        tag: which checkpoint; None: the one that `latest` names.

    Raises:
        ConfigError: `out` exists.
        ArtefactError: a file is missing, damaged or holds more than tensors and plain values; parameters are not those
            of the model, or clusters not those that it was trained with. What does not fit is listed.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: import into another folder, or remove it.")
    spec = config.model_spec
    native = read_native(_tag_folder(folder, tag), spec.experts)
    data = _clustered_data(config)
    model = build_for_training(spec, data.clusters if data else None, 1, config.run.seed)
    _give_state(model, native)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=out))
    with writes_to(out), atomic_folder(out) as draft:
        _write_run(draft, config, model, native, data)
    return native


def read_native(folder: Path, experts: ExpertShape | None) -> Native:
    """Read the files of one tag, of a model with such experts. Raises ArtefactError."""
    shared = _read(folder / _SHARED_FILE)
    step, images = (shared.get(counter) for counter in ("global_steps", "global_samples"))
    if not isinstance(step, int) or not isinstance(images, int) or not 0 <= step < 10**8:
        raise ArtefactError(f"{folder / _SHARED_FILE}: global_steps is {step!r}, global_samples {images!r}; no counts.")
    state = _tensors(shared.get("module"), folder / _SHARED_FILE)
    state = {with_plain_gate(name): tensor for name, tensor in state.items()}
    for block, path in _expert_files(folder, experts):
        state |= _expert(path, block)
    return Native(folder, state, step, images, str(shared.get("ds_version")))


def _tag_folder(folder: Path, tag: str | None) -> Path:
    """The folder of a tag, or `folder` itself where it is one."""
    if tag is None and (folder / _SHARED_FILE).exists():
        return folder
    if tag is None:
        latest = folder / "latest"
        if not latest.is_file():
            raise ArtefactError(
                f"{folder} holds neither `latest` nor {_SHARED_FILE}: expected what DeepSpeed's "
                f"save_checkpoint writes; folders here: {_listed(_folders(folder))}."
            )
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag not in _folders(folder):  # `latest` is not trusted to lead anywhere else
        raise ArtefactError(f"{folder} holds no checkpoint {tag!r}; folders here: {_listed(_folders(folder))}.")
    return folder / tag


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _listed(names: list[str], shown: int = 12) -> str:
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more]) or "none"


def _expert_files(folder: Path, experts: ExpertShape | None) -> list[tuple[int, Path]]:
    """Every expert's file with the block that it belongs to; none for a dense model."""
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
        summary = f"{folder} should hold {num} experts in each of {len(layers)} layers by the settings:"
        raise ArtefactError("\n  ".join([summary, *faults]))
    return [(layers[layer], path) for (layer, _), path in sorted(found.items())]


def _expert(path: Path, block: int) -> dict[str, Tensor]:
    """One expert's tensors by global names; its number is the file's own where it has one, as `ClusterMoE` writes."""
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
    """What a file holds by key. Raises ArtefactError."""
    if not path.is_file():
        raise ArtefactError(f"{path} not found: expected what save_checkpoint writes with ZeRO stage 0, 1 or 2.")
    content = read_torch_file(path, str(path))
    if not isinstance(content, dict):
        raise ArtefactError(
            f"{path} holds a {type(content).__name__}; expected what DeepSpeed's save_checkpoint writes."
        )
    return content


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The content of a file as tensors by name, dense ones in memory. Raises ArtefactError."""
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in state.items()):
        raise ArtefactError(f"{path} holds no weights: expected dense tensors by name.")
    return dict(state)


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of real numbers whose elements are all there."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.is_floating_point() or tensor.dtype == torch.int64


def _clustered_data(config: PretrainSettings) -> ClusteredData | None:
    """The clusters of the settings; None for a model that does not route by them. Raises ArtefactError."""
    folder = config.routing_clusters
    if folder is None:
        return None
    clusters = Clusters.open(folder)
    return ClusteredData(clusters, load_ids(folder, clusters.shards_fingerprint, int(clusters.sizes_M.sum())))


def _give_state(model: MaskedAutoencoder, native: Native) -> None:
    """Copy the weights into a model that holds all experts; its fixed tables must be those saved. ArtefactError."""
    buffers = dict(model.named_buffers())
    weights = {name: tensor for name, tensor in native.state.items() if name not in buffers}
    load_weights_strict(dict(global_parameters(model)), weights, str(native.folder))
    other = [name for name, table in buffers.items() if not _same_table(native.state.get(name), table)]
    if other:
        raise ArtefactError(
            f"{native.folder} was trained with other tables than the settings and clusters give: {', '.join(other)}. "
            "Give the config.yaml and the experts.clusters of that run."
        )


def _same_table(saved: Tensor | None, table: Tensor) -> bool:
    """Whether a fixed table was saved, up to the precision that it was saved in."""
    if saved is None or saved.shape != table.shape:
        return False
    return torch.allclose(saved.float(), table.to(saved.dtype).float(), rtol=1e-2, atol=1e-4)


def _write_run(
    draft: Path, config: PretrainSettings, model: MaskedAutoencoder, native: Native, data: ClusteredData | None
) -> None:
    """Settings, clusters, routes and the checkpoint, as pre-training writes them."""
    spec = config.model_spec
    slot_LE = default_placement(len(spec.experts.layers) if spec.experts else 0, config.experts.num)
    routing = None
    if data is not None:
        assert isinstance(model, Moce) and config.experts.clusters is not None
        router = Router(model, data.ids_N, slot_LE, config.experts, config.run.seed, _ALONE)
        routing = router.record(native.step)
        write_checked(draft / ROUTING, routing)
        copy_tree(config.experts.clusters, draft / CLUSTERS)
    (draft / CONFIG).write_text(configuration.to_yaml(config), encoding="utf-8")
    (draft / ATTEMPTS).mkdir()
    write_checked(draft / ATTEMPTS / "0001.json", {"files": records_of(draft, [CONFIG])})
    weights = {name: parameter.detach() for name, parameter in global_parameters(model)}
    manifest = {
        "step": native.step,
        "skipped": 0,
        "config": configuration.to_tree(config),
        "model": spec.to_tree(),
        "clusters_hash": data.clusters.hash if data else None,
        "shards_fingerprint": data.clusters.shards_fingerprint if data else None,
        "images_read": native.images_read,
        "routing": routing,
        "placement": {"ep_size": 1, "slot_LE": slot_LE.tolist()},
        "dealt_by": [],
        "imported_from": {"folder": str(native.folder), "deepspeed": native.version, "precision": native.precision},
    }
    write_checkpoint(step_folder(draft, native.step), weights, {}, manifest)
