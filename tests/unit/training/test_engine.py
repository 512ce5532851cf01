"""What DeepSpeed is told, and what an engine sets for its process; `tests/distributed/test_waitless.py` trains."""

from collections.abc import Iterator

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from moce_ds.training.cpu_optimizer import use_on_cpu
from moce_ds.training.engine import WaitlessOptimizer, allow_tf32, bucket_size, deepspeed_config, waitless_config
from moce_ds.training.schedule import BatchArithmetic
from moce_ds.training.settings import EngineSettings, OptimSettings


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions_alike(allowed: bool) -> None:
    allow_tf32(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize(
    ("elements", "world_size", "expected"),
    [
        (5_000, 1, 5_000),
        (112_000_000, 8, 40_000_000),
        (112_000_000, 64, 64_000_000),
        (112_000_000, 512, 112_000_000),
        (2_000_000_000, 4096, 500_000_000),
    ],
)
def test_a_bucket_holds_a_small_gradient_and_grows_with_the_processes(
    elements: int, world_size: int, expected: int
) -> None:
    assert bucket_size(elements, world_size) == expected


def test_norm_and_clipping_are_left_to_the_waitless_optimizer() -> None:
    told = deepspeed_config(OptimSettings(clip=0.25), EngineSettings(zero_stage=2), BatchArithmetic(8, 2, 1))
    waitless = waitless_config(told, elements=5_000, world_size=2)
    zero = DeepSpeedZeroConfig(**waitless["zero_optimization"])
    assert (zero.stage, zero.compute_grad_norm, zero.reduce_bucket_size) == (2, False, 5_000)
    assert waitless["gradient_clipping"] == 0 and waitless["optimizer"]["params"]["fused"]
    assert told["gradient_clipping"] == 0.25 and "fused" not in told["optimizer"]["params"], "the given one is kept"
    assert "compute_grad_norm" not in told["zero_optimization"]


def test_the_throughput_timer_which_waits_for_the_device_is_off() -> None:
    told = deepspeed_config(OptimSettings(), EngineSettings(), BatchArithmetic(8, 2, 1))
    assert told["timers"] == {"throughput": {"enabled": False}}


def test_an_optimizer_of_another_kind_is_refused() -> None:
    class Other:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
        compute_grad_norm, clip_grad = False, 0.0

    with pytest.raises(TypeError, match="Other does not leave norm and clipping"):
        WaitlessOptimizer.take_over(Other(), 1.0)  # type: ignore[arg-type]


def test_an_optimizer_of_another_kind_is_refused_on_a_cpu() -> None:
    class Other:
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

    with pytest.raises(TypeError, match="Other is not DeepSpeed's"):
        use_on_cpu(Other())  # type: ignore[arg-type]
