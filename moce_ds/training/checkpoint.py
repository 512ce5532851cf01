"""Between a DeepSpeed engine and the checkpoint format: every process gives and takes what it holds.

ZeRO cuts parameters and Adam's moments over processes; DeepSpeed's `safe_get_full_...` put one parameter at a time
together again. Experts are renamed from local to global numbers, so the files know nothing of the topology.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from moce_ds.checkpoint_files import (
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    draft_folder,
    prune,
    publish,
    step_folder,
    write_part,
)
from moce_ds.models.spec import give_weights
from moce_ds.moe.layer import ClusterMoE
from moce_ds.moe.token_layer import TokenMoE
from moce_ds.runtime import Runtime

MOMENTS = ("exp_avg", "exp_avg_sq")
# Our layers name a local expert `mlp.experts.0.`, DeepSpeed's stock layer (gate=token) with two more words.
_LOCAL_EXPERT = re.compile(r"^(blocks\.\d+\.mlp)\.(?:deepspeed_moe\.experts\.deepspeed_experts|experts)\.(\d+)\.(.+)$")


def global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of this process under their global names: a local expert becomes its global number."""
    for name, parameter in model.named_parameters():
        match = _LOCAL_EXPERT.match(name)
        if match:
            layer = model.get_submodule(match[1])
            assert isinstance(layer, ClusterMoE | TokenMoE)
            name = f"{match[1]}.experts.{layer.expert_ids[int(match[2])]}.{match[3]}"
        name = name.replace(".deepspeed_moe.gate.wg.", ".gate.")
        yield name, parameter


def save_checkpoint(
    engine: DeepSpeedEngine, run: Path, step: int, manifest: dict[str, Any], keep: int, runtime: Runtime
) -> Path:
    """Write the checkpoint of a step; a collective of all processes. Returns its folder.

    Shared weights are written by rank 0, each expert by the first process that holds it.
    """
    final = step_folder(run, step)
    draft = draft_folder(final)
    if runtime.is_main:
        prune(run, keep)
        draft.mkdir(parents=True)
    runtime.barrier()
    weights, moments = _held_tensors(engine, runtime)
    records = {**write_part(draft, WEIGHTS, weights), **write_part(draft, OPTIMIZER, moments)}
    gathered: list[dict[str, Any]] = [{} for _ in range(runtime.world_size)]
    dist.all_gather_object(gathered, records)
    if runtime.is_main:
        files = {name: record for part in gathered for name, record in part.items()}
        publish(final, {"step": step, **manifest, "files": dict(sorted(files.items()))})
        prune(run, keep)
    runtime.barrier()
    return final


def _held_tensors(engine: DeepSpeedEngine, runtime: Runtime) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and Adam moments that this process is to write, on the host; every process must call it."""
    _link_moments(engine)
    weights, moments = {}, {}
    for name, parameter in global_parameters(engine.module):
        is_expert = not getattr(parameter, "allreduce", True)
        mine = runtime.rank < _ep_size(engine.module) if is_expert else runtime.is_main
        for moment in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, moment)  # a collective: also where it is not written
            if mine:
                moments[f"{name}.{moment}"] = whole.cpu()
        if mine:
            weights[name] = parameter.detach().cpu()  # fp32 already: precision bf16 is autocast
    return weights, moments


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, runtime: Runtime) -> None:
    """Give an engine the weights and moments of a checkpoint, whatever topology wrote it.

    Raises:
        ArtefactError: a file is damaged, or the parameters are not those of the model; they are named.
    """
    parameters = dict(global_parameters(engine.module))
    with runtime.together():  # each process reads files of its own
        weights, moments = checkpoint.load(WEIGHTS, parameters), checkpoint.load(OPTIMIZER, parameters)
        give_weights(parameters, weights, str(checkpoint.folder))
    _make_moments(engine, float(checkpoint.step))
    _link_moments(engine)
    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[f"{name}.{moment}"].to(parameter.device), moment)


def _ep_size(model: nn.Module) -> int:
    return next(m.ep_size for m in model.modules() if isinstance(m, ClusterMoE | TokenMoE))


def _make_moments(engine: DeepSpeedEngine, step: float) -> None:
    """Create Adam's state, which torch does only in the first step, at `step` steps taken."""
    adam = engine.optimizer.optimizer
    for group in adam.param_groups:
        for flat in group["params"]:
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            adam.state[flat] = {"step": torch.tensor(step), **zeros}


def _link_moments(engine: DeepSpeedEngine) -> None:
    """Connect parameters with their parts of Adam's flat state.

    DeepSpeed 0.19.8 does it after the first parameter group has stepped, when the groups of the experts have no state
    yet, and never again.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
