"""The rank of this process among its peers, and the secret that they share: variables that torchrun, our launchers and
SLURM jobs set."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moce_ds.common.errors import ConfigError

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""The variables of a process without peers."""

SECRET = "MOCE_SECRET"
"""The variable with the secret of a run, which its launcher gives to all processes. Without it, as under torchrun, the
seals of their messages only detect accidents."""

_CURE = (
    "Start several processes with torchrun or `moce launch local --nproc N`, which set these variables; to run one "
    "process, unset WORLD_SIZE and RANK."
)


class RankError(ConfigError):
    """The variables that give a process its rank are missing or invalid."""

    every_process = True


@dataclass(frozen=True)
class ProcessRank:
    """The rank of a process, and the address where the processes meet.

    Attributes:
        rank, world_size: global rank, and number of processes.
        local_rank: rank on its machine.
        host, port: address of the rendezvous; "" and 0 for a single process.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str = ""
    port: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "ProcessRank":
        """The rank of this process. A single process needs no variables.

        Raises:
            RankError: a variable is missing, is not a number, or contradicts the others.
        """
        world_size = _number(environment, "WORLD_SIZE", least=1)
        if world_size == 1:
            _number(environment, "RANK", least=0, most=0)
            return cls(0, 1, _number(environment, "LOCAL_RANK", least=0))
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "").strip()]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise RankError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} {are} not set. {_CURE}")
        return cls(
            _number(environment, "RANK", least=0, most=world_size - 1),
            world_size,
            _number(environment, "LOCAL_RANK", least=0),
            environment["MASTER_ADDR"].strip(),
            _number(environment, "MASTER_PORT", least=1, most=65535),
        )


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in the block, also for the processes that it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def lone_process() -> Iterator[None]:
    """A block in which this process counts as the only one, whatever started it."""
    names = (*ALONE, "MASTER_ADDR", "MASTER_PORT")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, which reports what all ranks would repeat."""
    return environment.get("RANK", "0") == "0"


def new_secret() -> str:
    """A secret for one start of a run, in ASCII."""
    return secrets.token_hex(16)


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = environment.get(name, ALONE.get(name, ""))
    expected = f"a whole number from {least} to {most}" if most is not None else f"a whole number of at least {least}"
    expected = str(least) if least == most else expected
    # str.isdecimal accepts the digits of other scripts, and int accepts underscores and signs.
    if text.strip().isascii() and text.strip().isdecimal() and len(text.strip()) <= 9:
        number = int(text)
        if number >= least and (most is None or number <= most):
            return number
    raise RankError(f"{name} is {text!r}, expected {expected}. {_CURE}")
