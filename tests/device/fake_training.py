"""Pre-training on a fake GPU: what `training/pretrain.py` puts together, without the files that it reads.

Import it after `fake_cuda.install`: DeepSpeed asks torch.cuda while it is imported.

Axes: M clusters, D their width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.common.config.settings import load
from moce_ds.data.clusters import Clusters
from moce_ds.data.loader import Batch
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.sdr import Teacher
from moce_ds.models.vit import Encoder, timm_vit
from moce_ds.moe.placement import default_placement
from moce_ds.training.engine import parameter_groups, start_engine
from moce_ds.training.inputs import ClusteredData
from moce_ds.training.pictures import RunPictures
from moce_ds.training.placed_model import build_for_training, place_experts, tune_execution
from moce_ds.training.pretrain import PretrainTask, make_router
from moce_ds.training.schedule import batch_arithmetic, make_schedule
from moce_ds.training.settings import PretrainSettings
from moce_ds.training.trainer import Trainer
from tests.device.watch import CUDA, FakeDevice, Seen

_IMAGES, _CLUSTERS = 4096, 64
_STEPS = {"ordinary": 3, "recorded": 4, "saved": 5, "after_save": 6}
"""Those that are reported, counted from 1: libraries set themselves up in the first."""
_SETTINGS = """
    model.patch_size=4 model.width=64 model.depth=4 model.heads=2 experts.num=8
    model.decoder_width=32 model.decoder_depth=1 model.decoder_heads=2
    data.image_size=16 data.shards=none optim.batch_size=512
    run.log_every=4 run.checkpoint_every=5 run.picture_every=1000
"""


class _Enough(Exception):  # noqa: N818 (no error)
    """Ends a run after the steps that are wanted."""


def train(device: FakeDevice, words: Sequence[str], folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Train with the settings `words`; return what the steps did, by phase, what the writer of the checkpoint did, and
    the sizes of the model.

    Phases are "forward", "backward" and "step" of the engine, and "prepare" of the router; the rest is in "".
    """
    device.beside = Seen()
    config = load(PretrainSettings, None, [*_SETTINGS.split(), f"run.out={folder}", *words])
    steps: list[dict[str, Seen]] = []
    trainer = _trainer(config, Runtime(rank, world_size, 0, torch.device(CUDA, 0)), device, steps)
    trainer.lease.draft(_STEPS["saved"]).mkdir(parents=True)  # rank 0 would do it
    with suppress(_Enough):
        trainer.fit()
    return {
        "steps": {name: {phase: asdict(seen) for phase, seen in steps[step].items()} for name, step in _STEPS.items()},
        "writer": asdict(device.beside),
        "sizes": _sizes(trainer.engine.module),
    }


def _sizes(model: nn.Module) -> dict[str, int]:
    """Numbers of this process: of experts, of what all processes share, and of both what is in matrix products."""
    experts = [parameter for parameter in model.parameters() if not getattr(parameter, "allreduce", True)]
    products = [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    counts = [sum(p.numel() for p in ps) for ps in (model.parameters(), experts, nn.ModuleList(products).parameters())]
    return {"shared": counts[0] - counts[1], "experts": counts[1], "products": counts[2]}


def _trainer(config: PretrainSettings, runtime: Runtime, device: FakeDevice, steps: list[dict[str, Seen]]) -> Trainer:
    spec, experts, run = config.model_spec, config.experts, config.run
    batches = batch_arithmetic(config.optim, runtime.world_size, config.ep_size)
    clustered = _random_clusters(spec.shape.width) if config.routing_clusters else None
    model = build_for_training(
        spec, clustered.clusters if clustered else None, config.ep_size, run.seed, config.loss_weights
    )
    slot_LE = default_placement(len(config.expert_layers), experts.num)
    place_experts(model, slot_LE, runtime.rank)
    tune_execution(model, experts.execution, config.engine, runtime.device)
    model.to(runtime.device)  # DeepSpeed would replace fake parameters that the groups already hold
    groups = parameter_groups(model, config.optim, experts.gate_lr_scale)
    engine = start_engine(model, groups, config.optim, config.engine, batches)
    inputs: Any = _FakeInputs(clustered, run.seed, spec.shape.image_size, batches.accumulation, device, steps)
    router = make_router(model, inputs, slot_LE, experts, run.seed, runtime)
    for owner, name in ((engine, "forward"), (engine, "backward"), (engine, "step"), (router, "prepare")):
        if owner is not None:
            setattr(owner, name, _as_phase(device, name, getattr(owner, name)))
    schedule = make_schedule(config.optim, _IMAGES)
    lease = RunLease.claim(run.out, runtime)
    pictures = RunPictures(model, inputs.shards, spec.input, run.seed, run.picture_every, lease, runtime)
    teacher = None
    if config.wants_teacher:
        teacher = Teacher(Encoder(timm_vit(spec.shape).to(runtime.device), spec.shape, spec.input, {}))
    task = PretrainTask(inputs, router, teacher, pictures, schedule, batches, run.seed, runtime)
    return Trainer(engine, task, CheckpointManager(engine, run, lease, runtime), schedule, batches, run)


def _as_phase(device: FakeDevice, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with device.phase(name):
            return function(*args, **kwargs)

    return run


class _FakeInputs:
    """`training.inputs.Inputs` whose images are made on the device; a step lasts until the next one begins.

    Args:
        accumulation: batches of a step.
        steps: is given what each step did, by phase; before the first of them, what came earlier.
    """

    def __init__(
        self,
        clustered: ClusteredData | None,
        seed: int,
        image_size: int,
        accumulation: int,
        device: FakeDevice,
        steps: list[dict[str, Seen]],
    ) -> None:
        self.shards, self.order = SimpleNamespace(count=_IMAGES), RandomOrder(_IMAGES, seed)
        self.clustered = clustered
        self._size, self._accumulation, self._device = image_size, accumulation, device
        self._steps = steps

    def loader(self, sampler: ShuffledSampler, first: int, last: int, runtime: Runtime) -> "_FakeLoader":
        return _FakeLoader(self._batches(sampler, runtime))

    def _batches(self, sampler: ShuffledSampler, runtime: Runtime) -> Iterator[Batch]:
        batch_size, device = sampler.batch_size // runtime.world_size, runtime.device
        for index in range(max(_STEPS.values()) * self._accumulation):
            read = sampler.batch(index).part(runtime.rank, runtime.world_size)
            if index % self._accumulation == 0:
                self._steps.append(self._device.forget())
            images_BCHW = torch.empty(batch_size, 3, self._size, self._size, device=device)
            yield Batch(images_BCHW, read.ids, read.epochs, read.ids)
        self._steps.append(self._device.forget())
        raise _Enough


class _FakeLoader:
    """`data.loader.Loader` without damaged images."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.replaced = batches, ()

    def __iter__(self) -> Iterator[Batch]:
        return self._batches


def _random_clusters(width: int) -> ClusteredData:
    """Clusters of equal size in random directions, and the cluster of each image."""
    random, nothing_M = np.random.default_rng(0), np.zeros(_CLUSTERS, np.float32)
    embeddings_MD = random.standard_normal((_CLUSTERS, width)).astype(np.float32)
    embeddings_MD /= np.linalg.norm(embeddings_MD, axis=1, keepdims=True)
    clusters = Clusters(
        embeddings_MD=embeddings_MD, duals_M=nothing_M, mean_D=np.zeros(width, np.float32),
        sizes_M=np.full(_CLUSTERS, _IMAGES // _CLUSTERS), cosine_M=nothing_M, eps=1.0, method="kmeans",
        shards_fingerprint="", encoder_fingerprint="", encoder_input={}, provenance={},
    )  # fmt: skip
    return ClusteredData(clusters, random.permutation(np.arange(_IMAGES) % _CLUSTERS).astype(np.int32))
