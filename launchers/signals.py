"""Signals for a process that only looks after others: kept instead of obeyed, and passed on to a child."""

import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any


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
