"""Pre-training: `pretrain` opens everything that a run needs, and `PretrainTask` is what the trainer trains on.

Axes: B images of a micro-batch of this process, G those over all processes, C channels, H, W pixels, N patches
(of `ids_N`: images of the shard set), L expert layers, M clusters, E experts.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.checkpoint.shared_read import checkpoint_steps, is_intact, resume
from moce_ds.common.config.settings import to_tree
from moce_ds.common.host.threads import keep
from moce_ds.common.text import counted
from moce_ds.data.loader import Batch, Loader
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.device_copy import on_device
from moce_ds.distributed.randomness import GATE_NOISE, hashed
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import MaskedAutoencoder, mask_noise
from moce_ds.models.moce import Moce
from moce_ds.models.sdr import Teacher
from moce_ds.training.engine import Engine, SkippedSteps, parameter_groups, start_engine
from moce_ds.training.inputs import Inputs, keep_clusters, keep_teacher, open_inputs, read_teacher
from moce_ds.training.local_sampler import LocalSampler
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.pictures import RunPictures
from moce_ds.training.placed_model import build_for_training, initialise, load_placed, placed, tune_execution
from moce_ds.training.router import Router, RouteStatistics
from moce_ds.training.run_checks import RequestedRun
from moce_ds.training.schedule import BatchArithmetic, Schedule, batch_arithmetic, describe, make_schedule
from moce_ds.training.settings import ExpertSettings, PretrainSettings
from moce_ds.training.step_agreement import Agree
from moce_ds.training.trainer import Progress, Trainer
from moce_ds.training.training_task import TrainingTask

_NEW_ORDER_EVERY = 32  # steps after which a new route table assigns images to ranks


def pretrain(config: PretrainSettings, runtime: Runtime) -> Progress:
    """Run, or resume, pre-training until its last step or until asked to stop; a collective.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on every process alike.
    """
    run, experts, spec, optim = config.run, config.experts, config.model_spec, config.optim
    requested, batches = RequestedRun(config), batch_arithmetic(optim, runtime.world_size, config.ep_size)
    inputs = open_inputs(config.data, spec, config.routing_clusters, run.seed)
    with runtime.raise_on_all_ranks():
        requested.check_resumable(inputs.named, f"start another run: run.init_from={run.out}")
    schedule = make_schedule(optim, inputs.shards.count, experts.imbalance_start)
    if done := _complete(requested, schedule.steps, runtime):
        return done
    with RunLease.claimed(run.out, runtime) as lease:
        model = build_for_training(spec, inputs.clusters, experts.ep_size, run.seed, config.loss_weights)
        tune_execution(model, experts.execution, config.engine, runtime.device)
        resumed, steps = None, checkpoint_steps(run.out, runtime)
        if not steps:
            slot_LE = initialise(model, spec, experts, run, inputs.clusters, runtime)
        encoder = read_teacher(spec, run, runtime) if config.wants_teacher else None
        groups = parameter_groups(model, optim, experts.gate_lr_scale)
        engine = start_engine(model, groups, optim, config.engine, batches)
        if steps:
            resumed, slot_LE = resume(run.out, steps, partial(load_placed, engine, experts, inputs.clusters), runtime)
        requested.write_settings(lease, runtime)  # settings, inputs and checkpoint are checked
        keep_clusters(config.routing_clusters, run.out, runtime)
        teacher = keep_teacher(encoder, run.out, runtime) if encoder else None
        router = make_router(model, inputs, slot_LE, experts, run.seed, runtime)
        pictures = RunPictures(model, inputs.shards, spec.input, run.seed, run.picture_every, lease, runtime)
        task = PretrainTask(inputs, router, teacher, pictures, schedule, batches, run.seed, runtime)
        made_from = {"config": to_tree(config), "model": spec.to_tree(), **inputs.made_from, **placed(experts, slot_LE)}
        checkpoints = CheckpointManager(engine, run, lease, runtime, made_from)
        trainer = Trainer(engine, task, checkpoints, schedule, batches, run)
        if resumed is not None:
            trainer.restore(resumed)
        runtime.say(describe(schedule, batches, optim.base_lr))
        progress = trainer.fit()
        task.report_replaced()
        return progress


def make_router(
    model: MaskedAutoencoder,
    inputs: Inputs,
    slot_LE: NDArray[np.int64],
    experts: ExpertSettings,
    seed: int,
    runtime: Runtime,
) -> Router | None:
    """The router of a model whose images are routed by cluster; None for other models."""
    if inputs.clustered is None:
        return None
    assert isinstance(model, Moce)
    return Router(model, inputs.clustered.ids_N, slot_LE, experts, seed, runtime)


def _complete(requested: RequestedRun, steps: int, runtime: Runtime) -> Progress | None:
    """The progress of a run that has taken all steps, whose last checkpoint is valid; else None. A collective.

    Raises:
        ConfigError: it is not complete, and cannot resume.
    """
    run = requested.folder
    done = max(checkpoint_steps(run, runtime), default=0)
    if done >= steps and is_intact(run, done, runtime):
        runtime.say(f"{run} is complete: {done} steps.")
        return Progress(done, steps)
    with runtime.raise_on_all_ranks():
        requested.check_optimizer()
    return None


class PretrainTask(TrainingTask):
    """Random crops of a shard set; a masked autoencoder reconstructs their hidden patches.

    Args:
        inputs: the images, and the clusters that route them.
        router: of a model that is routed by cluster.
        teacher: of SDR's second phase.
        pictures: drawn at intervals.
        seed: of the order of images, of masks and of noise.
    """

    def __init__(
        self,
        inputs: Inputs,
        router: Router | None,
        teacher: Teacher | None,
        pictures: RunPictures,
        schedule: Schedule,
        batches: BatchArithmetic,
        seed: int,
        runtime: Runtime,
    ) -> None:
        self.count = inputs.shards.count
        self._inputs, self._router, self._teacher, self._pictures = inputs, router, teacher, pictures
        self._schedule, self._batches, self._seed, self._runtime = schedule, batches, seed, runtime
        self._num_patches = pictures.model.shape.num_patches
        self._sampler: ShuffledSampler | LocalSampler = ShuffledSampler(inputs.order, batches.micro_global)
        if router is not None and router.experts.loader_locality and router.experts.ep_size > 1:
            world_size, ep_size = runtime.world_size, router.experts.ep_size
            self._sampler = LocalSampler(self._sampler, router.ids_N, router.slot_LE, world_size, ep_size)
        self._statistics: RouteStatistics | None = None
        self._loader: Loader | None = None
        self._moved_parts: list[float] = []

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the number of threads, and the tables that assign images to ranks."""
        if message := keep(checkpoint.manifest.get("threads")):
            self._runtime.say(message)
        if isinstance(self._sampler, LocalSampler):
            then = checkpoint.entry("config", "optim", "accumulation")
            if then == self._batches.accumulation:  # else the tables name other micro-batches
                self._sampler.tables = LocalSampler.tables_from_tree(checkpoint.entry("dealt_by"))

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Images on this process's device."""
        first, last = (step * self._batches.accumulation for step in (first_step, self._schedule.steps))
        if self._router is not None:
            if isinstance(self._sampler, LocalSampler) and not self._sampler.tables:
                self._sampler.tables = [(first, self._router.prepare(None).expert_MLK[:, :, 0])]
            self._statistics = RouteStatistics(self._router)
        self._loader = self._inputs.loader(self._sampler, first, last, self._runtime)
        return iter(self._loader)

    def prepare(self, step: int, part: int) -> None:
        """Seed torch as a step begins."""
        if part:
            return
        # Only the token gate draws from torch's generator; seeded by the step, its noise does not depend on resuming.
        torch.manual_seed(int(hashed(GATE_NOISE, self._seed, step, self._runtime.rank)[()] >> np.uint64(1)))
        self._moved_parts = []

    def losses(self, engine: Engine, batch: Batch, step: int, part: int, agree: Agree) -> dict[str, Tensor]:
        """The named losses of the model, for masks that depend only on seed, epoch and image."""
        noise_BN = mask_noise(self._seed, batch.ids_B, batch.epochs_B, self._num_patches)
        inputs: list[Any]
        if self._router is None:
            routing, inputs = None, [batch.images_BCHW, on_device(noise_BN, self._runtime.device)]
        else:
            # The plan uses the requested ids, which all processes know, also if an intact image replaces a damaged one.
            ids_G = self._sampler.batch(step * self._batches.accumulation + part).ids
            share = self._schedule.imbalance_share(step)
            noise_BN, routing = self._router.begin(
                step, ids_G, noise_BN, share, lambda digest: agree(self._digest_of_step(digest, step))
            )
            inputs = [batch.images_BCHW, noise_BN, routing]
        if self._teacher is not None:
            inputs.append(self._teacher)
        if self._pictures.model.agrees_before_forward:
            agree(0)  # a rank without images would leave the others waiting for it in a layer
        losses: dict[str, Tensor] = engine(*inputs).losses
        if routing is not None:
            shares = [layer.moved / len(layer.image_N) for layer in routing.plan.layers]
            self._moved_parts.append(float(np.mean(shares)))
        return losses

    def _digest_of_step(self, digest: int, step: int) -> int:
        """The digest of all plans of a step, from that of its first one: the ranks agree once, on all of them.

        The other plans follow from the same table and from the clusters of their images.
        """
        assert self._router is not None
        sampler = self._sampler.sampler if isinstance(self._sampler, LocalSampler) else self._sampler
        state = xxh3_64(digest.to_bytes(8, "big"))
        first = step * self._batches.accumulation
        for index in range(first + 1, first + self._batches.accumulation):
            state.update(self._router.ids_N[sampler.batch(index).ids].data)
        return state.intdigest() >> 16  # a float64 holds it exactly

    def sums(self) -> dict[str, float]:
        """The share of rows that moved between processes, and the number of replaced images."""
        assert self._loader is not None
        shares = self._batches.accumulation * self._runtime.world_size
        return {"moved": sum(self._moved_parts) / shares, "images_replaced": float(len(self._loader.replaced))}

    def after_update(self, step: int) -> None:
        """Assign images to ranks by a new table, if due."""
        if isinstance(self._sampler, LocalSampler) and step % _NEW_ORDER_EVERY == 0:
            assert self._router is not None
            table = self._router.prepare(None).expert_MLK[:, :, 0]
            self._sampler.use(table, step * self._batches.accumulation)

    def needs_weights(self, step: int) -> bool:
        """Whether pictures are drawn."""
        return self._pictures.due(step)

    def after_step(self, step: int, skips: SkippedSteps) -> None:
        """Raise DivergedError, on every process, if a run ends with useless weights."""
        if step == self._schedule.steps:
            with self._runtime.raise_on_all_ranks():  # processes hold different experts
                skips.check_end(step, self._pictures.model)

    def record(self, step: int, sums: Mapping[str, float]) -> dict[str, Any]:
        """Moved rows, replaced images, and the statistics of each expert layer for the last micro-batch."""
        own: dict[str, Any] = {}
        if self._statistics is not None:
            ids_G = self._sampler.batch(step * self._batches.accumulation - 1).ids
            layers = self._statistics.of_step(ids_G)
            own = {"moved": round(sums["moved"], 5), "layers": layers}
            if step >= self._schedule.imbalance_steps:
                self._warn_of_dead_experts(step, self._statistics)
        return own | {"images_replaced": int(sums["images_replaced"])}

    def _warn_of_dead_experts(self, step: int, statistics: RouteStatistics) -> None:
        for block, expert in statistics.newly_dead():
            self._runtime.warn(
                f"step {step}: no cluster chooses expert {expert} of block {block}. Raise "
                "experts.balance_weight, or set experts.balance=sinkhorn."
            )

    def after_record(self, step: int, logger: MetricLogger, *, last: bool) -> None:
        """Draw pictures, if due."""
        if self._pictures.due(step) or last:
            self._pictures.draw(self._router, step, logger)

    def manifest(self, step: int) -> dict[str, Any]:
        """Number of threads, the noise-free routes, and the tables that assign images to ranks."""
        return {
            "threads": torch.get_num_threads(),
            "routing": self._router.record(step) if self._router else None,
            "dealt_by": self._sampler.to_tree() if isinstance(self._sampler, LocalSampler) else [],
        }

    def report_replaced(self) -> None:
        """Print the replaced images of all processes; a collective."""
        sources = self._loader.replaced_sources() if self._loader else []
        listed = [line for text in self._runtime.texts("\n".join(sources)) for line in text.split("\n")]
        named = sorted({line for line in listed if line})
        if named:
            shown = "\n  ".join(named[:20]) + (f"\n  and {len(named) - 20} more" if len(named) > 20 else "")
            were = "was" if len(named) == 1 else "were"
            self._runtime.say(f"{counted(len(named), 'damaged image')} {were} replaced:\n  {shown}")
