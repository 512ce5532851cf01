"""An engine that checks the gradient on its device trains as DeepSpeed's own check does, skipped steps included.

On a CPU only the check is chosen; the code is what runs on a GPU. Axes: G images of all processes, B of one, N patches,
M clusters, L layers, K experts an image is sent to, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from harness import run_distributed
from numpy.typing import NDArray
from tiny_run import comparable
from torch import Tensor
from torch.nn import Parameter

from moce_ds.checkpoint.deepspeed_state import global_parameters, snapshot
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce, Routing
from moce_ds.models.parameters import is_expert
from moce_ds.models.shapes import DecoderShape, ExpertShape, ViTShape
from moce_ds.moe.deepspeed_layer import ClusterMoE
from moce_ds.moe.placement import default_placement
from moce_ds.moe.routing_plan import make_plan
from moce_ds.training.engine import Engine, WaitlessOptimizer, applied, parameter_groups, set_lr, start_engine
from moce_ds.training.placed_model import place_experts
from moce_ds.training.schedule import BatchArithmetic
from moce_ds.training.settings import EngineSettings, PretrainOptimSettings

Arrays = dict[str, NDArray[np.float32]]
STEPS, BAD, G, N, M, E, LAYERS = 5, 2, 8, 16, 6, 4, (0, 1)
SHAPE, DECODER = ViTShape(16, 4, 32, 2, 2), DecoderShape(32, 1, 2)


@dataclass(frozen=True)
class Case:
    """One comparison; `ep_size` 0: a dense model. The gradient of step BAD is NaN on the last process alone."""

    ep_size: int
    stage: Literal[1, 2]
    accumulation: int = 1
    clip: float = 0.5


@dataclass
class Told:
    """What a process saw of a training: verdicts and norms by step, and its arrays around step BAD and at the end."""

    applied: list[bool]
    norms: list[float]
    before: Arrays
    after: Arrays
    end: Arrays
    updates: set[float]


def train(case: Case, waitless: bool, runtime: Runtime) -> Told:
    """Five steps of a small model, of which all but step BAD update it."""
    torch.manual_seed(0)
    model = small_model(case.ep_size, runtime.rank)
    optim, batches = PretrainOptimSettings(clip=case.clip), BatchArithmetic(G, runtime.world_size, case.accumulation)
    engine = start_engine(
        model,
        parameter_groups(model, optim, 1.0),
        optim,
        EngineSettings(precision="fp32", zero_stage=case.stage),
        batches,
        waitless=waitless,
    )
    assert isinstance(engine.optimizer, WaitlessOptimizer) == waitless
    spoilt = next(p for name, p in global_parameters(model) if is_expert(name) or not case.ep_size)
    told = Told([], [], {}, {}, {}, set())
    for step in range(STEPS):
        if step == BAD:
            told.before = arrays(engine, runtime)
        bad = step == BAD and runtime.rank == runtime.world_size - 1
        take_step(engine, case, step, spoilt if bad else None, runtime, batches)
        verdict = applied(engine)
        assert isinstance(verdict, Tensor) == waitless
        told.applied.append(bool(verdict))
        told.norms.append(float(engine.get_global_grad_norm()))
        if step == BAD:
            told.after = arrays(engine, runtime)
    told.end = arrays(engine, runtime)
    told.updates = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return told


def small_model(ep_size: int, rank: int) -> MaskedAutoencoder:
    if not ep_size:
        return MaskedAutoencoder(SHAPE, DECODER, 0.75)
    embeddings_MD, share_M = torch.randn(M, SHAPE.width), torch.full((M,), 1 / M)
    model = Moce(
        SHAPE,
        DECODER,
        0.75,
        ExpertShape(E, LAYERS),
        embeddings_MD,
        share_M,
        lambda make_expert, num_experts, shared: ClusterMoE(make_expert, num_experts, ep_size, shared),
    )
    place_experts(model, default_placement(len(LAYERS), E), rank)
    return model


def take_step(
    engine: Engine, case: Case, step: int, spoilt: Parameter | None, runtime: Runtime, batches: BatchArithmetic
) -> None:
    """One update; the gradient of `spoilt` is NaN in its last micro-batch."""
    set_lr(engine, 1e-4)
    for part in range(case.accumulation):
        random = np.random.default_rng([step, part])
        clusters_WB = random.integers(M, size=(runtime.world_size, batches.micro))
        expert_MLK = random.integers(E, size=(M, len(LAYERS), 1))
        images_GCHW = torch.from_numpy(random.standard_normal((batches.micro_global, 3, 16, 16)).astype(np.float32))
        noise_GN = torch.from_numpy(random.random((batches.micro_global, N)).astype(np.float32))
        mine = slice(runtime.rank * batches.micro, (runtime.rank + 1) * batches.micro)
        inputs: list[Any] = [images_GCHW[mine], noise_GN[mine]]
        if case.ep_size:
            plan = make_plan(clusters_WB, expert_MLK, default_placement(len(LAYERS), E), runtime.rank, case.ep_size)
            inputs.append(Routing(torch.from_numpy(clusters_WB[runtime.rank]), plan, None))
        loss = engine(*inputs).loss
        if spoilt is not None and part == case.accumulation - 1:
            loss = loss + spoilt.sum() * float("nan")
        engine.backward(loss)
        engine.step()


def arrays(engine: Engine, runtime: Runtime) -> Arrays:
    """The weights of this process and the moments that it writes, copied; a collective."""
    found = dict(global_parameters(engine.module))
    for tensors in snapshot(engine, runtime, {}).values():
        found |= tensors
    return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


def both(cases: list[Case]) -> list[tuple[Told, Told]]:
    """Train each case with DeepSpeed's check and with ours."""
    with started() as runtime:
        return [(train(case, False, runtime), train(case, True, runtime)) for case in cases]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (1, [Case(0, 1), Case(0, 2, accumulation=2), Case(1, 1, clip=0.0), Case(1, 2)]),
        (2, [Case(2, 1), Case(2, 2, accumulation=2), Case(0, 1, accumulation=2), Case(0, 2)]),
        (2, [Case(1, 1, accumulation=2), Case(1, 2, clip=0.0)]),
    ],
)
def test_it_trains_as_deepspeeds_own_check_does(world_size: int, cases: list[Case]) -> None:
    for results in run_distributed(both, world_size, cases):
        for case, (theirs, ours) in zip(cases, results, strict=True):
            assert theirs.applied == ours.applied == [step != BAD for step in range(STEPS)], case
            np.testing.assert_allclose(ours.norms, theirs.norms, rtol=1e-5)
            assert ours.norms[BAD] == float("inf") and (min(ours.norms) > case.clip), "clipping must be active"
            assert ours.updates == theirs.updates == {STEPS - 1.0}
            expected, found = (
                comparable({n: torch.from_numpy(a) for n, a in told.end.items()}) for told in (theirs, ours)
            )
            assert expected.keys() == found.keys()
            for name, tensor in expected.items():
                assert float((found[name] - tensor).abs().max()) <= 1e-6, (case, name)
            assert any(name.endswith(".exp_avg_sq") for name in ours.before)
            assert all(np.array_equal(ours.before[n], ours.after[n]) for n in ours.before | ours.after), case
            assert not all(np.array_equal(ours.after[n], ours.end[n]) for n in ours.end)
