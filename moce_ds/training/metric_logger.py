"""What a run reports while it runs: the progress line, `metrics.jsonl` (the record), and its mirrors (`loggers.py`).

Only the main process writes. `read_metrics` resolves a step that two attempts have recorded.
"""

import logging
import time
from collections import deque
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.files import writes_to
from moce_ds.distributed.runtime import Runtime
from moce_ds.training.loggers import (
    LAYERS,
    PATIENCE,
    STATISTICS,
    TABLE,
    JsonLines,
    RemoteLog,
    TensorBoard,
    Thinned,
)

_logger = logging.getLogger(__name__)

_WINDOW = 20  # steps that rates are averaged over
_TABLES = 256  # parts of a run with tables of experts, see `Thinned`


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


class MetricLogger:
    """Progress line, metrics.jsonl and its mirrors of one attempt; use it as a context. Making one is a collective.

    Args:
        lease: of the run folder.
        run: which mirrors there are beside TensorBoard.
        first_step: steps taken before; steps: of the whole run.
        images_per_step: over all processes.

    Raises:
        ArtefactError: the run folder cannot be written to.
    """

    def __init__(
        self, lease: RunLease, run: RunSettings, first_step: int, steps: int, images_per_step: int, runtime: Runtime
    ) -> None:
        self._lease, self._runtime = lease, runtime
        self._images_per_step, self._steps = images_per_step, steps
        self._tables, self._statistics = Thinned(_TABLES), Thinned(STATISTICS)
        with runtime.raise_on_all_ranks(), writes_to(lease.run):
            if runtime.is_main:
                self._lines = JsonLines(lease.run)
                self._board = TensorBoard(lease.run / "tensorboard", first_step, runtime.warn)
                self._remote = [RemoteLog(service, lease.run) for service in run.services]
        if not runtime.is_main:
            return
        self._bar = progress_bar(
            initial=first_step,
            total=steps,
            unit="step",
            disable=None,
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
            self._lines.close()
        except OSError as fault:  # the same that ended the run; or at its end, when all that it needs is written
            if error is None:
                self._runtime.warn(f"{self._lease.run}: the last records cannot be written: {fault}")
        for remote in self._remote:
            remote.end()
        # One deadline for all: a cluster soon ends the job of a run that is asked to stop.
        deadline = time.monotonic() + PATIENCE
        for remote in self._remote:
            remote.wait(deadline)

    @property
    def mark(self) -> str | None:
        """Checksum of the last line of metrics.jsonl, which goes into a checkpoint's manifest; None: no line yet, or
        not the main process, which writes both."""
        return (self._lines.check or None) if self._runtime.is_main else None

    def keep(self, step: int) -> None:
        """Wait until the records are on the disk, before a checkpoint names the last of them; a collective.

        Raises:
            ArtefactError, SupersededError: on every process, when they cannot be written.
        """
        with self._runtime.raise_on_all_ranks():
            if self._runtime.is_main:
                with self._lease.writing(step):
                    self._lines.sync()

    def step(self) -> None:
        """Move the progress line on by one step."""
        if self._runtime.is_main:
            self._bar.update()

    def metrics(self, record: dict[str, Any]) -> None:
        """Write one record, a collective.

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
            record = {key: value for key, value in record.items() if key != LAYERS}
        elif not self._tables.takes(record["step"]) and not last:
            record = _without_tables(record)
        self._lines.record(record)
        if detailed:  # TensorBoard mirrors these records
            self._board.record(record)

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
    layers = record.get(LAYERS)
    if layers:
        least, most = (
            min(layer["load_min"] for layer in layers.values()),
            max(layer["load_max"] for layer in layers.values()),
        )
        parts.append(f"load {least:.0%}-{most:.0%}")
    return " ".join(parts)


def _without_tables(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose layers have no table of all experts."""
    if LAYERS not in record:
        return record
    layers = {
        block: {name: value for name, value in layer.items() if name != TABLE}
        for block, layer in record[LAYERS].items()
    }
    return {**record, LAYERS: layers}
