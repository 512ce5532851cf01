"""Pre-training, read from top to bottom: `pretrain` opens everything that a run needs, and `Trainer.fit` trains."""

from pathlib import Path

from moce_ds.checkpoint.deepspeed_state import latest_valid_checkpoint, verify_checkpoint
from moce_ds.checkpoint.format import steps_of
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.manager import CheckpointManager
from moce_ds.config.settings import to_tree
from moce_ds.distributed.runtime import Runtime
from moce_ds.training.engine import parameter_groups, start_engine
from moce_ds.training.inputs import keep_clusters, keep_teacher, open_inputs, read_teacher
from moce_ds.training.model import placed_model
from moce_ds.training.pretrain_task import PretrainTask
from moce_ds.training.run_checks import check_resumable, keep_settings
from moce_ds.training.schedule import describe, make_schedule
from moce_ds.training.settings import PretrainSettings, batch_arithmetic
from moce_ds.training.trainer import Progress, Trainer


def pretrain(config: PretrainSettings, runtime: Runtime) -> Progress:
    """Run, or resume, pre-training until its last step or until asked to stop; a collective.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on every process alike.
    """
    run, experts, spec = config.run, config.experts, config.model_spec
    batches = batch_arithmetic(config, runtime.world_size)
    inputs = open_inputs(config.data.shards, config.routing_clusters, spec.experts)
    with runtime.raise_on_all_ranks():
        check_resumable(config, inputs.named, f"start another run: run.init_from={run.out}")
    schedule = make_schedule(config.optim, inputs.shards.count, experts.imbalance_start)
    if done := _complete(run.out, schedule.steps, runtime):
        runtime.say(f"{run.out} is complete: {done} steps.")
        return Progress(done, schedule.steps)
    with RunLease.claimed(run.out, runtime) as lease:
        resume_from = latest_valid_checkpoint(run.out, runtime)
        model, slot_LE = placed_model(
            spec, config.loss_weights, experts, config.engine, run, inputs.clusters, resume_from, runtime
        )
        encoder = read_teacher(spec, run) if config.wants_teacher else None
        keep_settings(config, lease, runtime)  # nothing is left that can be refused
        keep_clusters(config.routing_clusters, run.out, runtime)
        teacher = keep_teacher(encoder, run.out, runtime) if encoder else None
        groups = parameter_groups(model, config.optim, experts.gate_lr_scale)
        engine = start_engine(model, groups, config.optim, config.engine, batches)
        task = PretrainTask(
            model, slot_LE, inputs, spec.input, teacher, data=config.data, experts=experts, run=run, schedule=schedule,
            batches=batches, lease=lease, runtime=runtime,
        )  # fmt: skip
        checkpoints = CheckpointManager(engine, run, lease, runtime)
        placement = {"ep_size": experts.ep_size, "slot_LE": slot_LE.tolist()}
        made_from = {"config": to_tree(config), "model": spec.to_tree(), **inputs.made_from, "placement": placement}
        trainer = Trainer(engine, task, checkpoints, lease, run, schedule, batches, made_from, runtime)
        if resume_from is not None:
            trainer.restore(resume_from)
        runtime.say(describe(schedule, batches, config.optim.base_lr))
        progress = trainer.fit()
        task.report_replaced()
        return progress


def _complete(run: Path, steps: int, runtime: Runtime) -> int:
    """The steps of a run that has taken all of them, whose last checkpoint is valid; else 0. A collective."""
    done = int(runtime.max([float(max(steps_of(run), default=0))])[0])
    return done if done >= steps and not verify_checkpoint(run, done, runtime) else 0
