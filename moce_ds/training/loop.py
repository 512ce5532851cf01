"""Pre-training, read from top to bottom: `pretrain` sets up, `_train` runs the steps.

Axes: G images of a micro-batch over all processes, B those of this one.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from PIL import Image
from torch import Tensor

from moce_ds import config as configuration
from moce_ds.checkpoint_files import Checkpoint
from moce_ds.data.loader import Batch, Loader
from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop, RandomCrop
from moce_ds.errors import MoceError
from moce_ds.files import atomic_file, write_json
from moce_ds.models.mae import Reconstruction, mask_noise
from moce_ds.models.moce import Moce, MoceOutput
from moce_ds.models.token_moe import TokenOutput
from moce_ds.randomness import GATE_NOISE, hashed
from moce_ds.runtime import Runtime, StopRequest
from moce_ds.training.checkpoint import load_checkpoint, save_checkpoint
from moce_ds.training.engine import set_lr, start_engine
from moce_ds.training.locality import LocalSampler
from moce_ds.training.metrics import Meter, Teller
from moce_ds.training.pictures import reconstruction_picture, routing_picture
from moce_ds.training.router import Router, RouteStatistics
from moce_ds.training.schedule import Schedule, make_schedule
from moce_ds.training.settings import BatchArithmetic, PretrainSettings, batch_arithmetic
from moce_ds.training.setup import (
    ClusteredData,
    build_for_training,
    check_same_data,
    choose_placement,
    first_weights,
    keep_clusters,
    keep_settings,
    open_clusters,
    open_run,
    place_experts,
    take_weights,
    tune_execution,
)

_PICTURE_IMAGES = 8
_DEAL_EVERY = 32  # steps after which images are dealt to ranks by a new route table


@dataclass(frozen=True)
class Session:
    """All that the steps of a run need; nothing in it changes but weights, and the tables that images are dealt by."""

    config: PretrainSettings
    runtime: Runtime
    shards: ShardSet
    batches: BatchArithmetic
    schedule: Schedule
    sampler: ShuffledSampler | LocalSampler
    engine: DeepSpeedEngine
    router: Router | None
    slot_LE: np.ndarray
    clusters_hash: str | None


def pretrain(config: PretrainSettings, runtime: Runtime) -> int:
    """Run, or resume, pre-training until its last step or until asked to stop; returns the steps taken in all.

    Raises:
        ConfigError, ArtefactError, DataError: on every process alike.
    """
    batches = batch_arithmetic(config, runtime.world_size)
    shards = ShardSet.open(config.data.shards)
    data = open_clusters(config, shards)
    resume_from = open_run(config)
    if resume_from:
        check_same_data(resume_from, config, shards, data)
    schedule = make_schedule(config, shards.count)
    if resume_from and resume_from.step >= schedule.steps:
        runtime.say(f"{config.run.out} is complete: {resume_from.step} steps.")
        return resume_from.step
    session = _open_session(config, runtime, shards, batches, schedule, data, resume_from)
    runtime.say(
        f"{schedule.steps} steps of {batches.global_batch} images = {runtime.world_size} processes x "
        f"{batches.accumulation} parts x {batches.micro}; peak learning rate {schedule.peak_lr:.2e} "
        f"= {config.optim.base_lr:.1e} x {batches.global_batch} / 256"
    )
    return _train(session, first_step=resume_from.step if resume_from else 0)


def _open_session(
    config: PretrainSettings,
    runtime: Runtime,
    shards: ShardSet,
    batches: BatchArithmetic,
    schedule: Schedule,
    data: ClusteredData | None,
    resume_from: Checkpoint | None,
) -> Session:
    """Model, experts in their places, engine, routes."""
    model = build_for_training(config, data)
    weights, said = first_weights(model, config) if resume_from is None else (None, "")
    slot_LE = choose_placement(model, config, data, weights, resume_from)
    place_experts(model, slot_LE, runtime.rank)
    tune_execution(model, config, runtime.device)
    if weights is not None:
        take_weights(model, weights, config.run.init_from)
        runtime.say(said)
    keep_settings(config, runtime)
    engine = start_engine(model, config, batches)
    if resume_from is not None:
        load_checkpoint(engine, resume_from, runtime)
        runtime.say(f"Resuming {config.run.out} after step {resume_from.step}.")
    sampler: ShuffledSampler | LocalSampler = ShuffledSampler(shards.count, batches.micro_global, config.run.seed)
    router = None
    if data is not None:
        assert isinstance(model, Moce) and isinstance(sampler, ShuffledSampler)
        router = Router(model, data.ids_N, slot_LE, config.experts, config.run.seed, runtime)
        if config.experts.loader_locality and config.experts.ep_size > 1:
            sampler = LocalSampler(sampler, data.ids_N, slot_LE, runtime.world_size, config.experts.ep_size)
            saved = resume_from.manifest["dealt_by"] if resume_from else []
            first = (resume_from.step if resume_from else 0) * batches.accumulation
            sampler.tables = LocalSampler.tables_from_tree(saved) or [(first, router.prepare(None).expert_MLK[:, :, 0])]
        if runtime.is_main:
            keep_clusters(config)
    clusters_hash = data.clusters.hash if data else None
    return Session(config, runtime, shards, batches, schedule, sampler, engine, router, slot_LE, clusters_hash)


def _train(session: Session, first_step: int) -> int:
    """The steps from `first_step` on; writes metrics, pictures and checkpoints. Returns the steps taken in all."""
    run, schedule, runtime = session.config.run, session.schedule, session.runtime
    stop, meter = StopRequest(), Meter()
    statistics = RouteStatistics(session.router) if session.router else None
    loader = _loader(session, first_step)
    stream = iter(loader)
    step = first_step
    try:
        with Teller(run.out, first_step, schedule.steps, session.batches.global_batch, runtime.is_main) as teller:
            while step < schedule.steps:
                set_lr(session.engine, schedule.lr(step))
                totals, waited = _step(session, stream, step)
                asked = float(stop.received is not None)
                *totals, asked = runtime.sum([*totals, len(loader.replaced), asked])
                step += 1
                meter.step(session.batches.global_batch, waited)
                teller.step()
                last = step == schedule.steps or asked > 0
                if session.router and not last:
                    session.router.prepare(step)  # of the next step; it reaches the host while this one is recorded
                if step % run.log_every == 0 or last:
                    teller.metrics(_record(session, step, totals, meter, statistics))
                if isinstance(session.sampler, LocalSampler) and step % _DEAL_EVERY == 0:
                    assert session.router is not None
                    table = session.router.prepare(None).expert_MLK[:, :, 0]
                    session.sampler.use(table, step * session.batches.accumulation)
                if step % run.picture_every == 0 or last:
                    _picture(session, teller, step)
                if step % run.checkpoint_every == 0 or last:
                    _save(session, step)
                if asked:
                    break
    finally:
        stop.restore()
    _report_replaced(session, loader)
    if step < schedule.steps:
        runtime.say(f"Stopped after step {step} as asked; the same command goes on from there.")
    return step


def _step(session: Session, stream: Iterator[Batch], step: int) -> tuple[list[float], float]:
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
        batch = _next_agreed(runtime, stream, routing.plan.digest if routing else 0, step)
        waited += time.perf_counter() - began
        noise_BN = mask_noise(
            session.config.run.seed, batch.ids_B, batch.epochs_B, session.config.vit_shape.num_patches
        )
        inputs: list[Any] = [batch.images_BCHW, noise_BN.to(runtime.device, non_blocking=True)]
        loss, parts = _loss(engine(*inputs, *([routing] if routing else [])), session, step)
        engine.backward(loss)
        engine.step()
        terms.append(torch.stack(parts))
    totals = torch.stack(terms).double().sum(dim=0).tolist()  # the step's one wait for the device, at its end
    shares = accumulation * runtime.world_size
    return [*(total / shares for total in totals), moved / shares], waited


def _loss(
    output: Reconstruction | MoceOutput | TokenOutput, session: Session, step: int
) -> tuple[Tensor, list[Tensor]]:
    """The weighted loss (docs/method.md, "Losses") and its detached terms: total, reconstruction, the gate's two."""
    own = session.config.experts
    if isinstance(output, Reconstruction):
        zero = torch.zeros_like(output.loss)
        loss, terms = output.loss, [output.loss, zero, zero]
    elif isinstance(output, TokenOutput):
        terms = [output.reconstruction.loss, output.importance, output.load]
        loss = terms[0] + own.token_balance_weight * (terms[1] + terms[2])
    else:
        terms = [output.reconstruction.loss, output.gate.imbalance, output.gate.balance]
        loss = terms[0] + own.imbalance_weight * session.schedule.imbalance_share(step) * terms[1]
        if own.balance == "loss":
            loss = loss + own.balance_weight * terms[2]
    return loss, [term.detach() for term in (loss, *terms)]


def _next_agreed(runtime: Runtime, stream: Iterator[Batch], digest: int, step: int) -> Batch:
    """The next batch, once all processes have one and the same plan; else all raise, and nobody waits in a collective.

    Raises:
        DataError: a process cannot read its batch.
        MoceError: the processes have different plans; the step and the ranks are named.
    """
    with runtime.together():
        batch = next(stream)
    largest, negative_smallest = runtime.max([float(digest), float(-digest)])
    if largest != -negative_smallest:
        digests = runtime.texts(f"{digest:012x}")
        usual = max(digests, key=digests.count)  # rank 0's where there is no majority: the same for all
        others = [rank for rank, text in enumerate(digests) if text != usual]
        raise MoceError(
            f"Step {step}: the ranks disagree on where images go. Rank(s) {', '.join(map(str, others))} planned "
            f"otherwise than the rest ({', '.join(digests)}): do all processes have the same shards, clusters and code?"
        )
    return batch


def _loader(session: Session, first_step: int) -> Loader:
    """The loader of this process's part of the stream, from a step on."""
    config, runtime, batches = session.config, session.runtime, session.batches

    def read_list(index: int) -> ReadList:
        return session.sampler.batch(index).part(runtime.rank, runtime.world_size)

    return Loader(
        session.shards,
        read_list,
        RandomCrop(config.run.seed, config.data.crop_scale, flip=config.data.flip),
        config.image_input,
        first=first_step * batches.accumulation,
        last=session.schedule.steps * batches.accumulation,
        batch_size=batches.micro,
        threads=config.data.threads,
        device=runtime.device,
    )


def _record(
    session: Session, step: int, totals: list[float], meter: Meter, statistics: RouteStatistics | None
) -> dict[str, Any]:
    """One line of metrics.jsonl for the step just taken (rates are per second, shares 0 to 1)."""
    loss, reconstruction, first, second, moved, replaced = totals
    record: dict[str, Any] = {
        "step": step,
        "epoch": round(step * session.batches.global_batch / session.shards.count, 4),
        "loss": loss,
        "reconstruction": reconstruction,
        "lr": session.schedule.lr(step - 1),
        "grad_norm": float(session.engine.get_global_grad_norm()),
        "images_per_second": round(meter.images_per_second, 2),
        "data_wait": round(meter.data_wait, 4),
        "images_replaced": int(replaced),
    }
    if session.config.model_spec.experts is not None and session.router is None:
        record |= {"importance": first, "token_load": second}
    if session.router is not None and statistics is not None:
        ids_G = session.sampler.batch(step * session.batches.accumulation - 1).ids
        layers = statistics.of_step(session.router.table(step - 1), ids_G)
        record |= {"imbalance": first, "balance": second, "moved": round(moved, 5), "layers": layers}
        if step >= session.schedule.imbalance_steps:
            for block, expert in statistics.newly_dead():
                session.runtime.say(
                    f"WARNING: step {step}: no cluster chooses expert {expert} of block {block}. Raise "
                    "experts.balance_weight, or set experts.balance=sinkhorn."
                )
    return record


def _picture(session: Session, teller: Teller, step: int) -> None:
    """Reconstructions of a few images, the same on every process (expert layers are collectives)."""
    config, runtime = session.config, session.runtime
    shown = min(_PICTURE_IMAGES, session.shards.count)
    ids_B = np.linspace(0, session.shards.count - 1, shown).astype(np.int64)
    reading = ReadList(ids_B, np.zeros_like(ids_B))
    crop, input = CenterCrop(config.data.center_crop), config.image_input
    loader = Loader(
        session.shards,
        lambda _: reading,
        crop,
        input,
        first=0,
        last=1,
        batch_size=shown,
        threads=1,
        device=runtime.device,
    )
    batch = _next_agreed(runtime, iter(loader), 0, step)
    noise_BN = mask_noise(config.run.seed, ids_B, reading.epochs, config.vit_shape.num_patches).to(runtime.device)
    inputs: list[Any] = [batch.images_BCHW, noise_BN]
    if session.router is not None:
        table = session.router.prepare(None)
        inputs.append(session.router.route(table, np.tile(ids_B, runtime.world_size)))
    session.engine.module.eval()
    with torch.no_grad():
        output = session.engine.module(*inputs)
    session.engine.module.train()
    if not runtime.is_main:
        return
    reconstruction = output if isinstance(output, Reconstruction) else output.reconstruction
    picture = reconstruction_picture(batch.images_BCHW, reconstruction, config.vit_shape.patch_size, input)
    path = config.run.out / "reconstructions" / f"step-{step:08d}.png"
    with atomic_file(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
    teller.picture("reconstructions", picture, step)
    if session.router is not None:
        teller.picture("routing", routing_picture(session.router.prepare(None).probs_LME), step)


def _save(session: Session, step: int) -> Path:
    """Write a checkpoint, and the route table beside it for whoever reads the run without its weights."""
    config, runtime = session.config, session.runtime
    routing = session.router.record(step) if session.router else None
    manifest = {
        "config": configuration.to_tree(config),
        "model": config.model_spec.to_tree(),
        "clusters_hash": session.clusters_hash,
        "shards_fingerprint": session.shards.fingerprint,
        "images_read": step * session.batches.global_batch,
        "routing": routing,
        "placement": {"ep_size": config.experts.ep_size, "slot_LE": session.slot_LE.tolist()},
        "dealt_by": session.sampler.to_tree() if isinstance(session.sampler, LocalSampler) else [],
    }
    folder = save_checkpoint(session.engine, config.run.out, step, manifest, config.run.keep_checkpoints, runtime)
    if routing and runtime.is_main:
        write_json(config.run.out / "routing.json", routing)
    return folder


def _report_replaced(session: Session, loader: Loader) -> None:
    """Name at the end the images that had to be replaced, of all processes."""
    listed = [line for text in session.runtime.texts("\n".join(loader.replaced_sources())) for line in text.split("\n")]
    named = sorted({line for line in listed if line})
    if named:
        shown = "\n  ".join(named[:20]) + (f"\n  and {len(named) - 20} more" if len(named) > 20 else "")
        session.runtime.say(f"{len(named)} damaged images were replaced by others:\n  {shown}")
