"""What a run reports while it runs: the progress line, `metrics.jsonl` (the record), and TensorBoard (a mirror).

Only the main process writes. `read_metrics` resolves a step that two attempts have recorded.
"""

import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moce_ds.checkpoint.lease import RunLease
from moce_ds.common.host.machine import reason
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.files import sync, writes_to
from moce_ds.common.storage.metrics_file import METRICS, last_check, sealed
from moce_ds.distributed.runtime import Runtime

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)

_WINDOW = 20  # steps that rates are averaged over
_TABLES, _STATISTICS = 256, 4096  # see `Thinned`: records with tables of experts, and with statistics of layers
_LAYERS, _TABLE = "layers", "load"  # in a record: statistics by layer; in those: one number an expert


class Meter:
    """Images a second and the share of time spent waiting for data, over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=_WINDOW)
        self._last = time.perf_counter()

    def step(self, images: int, waited: float) -> None:
        """Count a step of so many images; `waited`: seconds spent waiting for data."""
        now = time.perf_counter()
        self._steps.append((images, now - self._last, waited))
        self._last = now

    @property
    def images_per_second(self) -> float:
        """Images a second of all processes together."""
        return sum(s[0] for s in self._steps) / max(1e-9, sum(s[1] for s in self._steps))

    @property
    def data_wait(self) -> float:
        """Share of the time, 0 to 1."""
        return sum(s[2] for s in self._steps) / max(1e-9, sum(s[1] for s in self._steps))


def measures(
    lease: RunLease, step: int, epoch: float, loss: float, lr: float, grad_norm: float, meter: Meter, runtime: Runtime
) -> dict[str, Any]:
    """What every record of metrics.jsonl holds (rates are per second, shares 0 to 1, memory in bytes).

    A collective: `peak_memory` is that of the process with the most.
    """
    return {
        "step": step,
        "attempt": lease.number,
        "epoch": round(epoch, 4),
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "images_per_second": round(meter.images_per_second, 2 if meter.images_per_second >= 1 else 6),
        "data_wait": round(meter.data_wait, 4),
        "peak_memory": int(runtime.max([float(runtime.peak_memory)])[0]),
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


class MetricLogger:
    """Progress line, metrics.jsonl and TensorBoard of one attempt; use it as a context. Making one is a collective.

    Raises:
        ArtefactError: the run folder cannot be written to.
    """

    def __init__(self, lease: RunLease, first_step: int, steps: int, images_per_step: int, runtime: Runtime) -> None:
        self._lease, self._runtime = lease, runtime
        self._check = ""
        self._images_per_step, self._steps = images_per_step, steps
        self._tables, self._statistics = Thinned(_TABLES), Thinned(_STATISTICS)
        with runtime.raise_on_all_ranks(), writes_to(lease.run):
            if runtime.is_main:
                self._check = last_check(lease.run / METRICS)
                self._record = open(lease.run / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
                self._board = Board(lease.run / "tensorboard", first_step, runtime.warn)
        if not runtime.is_main:
            return
        self._bar = progress_bar(
            initial=first_step,
            total=steps,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} {desc}eta {remaining}",
        )

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._runtime.is_main:
            return
        self._bar.close()
        self._board.close()
        try:
            self._record.close()
        except OSError as fault:  # the same that ended the run; or at its end, when all that it needs is written
            if error is None:
                self._runtime.warn(f"{self._lease.run}: the last records cannot be written: {fault}")

    @property
    def mark(self) -> str | None:
        """Checksum of the last line of metrics.jsonl, which goes into a checkpoint's manifest; None: no line yet."""
        return self._check or None

    def keep(self, step: int) -> None:
        """Wait until the records are on the disk, before a checkpoint names the last of them; a collective.

        Raises:
            ArtefactError, SupersededError: on every process, when they cannot be written.
        """
        with self._runtime.raise_on_all_ranks():
            if self._runtime.is_main:
                with self._lease.writing(step):
                    os.fsync(self._record.fileno())
                    sync(self._lease.run)

    def step(self) -> None:
        """Move the progress line on by one step."""
        if self._runtime.is_main:
            self._bar.update()

    def metrics(self, record: dict[str, Any]) -> None:
        """Write one record, a collective; numbers in nested dictionaries become TensorBoard scalars under a/b/c.

        Raises:
            ArtefactError, SupersededError: on every process, when it cannot be written.
        """
        with self._runtime.raise_on_all_ranks():
            if self._runtime.is_main:
                with self._lease.writing(record["step"]):
                    self._write(record)
                self._show(record)

    def _write(self, record: dict[str, Any]) -> None:
        last = record["step"] == self._steps
        if not (detailed := self._statistics.takes(record["step"]) or last):
            record = {key: value for key, value in record.items() if key != _LAYERS}
        elif not self._tables.takes(record["step"]) and not last:
            record = _without_tables(record)
        line, self._check = sealed(_finite(record), self._check)
        self._record.write(line)
        self._record.flush()
        if detailed:  # TensorBoard mirrors these records
            for tag, value in _flat(record):
                self._board.scalar(tag, value, record["step"])

    def _show(self, record: dict[str, Any]) -> None:
        line = progress_line(record)
        self._bar.set_description_str(line + " ", refresh=True)
        if self._bar.disable:  # not a terminal: a log file wants whole lines
            eta = time_left((self._bar.total - record["step"]) * self._images_per_step, record["images_per_second"])
            _logger.info(f"step {record['step']}/{self._bar.total} {line} eta {eta}")

    def picture(self, tag: str, picture_HWC: NDArray[np.uint8], step: int) -> None:
        """Show a picture in TensorBoard."""
        if self._runtime.is_main:
            self._board.picture(tag, picture_HWC, step)


def time_left(images: int, images_per_second: float) -> str:
    """How long the images still take, as hours, minutes and seconds; `?` where the rate is too low to be known."""
    return tqdm.format_interval(images / images_per_second) if images_per_second else "?"


def progress_line(record: dict[str, Any]) -> str:
    """The record in under 100 columns: loss, speed, waiting, rate, expert load."""
    rate = record["images_per_second"]
    parts = [
        f"loss {record['loss']:.4f}",
        f"{rate:.0f} img/s" if rate >= 10 else f"{rate:.2f} img/s" if rate >= 0.1 else f"{rate:.2g} img/s",
        f"wait {record['data_wait']:.0%}",
        f"lr {record['lr']:.1e}",
    ]
    layers = record.get(_LAYERS)
    if layers:
        least, most = (
            min(layer["load_min"] for layer in layers.values()),
            max(layer["load_max"] for layer in layers.values()),
        )
        parts.append(f"load {least:.0%}-{most:.0%}")
    return " ".join(parts)


def _without_tables(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose layers have no table of all experts."""
    if _LAYERS not in record:
        return record
    layers = {
        block: {name: value for name, value in layer.items() if name != _TABLE}
        for block, layer in record[_LAYERS].items()
    }
    return {**record, _LAYERS: layers}


def _finite(value: Any) -> Any:
    """A record in which numbers that are not finite are null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            found += [(f"{prefix}{key}/{i}", float(item)) for i, item in enumerate(value)]
        elif key != "step":
            found.append((f"{prefix}{key}", float(value)))
    return found


class Board:
    """TensorBoard's files, a mirror of metrics.jsonl. If writing fails, it logs one warning and writes no more.

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
        threading.excepthook = self._of_thread
        try:
            from torch.utils.tensorboard import SummaryWriter  # here: only the main process needs it

            self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=first_step)
        except OSError:
            self._end()
            raise

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add one number."""
        self._try(lambda writer: writer.add_scalar(tag, value, step))

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


def _is_tensorboards(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")
