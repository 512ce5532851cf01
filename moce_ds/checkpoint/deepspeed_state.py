"""Conversion between a DeepSpeed engine and the checkpoint format. Every process writes and loads its share.

ZeRO distributes parameters and Adam's moments over processes; DeepSpeed's `safe_get_full_...` gather one parameter at a
time. Experts are renamed from local to global numbers, so the files are independent of the topology.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from moce_ds.checkpoint.format import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoint,
    file_of,
    grouped,
    set_aside,
    step_folder,
    steps_of,
)
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import writes_to
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.parameters import expert_key, load_weights_strict, local_expert, with_plain_gate
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.deepspeed_token_layer import TokenMoeLayer

MOMENTS = ("exp_avg", "exp_avg_sq")


def global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of this process that learn, by global names: a local expert becomes its global number."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if (expert := local_expert(name)) is not None:
            layer = model.get_submodule(f"blocks.{expert.block}.mlp")
            assert isinstance(layer, ClusterMoE | TokenMoeLayer)
            name = expert_key(expert.block, layer.expert_ids[expert.number], expert.rest)
        yield with_plain_gate(name), parameter


Files = dict[str, dict[str, Tensor]]  # tensors by file and name


class HostBuffers:
    """Host memory that all checkpoints reuse: allocating new pages would take longer than the copy."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # beside that of training

    def copies(self, files: Files, ready: torch.cuda.Event | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the files one by one with copies of their tensors, made after the device has reached `ready`."""
        for file, tensors in files.items():
            with torch.cuda.stream(self._stream):  # without a stream this does nothing
                if ready is not None:
                    ready.wait()
                copied = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            if self._stream is not None:
                self._stream.synchronize()
            yield file, copied

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._kept:
            self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._kept[name].copy_(tensor, non_blocking=True)


def snapshot(engine: DeepSpeedEngine, runtime: Runtime, state: Mapping[str, Tensor]) -> Files:
    """The weights, Adam moments and `state` that this process writes, by file; every process must call it.

    A tensor that this process holds completely is not copied: the next update changes it. The files are distributed
    over the processes that hold their content: those of shared parameters over all, those of an expert over its
    replicas.

    Args:
        state: further state of the run, by name; the same on all processes.
    """
    _link_moments(engine)
    mine = _files_to_write(engine.module, state, runtime)
    files: Files = {file: tensors for file, tensors in grouped(STATE, state).items() if file in mine}
    for name, parameter in global_parameters(engine.module):
        weight, moment = f"{WEIGHTS}/{file_of(name)}", f"{OPTIMIZER}/{file_of(name)}"
        if weight in mine:  # fp32 already: precision bf16 is autocast
            files.setdefault(weight, {})[name] = parameter.detach()
        for kind in MOMENTS:
            whole = _whole_moment(parameter, kind)  # a collective, needed even if this process does not write it
            if moment in mine:
                files.setdefault(moment, {})[f"{name}.{kind}"] = whole
    return files


def _files_to_write(model: nn.Module, state: Mapping[str, Tensor], runtime: Runtime) -> set[str]:
    """The files that this process writes, a share of those whose content it holds."""
    held: dict[bool, set[str]] = {False: set(grouped(STATE, state)), True: set()}
    for name, parameter in global_parameters(model):
        is_expert = not getattr(parameter, "allreduce", True)
        held[is_expert] |= {f"{part}/{file_of(name)}" for part in (WEIGHTS, OPTIMIZER)}
    ep_size = next((m.ep_size for m in model.modules() if isinstance(m, ClusterMoE | TokenMoeLayer)), 1)
    replica, replicas = runtime.rank // ep_size, runtime.world_size // ep_size
    return {*sorted(held[False])[runtime.rank :: runtime.world_size], *sorted(held[True])[replica::replicas]}


def _whole_moment(parameter: nn.Parameter, kind: str) -> Tensor:
    """An Adam moment gathered from all processes, or not copied if one process holds all of it."""
    if dist.get_world_size(parameter._dp_group) == 1:  # type: ignore[attr-defined]
        return parameter._hp_mapping.get_hp_fragment(kind).view(parameter.shape)  # type: ignore[attr-defined]
    return safe_get_full_optimizer_state(parameter, kind)


def latest_valid_checkpoint(run: Path, runtime: Runtime) -> Checkpoint | None:
    """The newest checkpoint of a run whose files are intact; None if the run has no checkpoint.

    A collective: the processes share the reading. Newer, damaged checkpoints are renamed `damaged-step-...`, with a
    warning.

    Raises:
        ArtefactError: there are checkpoints, but none is intact; nothing was renamed.
    """
    steps = json.loads(runtime.texts(json.dumps(steps_of(run)))[0])  # as rank 0 sees them
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps):
        faults = verify_checkpoint(run, step, runtime)
        if not faults:
            _set_aside(run, damaged, step, runtime)
            return Checkpoint.open(step_folder(run, step), resumable=True)
        damaged[step] = faults
    if damaged:
        listed = "\n".join(f"  {fault}" for faults in damaged.values() for fault in faults)
        raise ArtefactError(
            f"{run} holds no valid checkpoint to resume from:\n{listed}\nRestore these files, or remove "
            f"{run / 'checkpoints'} to begin at step 0."
        )
    return None


def verify_checkpoint(run: Path, step: int, runtime: Runtime) -> list[str]:
    """The faults of a checkpoint. A collective: the processes share the reading, and all get the result."""
    try:
        mine = Checkpoint.open(step_folder(run, step), resumable=True).faults(runtime.rank, runtime.world_size)
    except ArtefactError as error:
        mine = [str(error)]
    return sorted({line for text in runtime.texts("\n".join(mine)) for line in text.splitlines()})


def _set_aside(run: Path, damaged: dict[int, list[str]], good: int, runtime: Runtime) -> None:
    with runtime.raise_on_all_ranks(), writes_to(run):
        for step, faults in damaged.items():
            aside = set_aside(run, step) if runtime.is_main else None
            listed = "\n".join(f"  {fault}" for fault in faults)
            runtime.warn(
                f"the checkpoint of step {step} is damaged; resuming from step {good}, the newest valid one:\n"
                f"{listed}\n  It is kept as {aside}."
            )


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, runtime: Runtime) -> None:
    """Load the weights and moments of a checkpoint into an engine, written by any topology.

    Raises:
        ArtefactError: a file is damaged, or the parameters are not those of the model; they are named.
    """
    parameters = dict(global_parameters(engine.module))
    with runtime.raise_on_all_ranks():  # each process reads different files
        weights, moments = checkpoint.load(WEIGHTS, parameters), checkpoint.load(OPTIMIZER, parameters)
        load_weights_strict(parameters, weights, str(checkpoint.folder))
    _make_moments(engine, float(checkpoint.step - checkpoint.entry("skipped")))
    _link_moments(engine)
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[f"{name}.{moment}"].to(parameter.device), moment)


def _make_moments(engine: DeepSpeedEngine, step: float) -> None:
    """Create Adam's state as after `step` updates; torch itself creates it only in the first step."""
    adam = engine.optimizer.optimizer
    for group in adam.param_groups:
        for flat in group["params"]:
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            # As torch does: AdamW's fused kernel counts on the device.
            counter = torch.tensor(step, device=flat.device if group["fused"] else "cpu")
            adam.state[flat] = {"step": counter, **zeros}


def _link_moments(engine: DeepSpeedEngine) -> None:
    """Connect parameters with their parts of Adam's flat state.

    DeepSpeed 0.19.8 does it after the first parameter group has stepped, when the groups of the experts have no state
    yet, and never again.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
