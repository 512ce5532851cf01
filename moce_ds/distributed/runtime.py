"""The rank of a process, its process group and its small collectives, and requests to stop.

A process reads its rank from the variables that torchrun, `launchers/` and SLURM set (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). Without them it runs alone.
"""

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import FrameType, TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from moce_ds.common.compat import destroy_process_group
from moce_ds.common.errors import MoceError
from moce_ds.common.host import gpus, threads
from moce_ds.common.host.interrupts import obeyed
from moce_ds.common.host.machine import machine_fault
from moce_ds.common.host.rank import ALONE, ProcessRank, environment
from moce_ds.common.text import encoded
from moce_ds.distributed.host_reduce import combine_all
from moce_ds.distributed.rendezvous import Rendezvous, interfaces
from moce_ds.distributed.watchdog import Watch

_logger = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_MAX_TEXT_BYTES = 2**30
# DeepSpeed requires an address even for a single process; the in-process store needs no port.
_NO_ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Runtime:
    """The rank of a process in its group.

    Attributes:
        rank, world_size: global rank, and number of processes.
        local_rank: rank on its machine.
        device: the device that it computes on.
        watch: watches the other processes; None for a single process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    watch: Watch | None = None

    @classmethod
    def alone(cls, device: torch.device) -> "Runtime":
        """A process without a group."""
        return cls(rank=0, world_size=1, local_rank=0, device=device)

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which prints and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Log a notice from rank 0 only."""
        if self.is_main:
            _logger.info(text, stacklevel=2)

    def warn(self, text: str) -> None:
        """Log a warning that every rank would repeat, from rank 0 only."""
        if self.is_main:
            _logger.warning(text, stacklevel=2)

    def set_status(self, doing: str) -> None:
        """Set what this process is doing, such as "step 12". The others report it if this process is lost."""
        if self.watch is not None:
            self.watch.set_status(doing)

    def sum_tensor(self, tensor: Tensor) -> None:
        """Replace a tensor on this process's device by the sum of those of all ranks; a collective."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in float64 on the host. Every process gets the same result."""
        return self.sum_and_max(values, [])[0]

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maximum over all processes, in float64 on the host. Every process gets the same result."""
        return self.sum_and_max([], values)[1]

    def sum_and_max(self, summed: list[float], largest: list[float]) -> tuple[list[float], list[float]]:
        """The element-wise sums of some values, and the maxima of others, in one exchange; as `sum` and `max`."""
        own = torch.tensor([*summed, *largest], dtype=torch.float64)
        n = len(summed)

        def combine(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a[:n] + b[:n], torch.maximum(a[n:], b[n:])])

        total = combine_all(own, combine, self.rank, self.world_size) if self.world_size > 1 else own
        return total[:n].tolist(), total[n:].tolist()

    @property
    def peak_memory(self) -> int:
        """Peak memory of this process in bytes: tensors on its GPU, or without a GPU its resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Run a block that can fail on some ranks only. If any rank fails, every rank raises.

        Leaving the block is a collective; the block itself must contain none.

        Raises:
            MoceError: the error of the first rank that failed, or the machine error that it met; its class is the same
                on every rank.
        """
        fault: MoceError | None = None
        try:
            yield
        except (MoceError, OSError, MemoryError, RuntimeError) as error:
            fault = fault_of(error)
            if fault is None:
                raise
        status = int(self.max([float(fault.status if fault else 0)])[0])
        if status:
            self.raise_fault(fault, status)

    def raise_fault(self, fault: MoceError | None, status: int) -> NoReturn:
        """Raise the error of the first rank that failed, on every rank; a collective.

        Args:
            fault: this rank's own error.
            status: the largest exit status of the errors of all ranks.
        """
        texts = self.texts(f"{type(fault).__name__}\n{fault}" if fault else "")
        name, _, message = next(text for text in texts if text).partition("\n")
        agreed = MoceError.named(name)(message)
        agreed.status, agreed.every_process = status, False  # every rank raises it
        raise agreed from None

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, by rank.

        They are sent as bytes: `torch.distributed` would send objects as pickles, which can run arbitrary code.

        Raises:
            MoceError: a text is longer than 1 GiB.
        """
        if self.world_size == 1:
            return [text]
        mine = torch.frombuffer(bytearray(encoded(text)) or bytearray(1), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine) if text else 0]))
        longest = max(map(int, sizes))
        if not 0 <= longest <= _MAX_TEXT_BYTES:
            raise MoceError(f"A process sends {longest} bytes of text; the limit is {_MAX_TEXT_BYTES}.")
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine[:longest]
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        received = zip(gathered, sizes, strict=True)
        return [bytes(data[: int(size)].numpy()).decode("utf-8", "surrogatepass") for data, size in received]


def fault_of(error: MoceError | OSError | MemoryError | RuntimeError) -> MoceError | None:
    """The error to raise on all ranks: itself, or the machine error that it stands for; None for a bug."""
    return error if isinstance(error, MoceError) else machine_fault(error)


def lone_device() -> torch.device:
    """The device of a process without a group: the GPU if there is one. Logs once how many threads are used.

    Raises:
        GpuError: this machine has GPUs that torch cannot use, and they are not hidden.
    """
    _log_threads()
    return _device(0)


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", gpus.index_of(local_rank, torch.cuda.device_count()))
    gpus.check_none_unused(torch.__version__, torch.version.cuda)
    return torch.device("cpu")


@cache
def _log_threads() -> None:
    if line := threads.notice():
        _logger.info(line)


@contextmanager
def started(peer_timeout: float = 120.0) -> Iterator[Runtime]:
    """Join the process group (gloo on the host, NCCL on GPUs) for the length of the block.

    If a peer dies, or is silent for `peer_timeout` seconds, this process ends with status LOST_PEER and a message.

    Raises:
        ConfigError: the variables that give this process its rank are missing or invalid.
        GpuError: there are fewer GPUs than processes on this machine, or torch cannot use its GPUs.
        LostPeerError: the port is taken, or not all processes joined.
    """
    place = ProcessRank.here()
    device = _device(place.local_rank)
    missing = ALONE | (_NO_ADDRESS if place.world_size == 1 else interfaces(os.environ))
    variables = {name: value for name, value in missing.items() if name not in os.environ}
    if device.type == "cuda":  # DeepSpeed computes on cuda:LOCAL_RANK
        variables["LOCAL_RANK"] = str(device.index)
    with environment(variables), _joined(place, device, peer_timeout) as runtime:
        yield runtime


@contextmanager
def _joined(place: ProcessRank, device: torch.device, peer_timeout: float) -> Iterator[Runtime]:
    rank, world_size, local_rank = place.rank, place.world_size, place.local_rank
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        backend = "gloo"
    watch = None
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        meeting = Rendezvous.here(place)
        store = meeting.group_store(peer_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT)
        watch = Watch(rank, world_size, local_rank, peer_timeout, meeting)
    try:
        with watch or nullcontext():
            runtime = Runtime(rank, world_size, local_rank, device, watch)
            _logger.debug("joined %d processes on %s, backend %s", world_size, device, backend)
            _log_threads()
            yield runtime
            dist.barrier()  # no process closes the store while others still read it
        dist.barrier()
    finally:
        destroy_process_group()


class StopRequest:
    """Records that a signal asked for a stop, and whether time is up. The ranks agree on it once per step.

    A second Ctrl-C ends the process at once. SIGHUP, sent when a terminal closes, asks for a stop too, unless it is
    ignored, as under nohup.

    Args:
        seconds: also stop after this many seconds; None: never.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._received: signal.Signals | None = None
        self._deadline = time.monotonic() + seconds if seconds is not None else float("inf")
        self._previous = {number: signal.signal(number, self._remember) for number in obeyed()}

    @property
    def wanted(self) -> bool:
        """Whether this process asks the run to stop."""
        return self._received is not None or time.monotonic() >= self._deadline

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
