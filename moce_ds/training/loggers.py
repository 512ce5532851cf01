"""Where the records of a run go: `Logger`, and those on disk: `JsonLines` (the record) and `TensorBoard` (a mirror).

`RemoteLog` starts the process of Weights & Biases or MLflow, whose loggers are in `remote_loggers.py`. Mirrors take the
numbers of a record under the tags of `scalars`, and never end training.
"""

import importlib.util
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.errors import ConfigError
from moce_ds.common.host.machine import reason
from moce_ds.common.storage.files import sync
from moce_ds.common.storage.metrics_file import METRICS, last_check, sealed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)

LAYERS, TABLE = "layers", "load"  # in a record: statistics by layer; in those: one number an expert
LOSS_TAG = "loss/total"

PATIENCE = 60  # seconds that all services together may take for what is left when a run ends or stops
STATISTICS = 4096  # parts of a run with statistics of layers, and with records in mirrors; see `Thinned`

_GROUPS = {  # of the numbers of a record that are not losses; those of layers are in `_layer_scalars`
    "loss": LOSS_TAG,
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped": "optim/skipped_steps",
    "moved": "routing/moved",
    "images_replaced": "data/images_replaced",
    "data_wait": "time/data_wait",
    "images_per_second": "time/images_per_second",
    "epoch": "time/epoch",
    "attempt": "time/attempt",
    "peak_memory": "memory/peak_bytes",
}
_LAYOUT = {  # TensorBoard's tab "Custom scalars": a chart for each pattern of tags
    "Load of experts": {
        "least": ["Multiline", ["experts/load_min/.*"]],
        "most": ["Multiline", ["experts/load_max/.*"]],
        "evenness": ["Multiline", ["experts/load_entropy/.*"]],
    },
    "Routing": {
        "live experts": ["Multiline", ["experts/live/.*"]],
        "confidence of the gate": ["Multiline", ["routing/confidence/.*"]],
        "churn": ["Multiline", ["routing/churn/.*"]],
    },
}


class Thinned:
    """Which records of a run are taken: all at first, later those that are a `parts`-th of the steps so far apart.

    So n records become about parts x (1 + log(n / parts)), and a plot of the run has the same resolution at any length.
    """

    def __init__(self, parts: int) -> None:
        self._parts, self._last = parts, 0

    def takes(self, step: int) -> bool:
        """Whether the record of a step is taken; steps rise."""
        if (step - self._last) * self._parts < step:
            return False
        self._last = step
        return True


class Logger(ABC):
    """Takes the records of one start of a run, in one process."""

    @abstractmethod
    def record(self, record: Mapping[str, Any]) -> None:
        """Take a record, whose "step" is the step that it belongs to."""

    def picture(self, tag: str, picture_HWC: NDArray[np.uint8], step: int) -> None:  # noqa: B027 (not all take them)
        """Take a picture."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still to be written."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by tag, `group/name`, for charts; null and the step are left out.

    Groups are loss, optim, experts, routing, validation, data, time and memory. Numbers of a layer end in its block,
    those of the table of experts in block and expert: `experts/load/block03/00`.
    """
    found: dict[str, float | None] = {}
    for key, value in record.items():
        if key == LAYERS:
            for block, layer in value.items():
                found |= _layer_scalars(f"block{int(block):02d}", layer)
        elif isinstance(value, Mapping):
            found |= {f"{key}/{name}": item for name, item in value.items()}
        elif key != "step" and not isinstance(value, str):
            found[_GROUPS.get(key, f"loss/{key}")] = value
    return {tag: float(value) for tag, value in found.items() if value is not None}


def _layer_scalars(block: str, layer: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in layer.items():
        if name == TABLE:
            found |= {f"experts/{TABLE}/{block}/{expert:02d}": share for expert, share in enumerate(value)}
        else:
            group = "experts" if name.startswith(TABLE) or name == "live" else "routing"
            found[f"{group}/{name}/{block}"] = value
    return found


class JsonLines(Logger):
    """metrics.jsonl, the record: what is not written to it ends the run.

    Attributes:
        check: the checksum of the last line; empty: no line yet.

    Raises:
        ArtefactError: the file is damaged. OSError, also of the methods: it cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self.check = last_check(run / METRICS)
        self._file = open(run / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null."""
        line, self.check = sealed(_finite(record), self.check)
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())
        sync(self._run)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """A record in which numbers that are not finite are null: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard(Logger):
    """TensorBoard's files. If writing fails, it logs one warning and writes no more.

    Args:
        folder: of the files.
        first_step: what an earlier attempt wrote for this step and later ones is not shown.
        warn: logs a warning.

    Raises:
        OSError: nothing can be written there, as the run begins.
    """

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._hook, self._others = threading.excepthook, set(threading.enumerate())
        self._has_layout = False
        threading.excepthook = self._of_thread
        try:
            from torch.utils.tensorboard import SummaryWriter  # here: only the main process needs it

            self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=first_step)
        except OSError:
            self._end()
            raise

    def record(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record, and once the layout of the charts of expert layers."""
        if LAYERS in record and not self._has_layout:
            self._has_layout = True
            self._try(lambda writer: writer.add_custom_scalars(_LAYOUT | _load_charts(record[LAYERS])))
        for tag, value in scalars(record).items():
            self._try(lambda writer, tag=tag, value=value: writer.add_scalar(tag, value, record["step"]))  # type: ignore[misc]

    def picture(self, tag: str, picture_HWC: NDArray[np.uint8], step: int) -> None:
        """Add a picture."""
        self._try(lambda writer: writer.add_image(tag, picture_HWC, step, dataformats="HWC"))

    def close(self) -> None:
        """Write what is still to be written."""
        self._try(lambda writer: writer.close())
        self._end()

    def _try(self, use: Callable[["SummaryWriter"], Any]) -> None:
        if self._writer is None:
            return
        try:
            use(self._writer)
        except OSError as error:
            with suppress(OSError):
                self._writer.close()  # ends its thread, if that is still there
            self._writer = None
            self._warn(f"{self._folder}: nothing more is written for TensorBoard: {reason(error)}")

    def _of_thread(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread, which writes, hands its error to the next call here, and would print it as well."""
        if not (isinstance(failed.exc_value, OSError) and _is_tensorboards(failed.thread)):
            self._hook(failed)

    def _end(self) -> None:
        for thread in set(threading.enumerate()) - self._others:
            if _is_tensorboards(thread):
                thread.join()  # it may be about to print its error
        threading.excepthook = self._hook


def _load_charts(layers: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """A chart for each block of the loads of all its experts."""
    blocks = [f"block{int(block):02d}" for block in layers]
    return {
        "Load of each expert": {block: ["Multiline", [f"experts/{TABLE}/{re.escape(block)}/.*"]] for block in blocks}
    }


def _is_tensorboards(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


def check_services(run: RunSettings) -> None:
    """Refuse a service whose package is not installed. Raises ConfigError."""
    for service in run.services:
        found = importlib.util.find_spec(service)
        if found is None or found.origin is None:  # without an origin: a folder `wandb` in the working directory
            raise ConfigError(
                f"run.{service}=true: the package {service} is not installed. Install the extra: "
                f"pip install 'moce-ds[{service}]', or set run.{service}=false."
            )


class RemoteLog:
    """The process that follows a run for one service, as its owner in training sees it.

    Args:
        service: a key of `remote_loggers.SERVICES`.
        run: the run folder; what metrics.jsonl holds already is not sent.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, service: str, run: Path) -> None:
        self._service, self._run = service, run
        place = str((run / METRICS).stat().st_size)
        command = [sys.executable, "-m", "moce_ds.training.remote_loggers", service, str(run), place]
        # A session of its own: Ctrl-C asks training to stop, and what it writes last is still sent.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def end(self) -> None:
        """Tell the process that nothing follows: it sends what is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait until all is sent; at the deadline, by `time.monotonic`, the process is ended with a warning."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _logger.warning(
                f"{self._run}: {self._service} has not taken the last records in time. "
                f"{METRICS} and TensorBoard have all of them."
            )
