"""The process beside training that follows the files of a run for Weights & Biases or MLflow (`loggers.RemoteLog`).

Training neither waits for a service nor ends with it: this process reads metrics.jsonl and `reconstructions/` as they
grow, and warns once if the service fails. A resumed run continues the same run of the service.

This module imports no torch: the process starts at once and is small.
"""

import hashlib
import json
import logging
import os
import select
import signal
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moce_ds.checkpoint.run_folder import ATTEMPTS, CONFIG, RECONSTRUCTIONS
from moce_ds.common.config.settings import read_yaml
from moce_ds.common.host.interrupts import obeyed
from moce_ds.common.host.program import run_main
from moce_ds.common.storage.files import read_json
from moce_ds.common.storage.metrics_file import METRICS, new_records
from moce_ds.common.text import in_line
from moce_ds.training.loggers import PATIENCE, STATISTICS, Logger, Thinned, scalars

_logger = logging.getLogger("moce_ds.training.remote_loggers")  # this module also runs as __main__

_PROJECT = "moce_ds"  # where no environment variable names another project or experiment
_INTERVAL = 2.0  # seconds between two looks at the files
_MLFLOW_BATCH = 1000  # metrics in a request, the most that MLflow allows


class RemoteLogger(Logger):
    """A logger of a service, made in the process that follows the run.

    Args:
        run: the run folder.
        identity: of the run in all its starts.

    Raises:
        one of `failures`, also by the methods: the service fails.
    """

    @abstractmethod
    def __init__(self, run: Path, identity: str) -> None: ...

    @staticmethod
    @abstractmethod
    def failures() -> tuple[type[Exception], ...]:
        """What the library of the service raises when the service fails."""


class WeightsAndBiases(RemoteLogger):
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_MODE, WANDB_DIR and its other variables apply.

    Steps are the metric "step": the service's own counter refuses the steps that a resumed run repeats.
    """

    def __init__(self, run: Path, identity: str) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            id=identity,
            resume="allow",
            name=run.name,
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=os.environ.get("WANDB_DIR", str(run)),
            config=read_yaml(run / CONFIG),
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),  # nothing but what docs/logging.md names leaves the machine
        )
        self._run.define_metric("*", step_metric="step")
        offline = self._run.settings.sync_dir
        place = f"wandb sync {offline} uploads it" if self._run.offline else self._run.url
        _logger.info(in_line(f"Weights & Biases: run {identity}: {place}"))

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Errors of the library and of the network."""
        import wandb

        return wandb.Error, OSError

    def record(self, record: Mapping[str, Any]) -> None:
        """Queue the numbers of a record."""
        self._run.log(scalars(record) | {"step": record["step"]})

    def picture(self, tag: str, picture_HWC: NDArray[np.uint8], step: int) -> None:
        """Queue a picture."""
        self._run.log({f"pictures/{tag}": self._image(picture_HWC), "step": step})

    def close(self) -> None:
        """Wait until all is uploaded, or in offline mode written."""
        self._run.finish()


class MLflow(RemoteLogger):
    """A run of MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables apply.

    MLflow numbers runs itself; the tag `moce.run` finds that of an earlier start.
    """

    _TAG: ClassVar = "moce.run"

    def __init__(self, run: Path, identity: str) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it reports each table of a new database
        self._client, self._metric = mlflow.MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`{self._TAG}` = '{identity}'")
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.set_terminated(self._run, "RUNNING")
        else:
            self._run = self._client.create_run(experiment, tags={self._TAG: identity}, run_name=run.name).info.run_id
            settings = _flat(read_yaml(run / CONFIG))
            self._client.log_batch(self._run, params=[Param(key, value) for key, value in settings.items()])
        _logger.info(in_line(f"MLflow: run {self._run} of experiment {name}"))

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Errors of the library and of the network."""
        import mlflow
        from sqlalchemy.exc import SQLAlchemyError

        return mlflow.MlflowException, SQLAlchemyError, OSError

    def record(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record."""
        now, step = int(time.time() * 1000), record["step"]
        metrics = [self._metric(tag, value, now, step) for tag, value in scalars(record).items()]
        for first in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._run, metrics[first : first + _MLFLOW_BATCH])

    def picture(self, tag: str, picture_HWC: NDArray[np.uint8], step: int) -> None:
        """Send a picture."""
        self._client.log_image(self._run, picture_HWC, key=tag, step=step)

    def close(self) -> None:
        """Mark the run as finished; a start that resumes it marks it as running again."""
        self._client.set_terminated(self._run)


SERVICES: dict[str, type[RemoteLogger]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}
"""The logger of each service, by the name of its package."""


def identity_of(run: Path) -> str:
    """16 hexadecimal digits of the first start of a run, whose record is permanent: the same in all its starts.

    Raises:
        ArtefactError: the record cannot be read.
    """
    first = min((run / ATTEMPTS).glob("*.json"))
    record = read_json(first, "the record of an attempt", "moce pretrain")
    start = {key: record.get(key) for key in ("host", "pid", "started")}
    return hashlib.sha256(json.dumps(start).encode()).hexdigest()[:16]


def follow(run: Path, place: int, logger: Logger, ended: Callable[[], bool]) -> None:
    """Give a logger what is written into a run folder until `ended`, which waits a while for the end.

    Args:
        place: bytes of metrics.jsonl to skip.
    """
    pictures, thinned, over = set(_pictures(run)), Thinned(STATISTICS), False
    with open(run / METRICS, "rb") as file:
        file.seek(place)
        while not over:
            over = ended()  # first: what is written before the end is read after it
            for record in new_records(file):
                if thinned.takes(record["step"]):
                    logger.record(record)
            for path in sorted(set(_pictures(run)) - pictures):
                with Image.open(path) as picture:
                    logger.picture(RECONSTRUCTIONS, np.asarray(picture), int(path.stem.removeprefix("step-")))
                pictures.add(path)
    logger.close()


def _pictures(run: Path) -> list[Path]:
    return list((run / RECONSTRUCTIONS).glob("step-*.png"))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as text, of at most 500 characters."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)[:500]}
    return found


def _training_ended() -> bool:
    """Whether training has closed its end of the standard input, or ended; waits a moment for that."""
    ended = bool(select.select([sys.stdin], [], [], _INTERVAL)[0])
    if ended:
        signal.alarm(PATIENCE)  # nobody may be left who ends this process
    return ended


def main() -> None:
    """Follow a run for a service; the arguments are service, run folder and the size of metrics.jsonl."""
    service, run, place = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for number in obeyed():
        signal.signal(number, signal.SIG_IGN)  # a cluster sends them to all processes: training answers them
    make = SERVICES[service]
    try:
        follow(run, place, make(run, identity_of(run)), _training_ended)
    except make.failures() as error:
        _logger.warning(in_line(f"{run}: nothing more is logged to {service}: {error}"))


if __name__ == "__main__":
    run_main(main)
