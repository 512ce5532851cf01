"""How a command ends from outside: by a signal, or because the reader of its output is gone. Also passes signals on to
a child.

Imports nothing that takes time, because it is needed before anything else is loaded.
"""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from moce_ds.common.errors import STOPPED
from moce_ds.common.host.rank import is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a command to stop."""


def obeyed() -> list[signal.Signals]:
    """The signals of `SIGNALS` to handle: all but SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number is signal.SIGHUP)]


def leave(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends the process at once, for the time before any work has begun.

    It raises no exception, because an import could swallow it.
    """
    if is_first():
        with suppress(OSError):
            os.write(2, b"Interrupted.\n")
    os._exit(STOPPED)


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn each signal into a KeyboardInterrupt within the block, so that partial output is removed.

    A second signal ends the process. Code that can stop at a better moment installs its own handlers meanwhile.
    """
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process and number != signal.SIGINT:  # in a forked process: keep the default behaviour
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for other in obeyed():
            signal.signal(other, leave)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in obeyed()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def kept_signals(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Collect the signals that arrive during the block, in order. The previous handlers return after it."""
    received: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before: dict[int, Any] = {number: signal.signal(number, keep) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for(child: subprocess.Popen[bytes], received: Sequence[int]) -> int:
    """Wait for a child and return its exit status. Signals added to `received` meanwhile are passed on, in order."""
    passed_on = 0
    while child.poll() is None:
        for number in received[passed_on:]:
            child.send_signal(number)
            passed_on += 1
        time.sleep(0.05)
    return child.returncode


class _Output(io.FileIO):
    """A file descriptor for writing. Once its reader is gone, further output is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._gone = {errno.EPIPE, errno.ECONNRESET} | ({errno.EIO} if self.isatty() else set())

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._gone:
                raise
            return len(data)


def outlive_readers() -> None:
    """Let standard output and error survive a closed pipe, as by `head`, or a terminal that is gone.

    Further output is dropped and the work continues. A full disk is still an error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if _is_descriptor(stream):
            stream.flush()
            output = _Output(stream.fileno())
            unbuffered = isinstance(stream.buffer, io.RawIOBase)  # by PYTHONUNBUFFERED
            text = io.TextIOWrapper(
                output if unbuffered else io.BufferedWriter(output),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)


def _is_descriptor(stream: Any) -> bool:
    """Whether a text stream writes to a descriptor and was not made by `outlive_readers`."""
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    return isinstance(stream, io.TextIOWrapper) and isinstance(raw, io.FileIO) and not isinstance(raw, _Output)
