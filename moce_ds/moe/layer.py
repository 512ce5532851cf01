"""The expert layer that DeepSpeed recognises and that moves whole images by a plan.

Axes: B images of a rank, S images computed here, T tokens, D width.
"""

from collections.abc import Callable

import deepspeed.utils.groups as groups
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from moce_ds.moe.exchange import exchange
from moce_ds.moe.plan import LayerPlan


class ClusterMoE(MoE):
    """A layer of `num_experts` MLPs, `num_experts / ep_size` of them here, through which images go by a plan.

    DeepSpeed's engine finds the layer by its type, calls `set_deepspeed_parallelism`, and reduces parameters that
    carry `allreduce = False` over the ranks that hold the same experts (seen in 0.19.8). The stock constructor is
    not called: it would build a token gate and a capacity dispatch, which this layer has no use for.

    Args:
        make_expert: builds one dense MLP, [..., D] -> [..., D].
        num_experts: experts of the layer over the whole group, a multiple of `ep_size`.
        ep_size: neighbouring ranks that share one set of experts.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts
        self.ep_size = ep_size
        self.num_local_experts = num_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.experts = nn.ModuleList(make_expert() for _ in range(self.num_local_experts))
        self._group: dist.ProcessGroup | None = None
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create or look up the groups of this `ep_size`; called by DeepSpeed's engine."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        if self.ep_size > 1:
            self._group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, x_BTD: Tensor, plan: LayerPlan, weight_B: Tensor) -> Tensor:
        """Each image through its expert, times its combine weight: [B, T, D] -> [B, T, D].

        Every local expert runs, also on no images: its gradient hooks must fire on every rank, or DeepSpeed's
        gradient buckets fall out of step.
        """
        sent_BTD = x_BTD.index_select(0, plan.order_B)
        x_STD = exchange(sent_BTD, plan.send_R, plan.receive_R, self._group).index_select(0, plan.gather_S)
        parts = x_STD.split(plan.counts)
        y_STD = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y_STD = y_STD.index_select(0, plan.scatter_S)
        y_BTD = exchange(y_STD, plan.receive_R, plan.send_R, self._group).index_select(0, plan.restore_B)
        return y_BTD * weight_B.to(y_BTD.dtype)[:, None, None]
