"""TokenMoE, the baseline: a gate that routes each token, on DeepSpeed's stock dispatch (V-MoE, Riquelme et al., 2021).

Axes: S tokens of all images, T tokens of an image, D width, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate, top1gating, top2gating
from torch import Tensor, nn

from moce_ds.moe.deepspeed_layer import expert_group


class TokenGate(TopKGate):
    """`G(t) = TopK(softmax(W t + e))`, `e ~ N(0, 1/E^2)` in training, p not renormalised for k = 1 (docs/method.md).

    Instead of the stock auxiliary loss it returns V-MoE's two: [importance, load], each a squared coefficient of
    variation over the experts. It computes in float32, even under autocast.
    """

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Any:
        """Dispatch of [S, D] tokens in the format of the stock gate, with the losses first."""
        with torch.autocast(input.device.type, enabled=False):
            return self._dispatch(input, used_token, sparse_routes, use_tutel)

    def _dispatch(self, input: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool) -> Any:
        logits_SE = nn.functional.linear(input.float(), self.wg.weight.float())
        E = logits_SE.shape[1]
        noise = 1 / E
        noisy_SE = logits_SE + noise * torch.randn_like(logits_SE) if self.training else logits_SE
        losses = torch.stack([importance_loss(logits_SE), load_loss(logits_SE, noisy_SE, self.k, noise)])
        capacity = self.capacity_factor if self.training else self.eval_capacity_factor
        if self.k == 1:
            _, *dispatch = top1gating(
                noisy_SE,
                capacity,
                self.min_capacity,
                used_token,
                None,
                self.drop_tokens,
                self.use_rts,
                self.ep_group,
                sparse_routes,
                use_tutel,
            )
        else:
            _, *dispatch = top2gating(
                noisy_SE,
                capacity,
                self.min_capacity,
                self.drop_tokens,
                self.ep_group,
                self.top2_2nd_expert_sampling,
                sparse_routes,
            )
        return losses, *dispatch


def importance_loss(logits_SE: Tensor) -> Tensor:
    """CV^2 over experts of the summed probabilities without noise."""
    return _squared_variation(torch.softmax(logits_SE, dim=1).sum(dim=0))


def load_loss(logits_SE: Tensor, noisy_SE: Tensor, k: int, noise: float) -> Tensor:
    """CV^2 over experts of the expected load: the probability that each would be chosen with newly drawn noise.

    `noisy_SE` depends on `logits_SE`, so that the gradient includes that of the threshold, as in V-MoE: the gradients
    of a token over its experts sum to zero.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A.2.
    """
    threshold_S1 = noisy_SE.topk(k, dim=1).values[:, -1:]
    probability_SE = torch.special.ndtr((logits_SE - threshold_S1) / noise)
    return _squared_variation(probability_SE.sum(dim=0))


def _squared_variation(x_E: Tensor) -> Tensor:
    return x_E.var(unbiased=False) / x_E.mean().square()


class TokenMoeLayer(MoE):
    """A stock DeepSpeed MoE layer with `TokenGate`; capacity 0 drops nothing (and pads all experts to the largest
    load).

    Args:
        make_expert: builds one dense MLP, [..., D] -> [..., D].
        width: D.
        num_experts, ep_size, k: as in `ClusterMoE`.
        capacity: maximum tokens of an expert relative to the mean, the rest is dropped; 0: nothing is dropped.
    """

    def __init__(
        self,
        make_expert: Callable[[], nn.Module],
        width: int,
        num_experts: int,
        ep_size: int,
        k: int = 1,
        capacity: float = 0.0,
    ) -> None:
        super().__init__(
            width,
            make_expert(),
            num_experts,
            ep_size,
            k,
            capacity_factor=capacity or 1.0,
            eval_capacity_factor=capacity or 1.0,
            drop_tokens=capacity > 0,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        stock = self.deepspeed_moe.gate
        self.deepspeed_moe.gate = TokenGate(
            width,
            num_experts,
            k,
            stock.capacity_factor,
            stock.eval_capacity_factor,
            stock.min_capacity,
            None,
            stock.drop_tokens,
            stock.use_rts,
            None,
            stock.top2_2nd_expert_sampling,
        )
        self.expert_ids = list(range(self.num_local_experts))

    def set_local_experts(self, expert_ids: list[int]) -> None:
        """Set which global experts are local, before their weights are loaded."""
        assert len(expert_ids) == self.num_local_experts
        self.expert_ids = expert_ids

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create or look up the groups of this `ep_size`, without the stock layer's log message."""
        self.deepspeed_moe._set_ep_group(expert_group(self.ep_size))
