"""Fine-tuning from settings to a record: what `moce finetune` does."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from moce_ds.checkpoint.tuning_result import read_result
from moce_ds.config.settings import to_tree
from moce_ds.data.shards import ShardSet
from moce_ds.data.task_images import opened_images
from moce_ds.distributed.runtime import Runtime
from moce_ds.evaluation.results import known_by
from moce_ds.models.encode import open_encoder
from moce_ds.tuning.classification import Classification
from moce_ds.tuning.labelled import Splits, make_splits
from moce_ds.tuning.settings import FinetuneDataSettings, FinetuneSettings
from moce_ds.tuning.tune import tune


def finetune(config: FinetuneSettings, runtime: Runtime) -> dict[str, Any] | None:
    """Run, or resume, fine-tuning; a collective.

    Returns a record for results.json without the names of task and model, or None where the run was stopped.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on every process alike.
    """
    with runtime.raise_on_all_ranks():
        encoder = open_encoder(config.data.encoder, torch.device("cpu"))
    if config.data.encoder.is_file():
        runtime.say(f"{config.data.encoder}: read as {encoder.provenance['taken_for']}")
    with opened_splits(config.data, config.run.seed, runtime) as splits:
        task = Classification(
            encoder, splits, config.data, config.augment, config.optim, config.engine, config.run, runtime
        )
        measures = tune(task, config, runtime)
        if measures is None:
            return None
        result, optim = read_result(config.run.out), config.optim
        trained = [splits.fingerprint, to_tree(optim), to_tree(config.augment), config.run.seed]
        return {
            "verb": "finetune",
            **known_by(encoder, *trained),
            **measures,
            "n_train": splits.train.count + (splits.val.count if splits.val else 0),
            "n_test": splits.test.count,
            "settings": {
                "base_lr": optim.base_lr,
                "epochs": optim.epochs,
                "layer_decay": optim.layer_decay,
                "seed": config.run.seed,
                "step": result["step"],
                **{f"validation_{metric}": value for metric, value in result["validation"].items()},
            },
        }


@contextmanager
def opened_splits(data: FinetuneDataSettings, seed: int, runtime: Runtime) -> Iterator[Splits]:
    """The splits that the settings name, open for the length of the block. Raises DataError, ArtefactError."""
    with ExitStack() as stack:

        def opened(path: Path) -> ShardSet:
            return stack.enter_context(opened_images(path, runtime.warn))

        with runtime.raise_on_all_ranks():
            val = opened(data.val) if data.val else data.val_share
            splits = make_splits(opened(data.train), val, opened(data.test), seed)
        yield splits
