"""Pre-training, read from top to bottom: `pretrain` sets up, `_train` runs the steps.

Axes: G images of a micro-batch over all processes, B those of this one.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import verify_checkpoint
from moce_ds.checkpoint.format import steps_of
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.data.loader import Batch, Loader
from moce_ds.data.sampler import ReadList
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import RandomCrop
from moce_ds.distributed.agreement import next_batch_checked
from moce_ds.distributed.randomness import GATE_NOISE, hashed
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.mae import Reconstruction, mask_noise
from moce_ds.models.moce import MoceOutput
from moce_ds.models.sdr import SdrOutput
from moce_ds.models.token_moe import TokenOutput
from moce_ds.moe.gate import ClusterGate
from moce_ds.training.engine import set_lr
from moce_ds.training.locality import LocalSampler
from moce_ds.training.record import manifest, report_replaced, show_picture, step_record
from moce_ds.training.router import RouteStatistics
from moce_ds.training.schedule import make_schedule
from moce_ds.training.session import Session, open_session
from moce_ds.training.settings import PretrainSettings, batch_arithmetic
from moce_ds.training.setup import check_run, check_same_data, check_same_settings, open_clusters
from moce_ds.training.steward import steward_of

_DEAL_EVERY = 32  # steps after which images are dealt to ranks by a new route table


class Progress(NamedTuple):
    """Steps taken in all, and steps of the whole run."""

    taken: int
    steps: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.taken == self.steps


def pretrain(config: PretrainSettings, runtime: Runtime) -> Progress:
    """Run, or resume, pre-training until its last step or until asked to stop.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on every process alike.
    """
    batches = batch_arithmetic(config, runtime.world_size)
    shards = ShardSet.open(config.data.shards)
    data = open_clusters(config, shards)
    with runtime.raise_on_all_ranks():
        check_run(config)
        check_same_data(config, shards, data)
        check_same_settings(config)
    schedule = make_schedule(config, shards.count)
    done = int(runtime.max([float(max(steps_of(config.run.out), default=0))])[0])
    if done >= schedule.steps and not verify_checkpoint(config.run.out, done, runtime):
        runtime.say(f"{config.run.out} is complete: {done} steps.")
        return Progress(done, schedule.steps)
    session = open_session(config, runtime, shards, batches, schedule, data)
    runtime.say(
        f"{schedule.steps} steps of {batches.global_batch} images = {runtime.world_size} processes x "
        f"{batches.accumulation} parts x {batches.micro}; peak learning rate {schedule.peak_lr:.2e} "
        f"= {config.optim.base_lr:.1e} x {batches.global_batch} / 256"
    )
    return Progress(_train(session), schedule.steps)


def _train(session: Session) -> int:
    """The steps of this attempt; writes metrics, pictures and checkpoints. Returns the steps taken in all."""
    run, schedule, runtime, engine = session.config.run, session.schedule, session.runtime, session.engine
    statistics = RouteStatistics(session.router) if session.router else None
    with steward_of(
        engine,
        run,
        session.attempt,
        runtime,
        first_step=session.first_step,
        skipped=session.first_skipped,
        steps=schedule.steps,
        images=session.batches.global_batch,
    ) as steward:
        loader = _loader(session)
        stream = iter(loader)
        while steward.goes_on:
            runtime.set_status(f"step {steward.step + 1}")
            set_lr(engine, schedule.lr(steward.step))
            totals, waited = _step(session, stream, steward.saver, steward.step)
            *totals, replaced = steward.after_step([*totals, float(len(loader.replaced))], waited)
            step, last = steward.step, not steward.goes_on
            if session.router and not last:
                session.router.prepare(step)  # of the next step; it reaches the host while this one is recorded
            if step % run.log_every == 0 or last:
                record = step_record(session, step, totals, steward.meter, statistics)
                steward.teller.metrics(record | {"images_replaced": int(replaced), "skipped": steward.skips.total})
            if isinstance(session.sampler, LocalSampler) and step % _DEAL_EVERY == 0:
                assert session.router is not None
                table = session.router.prepare(None).expert_MLK[:, :, 0]
                session.sampler.use(table, step * session.batches.accumulation)
            if step % run.picture_every == 0 or last:
                show_picture(session, steward.teller, step)
            if steward.save_due:
                steward.save(manifest(session, step, steward.skips.total))
    report_replaced(session, loader)
    if steward.step < schedule.steps:
        runtime.say(f"Stopped after step {steward.step} as asked; the same command goes on from there.")
    return steward.step


def _step(session: Session, stream: Iterator[Batch], saver: CheckpointManager, step: int) -> tuple[list[float], float]:
    """One optimizer step. Returns this process's part of the totals (loss, reconstruction, two gate losses, share of
    rows that moved; they add up to means over processes), and the seconds waited for data."""
    engine, runtime, accumulation = session.engine, session.runtime, session.batches.accumulation
    table = session.router.table(step) if session.router else None
    # Only the token gate draws from torch's generator; seeded by the step, its noise does not depend on resuming.
    torch.manual_seed(int(hashed(GATE_NOISE, session.config.run.seed, step, runtime.rank)[()] >> np.uint64(1)))
    terms, moved, waited = [], 0.0, 0.0
    for part in range(accumulation):
        index = step * accumulation + part
        routing = None
        if session.router is not None and table is not None:
            # Planned from the ids that were asked for: the same on every process, also where one replaces an image.
            routing = session.router.route(table, session.sampler.batch(index).ids)
            moved += float(np.mean([layer.moved / len(layer.image_N) for layer in routing.plan.layers]))
        began = time.perf_counter()
        batch = next_batch_checked(runtime, stream, routing.plan.digest if routing else 0, step)
        waited += time.perf_counter() - began
        noise_BN = mask_noise(
            session.config.run.seed, batch.ids_B, batch.epochs_B, session.config.vit_shape.num_patches
        )
        inputs: list[Any] = [batch.images_BCHW, noise_BN.to(runtime.device, non_blocking=True)]
        inputs += [further for further in (routing, session.teacher) if further is not None]
        loss, parts = _loss(engine(*inputs), session, step)
        engine.backward(loss)
        saver.wait_for_staging()
        engine.step()
        terms.append(torch.stack(parts))
    totals = torch.stack(terms).double().sum(dim=0).tolist()  # the step's one wait for the device, at its end
    shares = accumulation * runtime.world_size
    return [*(total / shares for total in totals), moved / shares], waited


def _loss(
    output: Reconstruction | MoceOutput | SdrOutput | TokenOutput, session: Session, step: int
) -> tuple[Tensor, list[Tensor]]:
    """The weighted loss (docs/method.md, "Losses") and its detached terms: total, reconstruction, and two of
    the model's own."""
    config = session.config
    own = config.experts
    if isinstance(output, Reconstruction):
        zero = torch.zeros_like(output.loss)
        loss, terms = output.loss, [output.loss, zero, zero]
    elif isinstance(output, SdrOutput):
        terms = [output.reconstruction.loss, output.distillation, torch.zeros_like(output.distillation)]
        loss = terms[0] + config.sdr.distillation_weight * terms[1]
    elif isinstance(output, TokenOutput):
        terms = [output.reconstruction.loss, output.importance, output.load]
        loss = terms[0] + config.token_moe.balance_weight * (terms[1] + terms[2])
    else:
        terms = [output.reconstruction.loss, output.gate.imbalance, output.gate.balance]
        loss = terms[0]
        if isinstance(session.engine.module.gate, ClusterGate):  # a random table learns nothing
            loss = loss + own.imbalance_weight * session.schedule.imbalance_share(step) * terms[1]
        if isinstance(session.engine.module.gate, ClusterGate) and own.balance == "loss":
            loss = loss + own.balance_weight * terms[2]
    return loss, [term.detach() for term in (loss, *terms)]


def _loader(session: Session) -> Loader:
    """The loader of this process's part of the stream, from where this attempt begins."""
    config, runtime, batches = session.config, session.runtime, session.batches

    def read_list(index: int) -> ReadList:
        return session.sampler.batch(index).part(runtime.rank, runtime.world_size)

    return Loader(
        session.shards,
        read_list,
        RandomCrop(config.run.seed, config.data.crop_scale, flip=config.data.flip),
        config.image_input,
        first=session.first_step * batches.accumulation,
        last=session.schedule.steps * batches.accumulation,
        batch_size=batches.micro,
        threads=config.data.threads,
        device=runtime.device,
    )
