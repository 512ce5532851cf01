"""Waiting for what takes its time, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float, what: str, report: Callable[[], str]) -> T:
    """Wait until `condition` returns something true, and return that.

    Raises:
        TimeoutError: it did not within `seconds`; the message says `what`, and what `report` tells then.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {seconds} s: {what}.\n{report()}")
        time.sleep(0.05)
    return found
