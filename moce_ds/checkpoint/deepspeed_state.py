"""Conversion between a DeepSpeed engine and the checkpoint format. Every process writes and loads its share.

ZeRO distributes parameters and Adam's moments over processes; a process holds a fragment of a parameter's moments, or
nothing of them. DeepSpeed's `safe_get_full_optimizer_state` needs a collective for every tensor and gives it to every
process. Here the moments that one process writes travel together, in buckets, and to that process only. Experts are
renamed from local to global numbers, so the files are independent of the topology.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from moce_ds.checkpoint.format import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    file_of,
    grouped,
)
from moce_ds.checkpoint.shared_read import SharedReader, Wanted
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.parameters import (
    check_fit,
    expert_key,
    is_expert,
    load_weights_strict,
    local_expert,
    with_plain_gate,
)
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.deepspeed_token_layer import TokenMoeLayer

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 2**26  # bytes of a bucket; a larger tensor has one of its own


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
    writers = _writers(engine.module, state, runtime)
    files: Files = {f: tensors for f, tensors in grouped(STATE, state).items() if writers[f] == runtime.rank}
    moments: list[_Moment] = []
    for name, parameter in global_parameters(engine.module):
        weight, moment = f"{WEIGHTS}/{file_of(name)}", f"{OPTIMIZER}/{file_of(name)}"
        if writers[weight] == runtime.rank:  # fp32 already: precision bf16 is autocast
            files.setdefault(weight, {})[name] = parameter.detach()
        moments += [_Moment(parameter, name, kind, moment, writers[moment]) for kind in MOMENTS]
    return files | _collect(moments, runtime.rank)


def _writers(model: nn.Module, state: Mapping[str, Tensor], runtime: Runtime) -> dict[str, int]:
    """The rank that writes each file whose content this process holds: its holders take turns."""
    held: dict[bool, set[str]] = {False: set(grouped(STATE, state)), True: set()}
    for name, parameter in global_parameters(model):
        is_expert = not getattr(parameter, "allreduce", True)
        held[is_expert] |= {f"{part}/{file_of(name)}" for part in (WEIGHTS, OPTIMIZER)}
    ep_size = next((m.ep_size for m in model.modules() if isinstance(m, ClusterMoE | TokenMoeLayer)), 1)
    everyone, replicas = range(runtime.world_size), range(runtime.rank % ep_size, runtime.world_size, ep_size)
    return {
        file: holders[turn % len(holders)]
        for holders, files in ((everyone, held[False]), (replicas, held[True]))
        for turn, file in enumerate(sorted(files))
    }


@dataclass(frozen=True)
class _Moment:
    """A moment of a parameter, the file that holds it, and the rank that writes this file."""

    parameter: nn.Parameter
    name: str
    kind: str
    file: str
    writer: int

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that the moment is distributed over."""
        group: dist.ProcessGroup = self.parameter._dp_group  # type: ignore[attr-defined]
        return group

    def whole(self) -> Tensor:
        """The moment itself, not copied, where this process holds all of it."""
        fragment: Tensor = self.parameter._hp_mapping.get_hp_fragment(self.kind)  # type: ignore[attr-defined]
        return fragment.view(self.parameter.shape)

    def put_fragment(self, flat: Tensor) -> None:
        """Copy what this process holds of the moment to its place in `flat`, [elements]."""
        mapping = self.parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            place = mapping.lp_fragment_address
            flat.narrow(0, place.start, place.numel).copy_(mapping.get_hp_fragment(self.kind))


def _collect(moments: Iterable[_Moment], rank: int) -> dict[str, dict[str, Tensor]]:
    """The moments that this process writes, by file and name, in the given order; a collective.

    Args:
        moments: those of all parameters that this process holds, also if others write them. The members of a group name
            the same moments of it in the same order.
        rank: of this process.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for moment, tensor in _collected(moments, rank):
        files.setdefault(moment.file, {})[f"{moment.name}.{moment.kind}"] = tensor
    return files


def _collected(moments: Iterable[_Moment], rank: int) -> Iterator[tuple[_Moment, Tensor]]:
    # All processes take the groups in the same order: those of shared parameters before those of experts.
    ordered = sorted(moments, key=lambda one: (not getattr(one.parameter, "allreduce", True), one.writer))
    for (writer, group), together in groupby(ordered, key=lambda one: (one.writer, one.group)):
        if dist.get_world_size(group) == 1:
            yield from ((moment, moment.whole()) for moment in together)
            continue
        for bucket in _buckets(together):
            flats = _reduced(bucket, writer, group)
            if rank == writer:
                yield from zip(bucket, flats, strict=True)


def _buckets(moments: Iterable[_Moment]) -> Iterator[list[_Moment]]:
    """Consecutive moments of up to `BUCKET` bytes."""
    bucket: list[_Moment] = []
    filled = 0
    for moment in moments:
        size = 4 * moment.parameter.numel()
        if bucket and filled + size > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(moment)
        filled += size
    if bucket:
        yield bucket


def _reduced(bucket: list[_Moment], writer: int, group: dist.ProcessGroup) -> list[Tensor]:
    """The whole moments of a bucket on the `writer`; elsewhere their content is undefined."""
    sizes = [moment.parameter.numel() for moment in bucket]
    buffer = torch.zeros(sum(sizes), device=bucket[0].parameter.device)
    flats = buffer.split(sizes)
    for moment, flat in zip(bucket, flats, strict=True):
        moment.put_fragment(flat)
    dist.reduce(buffer, writer, group=group)  # one process adds each element to the zeros of the others
    return [flat.view(moment.parameter.shape) for moment, flat in zip(bucket, flats, strict=True)]


def load_checkpoint(engine: DeepSpeedEngine, reader: SharedReader) -> None:
    """Load the weights and moments of a checkpoint into an engine, written by any topology; a collective.

    Raises:
        DamagedError: a file is damaged; as in the other case, the engine may hold parts of the checkpoint then.
        ArtefactError: the parameters are not those of the model; they are named.
    """
    checkpoint = reader.checkpoint
    _make_moments(engine, float(checkpoint.step - checkpoint.entry("skipped")))
    _link_moments(engine)
    held = _by_file(engine.module)

    def take(name: str, content: Tensor) -> None:
        part, _, file = name.partition("/")
        tensors = checkpoint.tensors(name, content)
        (_take_weights if part == WEIGHTS else _take_moments)(held[file], tensors, str(checkpoint.folder))

    groups = {file: next(iter(parameters.values()))._dp_group for file, parameters in held.items()}  # type: ignore[attr-defined]
    wanted = [Wanted(f"{part}/{file}", groups[file]) for file in held for part in (WEIGHTS, OPTIMIZER)]
    reader.read(wanted, take)


def _by_file(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of this process by file and global name, those that all processes hold first."""
    files: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in global_parameters(model):
        files.setdefault(file_of(name), {})[name] = parameter
    return dict(sorted(files.items(), key=lambda item: (is_expert(next(iter(item[1]))), item[0])))


def _take_weights(parameters: Mapping[str, nn.Parameter], weights: dict[str, Tensor], source: str) -> None:
    load_weights_strict(parameters, weights, source)
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name])


def _take_moments(parameters: Mapping[str, nn.Parameter], moments: dict[str, Tensor], source: str) -> None:
    check_fit({f"{name}.{kind}": p for name, p in parameters.items() for kind in MOMENTS}, moments, source)
    for name, parameter in parameters.items():
        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[f"{name}.{kind}"], kind)


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
