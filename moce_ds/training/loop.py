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
from moce_ds.data.loader import Batch, Loader
from moce_ds.data.sampler import ReadList, ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop, RandomCrop
from moce_ds.files import atomic_file, write_json
from moce_ds.models.mae import Reconstruction, mask_noise
from moce_ds.models.moce import Moce, MoceOutput
from moce_ds.runtime import Runtime, StopRequest
from moce_ds.training.checkpoint import load_checkpoint, save_checkpoint
from moce_ds.training.engine import set_lr, start_engine
from moce_ds.training.metrics import Meter, Teller
from moce_ds.training.pictures import reconstruction_picture, routing_picture
from moce_ds.training.router import Router, StepTable
from moce_ds.training.schedule import Schedule, make_schedule
from moce_ds.training.settings import BatchArithmetic, PretrainSettings, batch_arithmetic
from moce_ds.training.setup import build_for_training, keep_clusters, keep_settings, open_clusters, open_run, warm_start

_PICTURE_IMAGES = 8


@dataclass(frozen=True)
class Session:
    """All that the steps of a run need; nothing in it changes but the engine's weights."""

    config: PretrainSettings
    runtime: Runtime
    shards: ShardSet
    batches: BatchArithmetic
    schedule: Schedule
    sampler: ShuffledSampler
    engine: DeepSpeedEngine
    router: Router | None
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
    schedule = make_schedule(config, shards.count)
    if resume_from and resume_from.step >= schedule.steps:
        runtime.say(f"{config.run.out} is complete: {resume_from.step} steps.")
        return resume_from.step
    model = build_for_training(config, data)
    if resume_from is None:
        runtime.say(warm_start(model, config, runtime))
    keep_settings(config, runtime)
    engine = start_engine(model, config, batches)
    router = None
    if data is not None:
        assert isinstance(model, Moce)
        own = config.experts
        router = Router(
            model, data.ids_N, ep_size=own.ep_size, noise=own.gate_noise, seed=config.run.seed, runtime=runtime
        )
        if runtime.is_main:
            keep_clusters(config)
    if resume_from is not None:
        load_checkpoint(engine, resume_from, runtime)
        runtime.say(f"Resuming {config.run.out} after step {resume_from.step}.")
    sampler = ShuffledSampler(shards.count, batches.micro_global, config.run.seed)
    clusters_hash = data.clusters.hash if data else None
    session = Session(config, runtime, shards, batches, schedule, sampler, engine, router, clusters_hash)
    runtime.say(
        f"{schedule.steps} steps of {batches.global_batch} images = {runtime.world_size} processes x "
        f"{batches.accumulation} parts x {batches.micro}; peak learning rate {schedule.peak_lr:.2e} "
        f"= {config.optim.base_lr:.1e} x {batches.global_batch} / 256"
    )
    return _train(session, first_step=resume_from.step if resume_from else 0)


def _train(session: Session, first_step: int) -> int:
    """The steps from `first_step` on; writes metrics, pictures and checkpoints. Returns the steps taken in all."""
    run, schedule, runtime = session.config.run, session.schedule, session.runtime
    stop, meter = StopRequest(), Meter()
    loader = _loader(session, first_step)
    stream = iter(loader)
    step = first_step
    try:
        with Teller(run.out, first_step, schedule.steps, session.batches.global_batch, runtime.is_main) as teller:
            while step < schedule.steps:
                set_lr(session.engine, schedule.lr(step))
                table = session.router.table(step) if session.router else None
                sums, waited = _step(session, stream, step, table)
                asked = float(stop.received is not None)
                *sums, asked = runtime.sum([*sums, len(loader.replaced), asked])
                step += 1
                meter.step(session.batches.global_batch, waited)
                teller.step()
                last = step == schedule.steps or asked > 0
                if step % run.log_every == 0 or last:
                    teller.metrics(_record(session, step, sums, meter, table))
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


def _step(session: Session, stream: Iterator[Batch], step: int, table: StepTable | None) -> tuple[list[float], float]:
    """One optimizer step: this process's sums of (loss, reconstruction, imbalance, balance), and seconds waited."""
    engine, accumulation = session.engine, session.batches.accumulation
    sums, waited = np.zeros(4), 0.0
    for part in range(accumulation):
        index = step * accumulation + part
        began = time.perf_counter()
        batch = _next_agreed(session.runtime, stream)
        waited += time.perf_counter() - began
        noise_BN = mask_noise(
            session.config.run.seed, batch.ids_B, batch.epochs_B, session.config.vit_shape.num_patches
        )
        inputs: list[Any] = [batch.images_BCHW, noise_BN.to(session.runtime.device)]
        if session.router is not None and table is not None:
            # Planned from the ids that were asked for: the same on every process, also where one replaced an image.
            inputs.append(session.router.route(table, session.sampler.batch(index).ids))
        loss, terms = _loss(engine(*inputs), session, step)
        engine.backward(loss)
        engine.step()
        sums += torch.stack(terms).double().tolist()
    return (sums / (accumulation * session.runtime.world_size)).tolist(), waited


def _loss(output: Reconstruction | MoceOutput, session: Session, step: int) -> tuple[Tensor, list[Tensor]]:
    """The weighted loss (METHOD.md, "Losses") and its detached terms: total, reconstruction, imbalance, balance."""
    if isinstance(output, Reconstruction):
        loss, zero = output.loss, torch.zeros_like(output.loss)
        return loss, [loss.detach(), loss.detach(), zero, zero]
    own = session.config.experts
    weight = own.imbalance_weight * session.schedule.imbalance_share(step)
    reconstruction, gate = output.reconstruction.loss, output.gate
    loss = reconstruction + weight * gate.imbalance + own.balance_weight * gate.balance
    return loss, [term.detach() for term in (loss, reconstruction, gate.imbalance, gate.balance)]


def _next_agreed(runtime: Runtime, stream: Iterator[Batch]) -> Batch:
    """The next batch; when one process cannot read its own, all raise."""
    with runtime.together():
        return next(stream)


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


def _record(session: Session, step: int, sums: list[float], meter: Meter, table: StepTable | None) -> dict[str, Any]:
    """One line of metrics.jsonl for the step just taken (METHOD.md's terms; rates are per second, shares 0 to 1)."""
    loss, reconstruction, imbalance, balance, replaced = sums
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
    if session.router is not None and table is not None:
        ids_G = session.sampler.batch(step * session.batches.accumulation - 1).ids
        layers = session.router.statistics(table, ids_G)
        record |= {"imbalance": imbalance, "balance": balance, "layers": layers}
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
    batch = _next_agreed(runtime, iter(loader))
    noise_BN = mask_noise(config.run.seed, ids_B, reading.epochs, config.vit_shape.num_patches).to(runtime.device)
    inputs: list[Any] = [batch.images_BCHW, noise_BN]
    if session.router is not None:
        table = session.router.table(None)
        inputs.append(session.router.route(table, np.tile(ids_B, runtime.world_size)))
    with torch.no_grad():
        output = session.engine.module(*inputs)
    if not runtime.is_main:
        return
    reconstruction = output if isinstance(output, Reconstruction) else output.reconstruction
    picture = reconstruction_picture(batch.images_BCHW, reconstruction, config.vit_shape.patch_size, input)
    path = config.run.out / "reconstructions" / f"step-{step:08d}.png"
    with atomic_file(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
    teller.picture("reconstructions", picture, step)
    if session.router is not None:
        teller.picture("routing", routing_picture(session.router.table(None).probs_LME), step)


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
