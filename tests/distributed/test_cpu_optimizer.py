"""On a CPU an engine trains bit for bit as DeepSpeed and torch do, and touches no new memory in its steps."""

import resource
from unittest.mock import patch

import numpy as np
import pytest
import torch
from harness import run_distributed
from test_waitless import BAD, Case, Told, train

from moce_ds.distributed.runtime import started
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.shapes import DecoderShape, ViTShape
from moce_ds.training import cpu_optimizer, engine
from moce_ds.training.engine import parameter_groups, set_lr, start_engine
from moce_ds.training.schedule import BatchArithmetic
from moce_ds.training.settings import EngineSettings, PretrainOptimSettings

B = 4
WARMUP, COUNTED = 3, 4
PAGE_FAULTS = 50  # of a step; the gradient alone has 12,000 pages, more than glibc keeps by itself


def both(cases: list[Case]) -> list[tuple[Told, Told, str]]:
    """Train each case with DeepSpeed's optimizer as it is, and with ours in parts shorter than most tensors."""
    told = []
    with started() as runtime, patch.object(cpu_optimizer, "_PART", 1000):
        for case in cases:
            with patch.object(engine, "use_on_cpu", lambda optimizer: None):
                theirs = train(case, False, runtime)
            with patch.object(engine, "use_on_cpu", wraps=engine.use_on_cpu) as use:
                ours = train(case, False, runtime)
            told.append((theirs, ours, type(use.call_args.args[0]).__name__))
    return told


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (1, [Case(0, 1), Case(0, 2, accumulation=2), Case(1, 1, accumulation=2), Case(1, 2, clip=0.0)]),
        (2, [Case(2, 1), Case(0, 2, accumulation=2)]),
    ],
)
def test_its_results_are_those_of_deepspeed_and_torch_bit_for_bit(world_size: int, cases: list[Case]) -> None:
    for results in run_distributed(both, world_size, cases):
        for case, (theirs, ours, kind) in zip(cases, results, strict=True):
            assert kind == ("LoneOptimizer" if world_size == 1 else "DeepSpeedZeroOptimizer")
            assert ours.applied == theirs.applied and ours.norms == theirs.norms and ours.updates == theirs.updates
            assert not ours.applied[BAD] and ours.applied[BAD - 1]
            assert ours.end.keys() == theirs.end.keys()
            assert all(np.array_equal(ours.end[name], theirs.end[name]) for name in ours.end), case


def page_faults() -> list[int]:
    """Of each step after the first ones: pages that the process touches first in it."""
    with started():
        torch.manual_seed(0)
        model = MaskedAutoencoder(ViTShape(32, 4, 512, 4, 4), DecoderShape(64, 1, 2), 0.75)
        optim = PretrainOptimSettings()
        groups = parameter_groups(model, optim, 1.0)
        training = start_engine(model, groups, optim, EngineSettings(precision="fp32"), BatchArithmetic(B, 1, 1))
        set_lr(training, 1e-4)
        images_BCHW, noise_BN = torch.randn(B, 3, 32, 32), torch.rand(B, 64)
        faults = []
        for _ in range(WARMUP + COUNTED):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            training.backward(training(images_BCHW, noise_BN).loss)
            training.step()
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return faults[WARMUP:]


def test_a_step_finds_its_memory_as_the_step_before_left_it() -> None:
    # The heap may still grow once, where tensors come to lie otherwise. Memory that each step gives back
    # is touched anew in every step.
    faults = run_distributed(page_faults, 1)[0]
    assert min(faults) <= PAGE_FAULTS, faults
