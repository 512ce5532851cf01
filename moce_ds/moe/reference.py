"""The expert layer as one would write it on a blackboard: all experts in one process, one image at a time.

It needs neither DeepSpeed nor a process group. Tests hold `ClusterMoE` against it, and the export checks a dense
ViT against a model made of it before anything is written.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moce_ds.moe.plan import LayerPlan


class ReferenceMoE(nn.Module):
    """`y_b = w_b E_{e(b)}(x_b)`, image by image; the arguments are those of `ClusterMoE`, with `ep_size` 1."""

    def __init__(self, make_expert: Callable[[], nn.Module], num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))

    def forward(self, x_BTD: Tensor, plan: LayerPlan, weight_B: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; of the plan only `experts_B` is used."""
        rows = [
            self.experts[expert](x_BTD[b : b + 1]) * weight_B[b].to(x_BTD.dtype)
            for b, expert in enumerate(plan.experts_B.tolist())
        ]
        return torch.cat(rows)
