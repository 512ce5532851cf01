"""The expert layer that DeepSpeed recognises: `ExpertLayer` with the process groups of expert parallelism."""

from collections.abc import Callable
from typing import Any

import deepspeed.utils.groups as groups
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from moce_ds.moe.expert_layer import ExpertLayer

NATIVE_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
"""Prefix of a layer's experts in DeepSpeed's own checkpoints; its writer fails on any other name."""

NUMBER = "number"
"""The global number of an expert in such a checkpoint, beside its weights; DeepSpeed assumes that it follows the rank.
"""


class ClusterMoE(ExpertLayer, MoE):
    """`num_experts` experts, `num_experts / ep_size` of them local; a plan determines the routes, not a token gate.

    DeepSpeed's engine recognises the layer by its type, calls `set_deepspeed_parallelism`, and reduces parameters with
    `allreduce = False` over the ranks that hold the same experts (seen in 0.19.8). The stock constructor is not called,
    because it would build a token gate and a capacity dispatch.

    Its `state_dict` uses the names of the stock layer, so that `engine.save_checkpoint` works; `named_parameters` uses
    those of `ExpertLayer`.

    Args:
        make_expert: builds one dense MLP, [..., D] -> [..., D].
        num_experts: experts of the layer over the whole group, a multiple of `ep_size`.
        ep_size: expert-parallel group size.
        shared: add a shared expert (see `ExpertLayer`), the same on every rank.

    Attributes:
        expert_ids: global numbers of the local experts, in the order of `experts`; see `set_local_experts`.
    """

    def __init__(
        self, make_expert: Callable[[], nn.Module], num_experts: int, ep_size: int, shared: bool = False
    ) -> None:
        ExpertLayer.__init__(self, make_expert, num_experts // ep_size, shared)
        self.num_experts = num_experts
        self.ep_size = ep_size
        self.num_local_experts = num_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.expert_ids = list(range(self.num_local_experts))
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_to_native_names)
        self.register_load_state_dict_pre_hook(_from_native_names)

    def set_local_experts(self, expert_ids: list[int]) -> None:
        """Set which global experts are local, before their weights are loaded."""
        assert len(expert_ids) == self.num_local_experts
        self.expert_ids = expert_ids

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create or look up the groups of this `ep_size`; called by DeepSpeed's engine."""
        group = expert_group(self.ep_size)
        if self.ep_size > 1:
            self.group = group


def expert_group(ep_size: int) -> dist.ProcessGroup:
    """The expert-parallel group of this rank; DeepSpeed creates it on the first call."""
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return groups._get_expert_parallel_group(name)


def _to_native_names(layer: ClusterMoE, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Rename the experts of a `state_dict` to DeepSpeed's names, and add their numbers."""
    ours, native = f"{prefix}experts.", f"{prefix}{NATIVE_EXPERTS}"
    for name in [name for name in state if name.startswith(ours)]:
        state[native + name.removeprefix(ours)] = state.pop(name)
    for local, expert in enumerate(layer.expert_ids):
        state[f"{native}{local}.{NUMBER}"] = torch.tensor(expert)


def _from_native_names(
    layer: ClusterMoE,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    faults: list[str],
) -> None:
    """The inverse for `load_state_dict`; experts other than the local ones are a fault."""
    ours, native = f"{prefix}experts.", f"{prefix}{NATIVE_EXPERTS}"
    for name in [name for name in state if name.startswith(native)]:
        state[ours + name.removeprefix(native)] = state.pop(name)
    numbers = [int(state.pop(f"{ours}{local}.{NUMBER}", expert)) for local, expert in enumerate(layer.expert_ids)]
    if numbers != layer.expert_ids:
        faults.append(
            f"{prefix}experts: got experts {numbers}, expected {layer.expert_ids}; call `set_local_experts` first."
        )
