"""TensorBoard's files: a mirror of metrics.jsonl, which a run can do without."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from moce_ds.host.machine import reason


class Board:
    """Writes scalars and pictures into a folder, until that fails; logs one warning then.

    Args:
        folder: where to.
        first_step: what an earlier attempt has written of this step and later ones is not shown.
        warn: logs that nothing more is written.

    Raises:
        OSError: nothing can be written there, as the run begins.
    """

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._hook, self._others = threading.excepthook, set(threading.enumerate())
        threading.excepthook = self._of_thread
        try:
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

    def _try(self, use: Callable[[SummaryWriter], Any]) -> None:
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
