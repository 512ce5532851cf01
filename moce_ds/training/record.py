"""What a run leaves of itself: the metrics of a step, pictures, a checkpoint's manifest, and the replaced images.

Axes: B images, C channels, H, W pixels, N patches.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from moce_ds.config import settings as configuration
from moce_ds.data.loader import Loader
from moce_ds.data.sampler import ReadList
from moce_ds.data.transform import CenterCrop
from moce_ds.distributed.agreement import next_batch_checked
from moce_ds.models.mae import Reconstruction, mask_noise
from moce_ds.storage.checksums import FileRecord
from moce_ds.text import counted
from moce_ds.training.locality import LocalSampler
from moce_ds.training.metric_logger import Meter, MetricLogger, measures
from moce_ds.training.pictures import reconstruction_picture, routing_picture
from moce_ds.training.router import RouteStatistics
from moce_ds.training.session import Session

_PICTURE_IMAGES = 8


def step_record(
    session: Session, step: int, totals: list[float], meter: Meter, statistics: RouteStatistics | None
) -> dict[str, Any]:
    """One line of metrics.jsonl for the step just taken; a collective."""
    loss, reconstruction, first, second, moved = totals
    epoch = step * session.batches.global_batch / session.shards.count
    lr, norm = session.schedule.lr(step - 1), float(session.engine.get_global_grad_norm())
    record = measures(session.attempt, step, epoch, loss, lr, norm, meter, session.runtime)
    record["reconstruction"] = reconstruction
    if session.config.model_spec.experts is not None and session.router is None:
        record |= {"importance": first, "token_load": second}
    if session.router is not None and statistics is not None:
        ids_G = session.sampler.batch(step * session.batches.accumulation - 1).ids
        layers = statistics.of_step(session.router.table(step - 1), ids_G)
        sdr = session.config.family.distils
        record |= {"distillation": first} if sdr else {"imbalance": first, "balance": second}
        record |= {"moved": round(moved, 5), "layers": layers}
        if step >= session.schedule.imbalance_steps:
            for block, expert in statistics.newly_dead():
                session.runtime.say(
                    f"WARNING: step {step}: no cluster chooses expert {expert} of block {block}. Raise "
                    "experts.balance_weight, or set experts.balance=sinkhorn."
                )
    return record


def show_picture(session: Session, teller: MetricLogger, step: int) -> None:
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
    batch = next_batch_checked(runtime, iter(loader), 0, step)
    noise_BN = mask_noise(config.run.seed, ids_B, reading.epochs, config.vit_shape.num_patches).to(runtime.device)
    inputs: list[Any] = [batch.images_BCHW, noise_BN]
    if session.router is not None:
        table = session.router.prepare(None)
        inputs.append(session.router.route(table, np.tile(ids_B, runtime.world_size)))
    session.engine.module.eval()
    with torch.no_grad():
        output = session.engine.module(*inputs)
    session.engine.module.train()
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            reconstruction = output if isinstance(output, Reconstruction) else output.reconstruction
            picture = reconstruction_picture(batch.images_BCHW, reconstruction, config.vit_shape.patch_size, input)
            path = config.run.out / "reconstructions" / f"step-{step:08d}.png"
            with session.attempt.file(path, step) as draft:
                Image.fromarray(picture).save(draft, format="PNG")
            session.attempt.note(f"{path.parent.name}/{path.name}", FileRecord.of(path), step)
            teller.picture("reconstructions", picture, step)
            if session.router is not None:
                teller.picture("routing", routing_picture(session.router.prepare(None).probs_LME), step)


def manifest(session: Session, step: int, skipped: int) -> dict[str, Any]:
    """What the checkpoint of a step says of itself, but for its files."""
    config = session.config
    return {
        "step": step,
        "skipped": skipped,
        "attempt": session.attempt.number,
        "threads": torch.get_num_threads(),
        "config": configuration.to_tree(config),
        "model": config.model_spec.to_tree(),
        "clusters_hash": session.clusters_hash,
        "shards_fingerprint": session.shards.fingerprint,
        "images_read": step * session.batches.global_batch,
        "routing": session.router.record(step) if session.router else None,
        "placement": {"ep_size": config.experts.ep_size, "slot_LE": session.slot_LE.tolist()},
        "dealt_by": session.sampler.to_tree() if isinstance(session.sampler, LocalSampler) else [],
    }


def report_replaced(session: Session, loader: Loader) -> None:
    """Name at the end the images that had to be replaced, of all processes."""
    listed = [line for text in session.runtime.texts("\n".join(loader.replaced_sources())) for line in text.split("\n")]
    named = sorted({line for line in listed if line})
    if named:
        shown = "\n  ".join(named[:20]) + (f"\n  and {len(named) - 20} more" if len(named) > 20 else "")
        were = "was" if len(named) == 1 else "were"
        session.runtime.say(f"{counted(len(named), 'damaged image')} {were} replaced:\n  {shown}")
