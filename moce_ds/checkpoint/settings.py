"""The settings of a run folder and its checkpoints, shared by pre-training and tuning."""

from pathlib import Path

from moce_ds.common.config.settings import Positive, PositiveFloat, Seed, option, settings


@settings
class RunSettings:
    """Settings shared by pre-training and tuning."""

    out: Path = option(help="folder of the run")
    seed: Seed = option(0, "random seed")
    checkpoint_every: Positive = option(1000, "steps between checkpoints (one is written at the end too)")
    async_checkpoint: bool = option(True, "write checkpoints during training, from a copy on the host")
    keep_checkpoints: Positive = option(2, "number of newest checkpoints to keep")
    keep_every: Positive | None = option(None, "also keep the checkpoint of every this many steps")
    max_hours: PositiveFloat | None = option(None, "save and stop after this many hours (per start)")
    max_skipped: Positive = option(10, "stop after this many consecutive steps with a non-finite gradient")
    peer_timeout: PositiveFloat = option(120.0, "seconds after which a silent process counts as lost")
    log_every: Positive = option(10, "steps between records in metrics.jsonl")
    wandb: bool = option(False, "also log to Weights & Biases; WANDB_PROJECT, WANDB_MODE, ... apply")
    mlflow: bool = option(False, "also log to MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ... apply")

    @property
    def services(self) -> tuple[str, ...]:
        """Services that the run logs to, by the name of their package."""
        return tuple(name for name in ("wandb", "mlflow") if getattr(self, name))
