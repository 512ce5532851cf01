"""What ends a command from outside, a signal or a reader of its output that has gone, and signals passed on to a child.

Imports nothing that takes time, as it is needed before anything else is loaded.
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

from moce_ds.errors import STOPPED
from moce_ds.host.place import is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a command to stop."""


def obeyed() -> list[signal.Signals]:
    """The signals of `SIGNALS` to listen to: not SIGHUP where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number is signal.SIGHUP)]


def leave(number: int, frame: FrameType | None) -> None:
    """A handler: end at once, while nothing has begun. No exception, as one that is raised inside an import can be
    swallowed there."""
    if is_first():
        with suppress(OSError):
            os.write(2, b"Interrupted.\n")
    os._exit(STOPPED)


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which each signal is a KeyboardInterrupt, so that what it has half written is removed; a second one
    ends the process. Those who can stop at a better moment handle signals themselves meanwhile."""
    own = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own and number != signal.SIGINT:  # a process that was forked: it ends as it always did
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
    """The signals that arrive while the block runs, in order; whoever handled them before does so again after it."""
    asked: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before: dict[int, Any] = {number: signal.signal(number, keep) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for(child: subprocess.Popen[bytes], asked: Sequence[int]) -> int:
    """Wait for a child and return how it ended. What is asked meanwhile is passed on, in order."""
    passed_on = 0
    while child.poll() is None:
        for number in asked[passed_on:]:
            child.send_signal(number)
            passed_on += 1
        time.sleep(0.05)
    return child.returncode


class _Output(io.FileIO):
    """A descriptor to write to, whose reader may leave: what is written after that is dropped."""

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
    """Let standard output and error survive a pipe that is closed, as by `head`, or a terminal that is gone: nothing
    more is said, and the work goes on. A full disk is still an error."""
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
    """Whether a text stream writes to a descriptor, and is not one that `outlive_readers` has made."""
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    return isinstance(stream, io.TextIOWrapper) and isinstance(raw, io.FileIO) and not isinstance(raw, _Output)
