"""TokenMoE without DeepSpeed computes what DeepSpeed's own layer does."""

from collections.abc import Callable
from functools import partial

import deepspeed
import torch
from harness import run_distributed

from moce_ds.common.compat import quiet_deepspeed
from moce_ds.distributed.runtime import started
from moce_ds.encoders.from_checkpoint import TokenExperts
from moce_ds.models.mae import make_mlp
from moce_ds.moe.deepspeed_token_layer import TokenMoeLayer

WIDTH, EXPERTS = 16, 5


def largest_differences() -> list[tuple[float, float]]:
    """Between the two layers with the same weights, and the largest output, for one and two experts a token."""
    with started():
        quiet_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        return [largest_difference(k) for k in (1, 2)]


def largest_difference(k: int) -> tuple[float, float]:
    torch.manual_seed(k)
    make_expert: Callable[[], torch.nn.Module] = partial(make_mlp, WIDTH, 4.0)
    layer = TokenMoeLayer(make_expert, WIDTH, EXPERTS, 1, k)
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    alone = TokenExperts(make_expert, WIDTH, EXPERTS, k)
    alone.gate.load_state_dict(layer.deepspeed_moe.gate.wg.state_dict())
    alone.experts.load_state_dict(layer.deepspeed_moe.experts.deepspeed_experts.state_dict())
    x_BTD = torch.randn(7, 9, WIDTH)
    with torch.inference_mode():
        expected_BTD, got_BTD = layer.eval()(x_BTD)[0], alone(x_BTD)
    return float((expected_BTD - got_BTD).abs().max()), float(expected_BTD.abs().max())


def test_one_expert_and_two_experts_a_token() -> None:
    (found,) = run_distributed(largest_differences, 1)
    assert all(apart < 1e-5 * largest and largest > 0.1 for apart, largest in found), found
