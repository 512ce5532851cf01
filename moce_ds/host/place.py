"""Which of several processes this one is, by the variables that torchrun, our launchers and SLURM's jobs set."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moce_ds.errors import ConfigError

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""The variables of a process that has no peers."""

_CURE = (
    "Start several processes with torchrun or `moce launch local --nproc N`, which set these variables; to run one "
    "process, unset WORLD_SIZE and RANK."
)


class PlaceError(ConfigError):
    """The variables that tell a process its place are missing or impossible."""

    every_process = True


@dataclass(frozen=True)
class Place:
    """The place of a process among its peers.

    Attributes:
        rank, world_size: its number, and how many there are.
        local_rank: its number on its machine.
        host, port: where the processes meet; "" and 0 for one that is alone.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str = ""
    port: int = 0

    @classmethod
    def here(cls, given: Mapping[str, str] = os.environ) -> "Place":
        """The place of this process; that of one that is alone where nothing is set.

        Raises:
            PlaceError: a variable is missing, is no number, or does not go with the others.
        """
        world_size = _number(given, "WORLD_SIZE", least=1)
        if world_size == 1:
            _number(given, "RANK", least=0, most=0)
            return cls(0, 1, _number(given, "LOCAL_RANK", least=0))
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not given.get(name, "").strip()]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise PlaceError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} {are} not set. {_CURE}")
        return cls(
            _number(given, "RANK", least=0, most=world_size - 1),
            world_size,
            _number(given, "LOCAL_RANK", least=0),
            given["MASTER_ADDR"].strip(),
            _number(given, "MASTER_PORT", least=1, most=65535),
        )


def is_first(given: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what all have to say."""
    return given.get("RANK", "0") == "0"


def _number(given: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = given.get(name, ALONE.get(name, ""))
    expected = f"a whole number from {least} to {most}" if most is not None else f"a whole number of at least {least}"
    expected = str(least) if least == most else expected
    # isdecimal knows other scripts' digits, and int takes underscores and signs.
    if text.strip().isascii() and text.strip().isdecimal() and len(text.strip()) <= 9:
        number = int(text)
        if number >= least and (most is None or number <= most):
            return number
    raise PlaceError(f"{name} is {text!r}, expected {expected}. {_CURE}")
