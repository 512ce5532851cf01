"""The settings of a run's folder and its checkpoints, which pre-training and tuning share."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from moce_ds.config.settings import option, settings

Positive = Annotated[int, Field(gt=0)]


@settings
class RunSettings:
    """What pre-training and tuning have in common."""

    out: Path = option(help="the run's folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = option(0, "of everything random")
    checkpoint_every: Positive = option(1000, "steps between checkpoints (one is written at the end too)")
    async_checkpoint: bool = option(True, "write checkpoints while training goes on, from a copy on the host")
    keep_checkpoints: Positive = option(2, "newest checkpoints to keep")
    keep_every: Positive | None = option(None, "keep those of every so many steps too")
    max_hours: Annotated[float, Field(gt=0)] | None = option(None, "stop with a checkpoint after so long (one start)")
    max_skipped: Positive = option(10, "stop after so many steps in a row whose gradient is not finite")
    peer_timeout: Annotated[float, Field(gt=0)] = option(120.0, "seconds after which a silent process counts as lost")
    log_every: Positive = option(10, "steps between records in metrics.jsonl")
