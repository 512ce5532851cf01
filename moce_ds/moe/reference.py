"""A reference implementation of the expert layer: all experts in one process, one image at a time.

It needs neither DeepSpeed nor a process group. Tests compare `ClusterMoE` with it, and the export checks a dense ViT
against a model made of it before anything is written.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moce_ds.moe.routing_plan import LayerPlan


class ReferenceMoE(nn.Module):
    """`y_b = sum_k w_bk E_{e(b, k)}(x_b)`, image by image; same arguments as `ExpertLayer`."""

    def __init__(self, make_expert: Callable[[], nn.Module], num_experts: int, shared: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))
        self.shared = make_expert() if shared else None

    def forward(self, x_BTD: Tensor, plan: LayerPlan, weight_BK: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; uses only `experts_BK` of the plan."""
        return torch.stack([self._one(x_BTD[b], plan.experts_BK[b], weight_BK[b]) for b in range(len(x_BTD))])

    def _one(self, x_TD: Tensor, experts_K: Tensor, weight_K: Tensor) -> Tensor:
        weight_K = weight_K.to(x_TD.dtype)
        y_TD = sum(w * self.experts[e](x_TD) for e, w in zip(experts_K.tolist(), weight_K, strict=True))
        if self.shared is not None:
            y_TD = y_TD + (1 - weight_K.sum()) * self.shared(x_TD)
        return y_TD
