"""Everything that the steps of a run need, opened once.

Axes: L expert layers, E experts.
"""

from dataclasses import dataclass

import numpy as np
from deepspeed import DeepSpeedEngine

from moce_ds.checkpoint.deepspeed_state import latest_valid_checkpoint, load_checkpoint
from moce_ds.checkpoint.format import OPTIMIZER, Checkpoint
from moce_ds.checkpoint.lease import RunLease
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import ConfigError, MoceError
from moce_ds.host.threads import keep
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce
from moce_ds.models.sdr import Teacher
from moce_ds.training.engine import start_engine
from moce_ds.training.locality import LocalSampler
from moce_ds.training.router import Router
from moce_ds.training.schedule import Schedule
from moce_ds.training.settings import BatchArithmetic, PretrainSettings
from moce_ds.training.setup import (
    ClusteredData,
    build_for_training,
    choose_placement,
    first_weights,
    keep_clusters,
    keep_settings,
    place_experts,
    take_weights,
    tune_execution,
)
from moce_ds.training.teacher import keep_teacher, read_teacher


@dataclass(frozen=True)
class Session:
    """All that the steps of a run need; nothing in it changes but weights, and the tables that images are dealt by.

    `first_step` and `first_skipped`: the steps taken, and those of them without an update, before this attempt.
    """

    config: PretrainSettings
    runtime: Runtime
    attempt: RunLease
    shards: ShardSet
    batches: BatchArithmetic
    schedule: Schedule
    sampler: ShuffledSampler | LocalSampler
    engine: DeepSpeedEngine
    router: Router | None
    slot_LE: np.ndarray
    teacher: Teacher | None
    clusters_hash: str | None
    first_step: int
    first_skipped: int


def open_session(
    config: PretrainSettings,
    runtime: Runtime,
    shards: ShardSet,
    batches: BatchArithmetic,
    schedule: Schedule,
    data: ClusteredData | None,
) -> Session:
    """Become the owner of the run folder, and bring model, experts, engine and routes to where the run goes on.

    Raises:
        ArtefactError, ConfigError, SupersededError: on every process alike.
    """
    attempt = RunLease.claim(config.run.out, runtime)
    try:
        resume_from = latest_valid_checkpoint(config.run.out, runtime)
        model, slot_LE = _placed_model(config, runtime, data, resume_from)
        teacher = read_teacher(config)
    except MoceError:
        if runtime.is_main and not (config.run.out / "config.yaml").exists():
            attempt.withdraw()
        raise
    first_step = resume_from.step if resume_from else 0
    keep_settings(config, attempt, runtime)
    engine = start_engine(model, config, batches)
    if resume_from is not None:
        load_checkpoint(engine, resume_from, runtime)
        if told := keep(resume_from.manifest.get("threads")):
            runtime.say(told)
        runtime.say(f"Resuming {config.run.out} after step {first_step}.")
    sampler: ShuffledSampler | LocalSampler = ShuffledSampler(shards.count, batches.micro_global, config.run.seed)
    router = None
    if data is not None:
        assert isinstance(model, Moce) and isinstance(sampler, ShuffledSampler)
        router = Router(model, data.ids_N, slot_LE, config.experts, config.run.seed, runtime)
        if config.experts.loader_locality and config.experts.ep_size > 1:
            sampler = LocalSampler(sampler, data.ids_N, slot_LE, runtime.world_size, config.experts.ep_size)
            saved = LocalSampler.tables_from_tree(resume_from.entry("dealt_by") if resume_from else [])
            first_table = (first_step * batches.accumulation, router.prepare(None).expert_MLK[:, :, 0])
            sampler.tables = saved or [first_table]
        keep_clusters(config, runtime)
    return Session(
        config=config,
        runtime=runtime,
        attempt=attempt,
        shards=shards,
        batches=batches,
        schedule=schedule,
        sampler=sampler,
        engine=engine,
        router=router,
        slot_LE=slot_LE,
        teacher=keep_teacher(teacher, config, runtime) if teacher else None,
        clusters_hash=data.clusters.hash if data else None,
        first_step=first_step,
        first_skipped=resume_from.entry("skipped") if resume_from else 0,
    )


def _placed_model(
    config: PretrainSettings, runtime: Runtime, data: ClusteredData | None, resume_from: Checkpoint | None
) -> tuple[MaskedAutoencoder, np.ndarray]:
    """The model with its experts in their places, slot_LE; a new run's has its first weights."""
    if resume_from and not resume_from.names(OPTIMIZER):
        raise ConfigError(
            f"run.out: {config.run.out} holds weights without the optimizer's state, from which no run can go on: "
            f"start a new one in another folder, with run.init_from={config.run.out}."
        )
    model = build_for_training(config, data)
    weights, said = first_weights(model, config) if resume_from is None else (None, "")
    slot_LE = choose_placement(model, config, data, weights, resume_from)
    place_experts(model, slot_LE, runtime.rank)
    tune_execution(model, config, runtime.device)
    if weights is not None:
        take_weights(model, weights, config.run.init_from)
        runtime.say(said)
    return model, slot_LE
