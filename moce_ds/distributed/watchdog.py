"""Detects that a process is gone, and which one: a peer that dies or hangs must end the others, not block them.

Every process writes a heartbeat once a second, from its own thread, into the store of the rendezvous. Rank 0 watches
all heartbeats and every rank watches rank 0's. The rank that notices a loss writes a verdict into the store. All ranks
read it there and end with status LOST_PEER, even while they wait in a collective. An interrupted process reports that
in the same way, and all end with STOPPED. Ranks normally agree on a handled error (a MoceError) and all end with it. If
they do not, the others learn of it when they miss that process, or at once if its disk or network failed.
"""

import itertools
import os
import socket
import threading
from contextlib import suppress
from types import TracebackType

from torch.distributed import DistError

from moce_ds.common.errors import LOST_PEER, STOPPED, LostPeerError, MoceError
from moce_ds.common.host.machine import machine_fault
from moce_ds.common.host.program import say_error
from moce_ds.distributed.rendezvous import Rendezvous

_BEAT_SECONDS = 1.0
_BROKEN_BEATS = 5  # after a broken connection, this many missed heartbeats identify the rank that broke it
_STORE_SECONDS = 20.0
_CURE = "Rerun the same command to resume."
_STATUSES = (1, LOST_PEER, STOPPED)  # valid in a verdict: nobody can end a run with status 0 through the store


class Watch:
    """The heartbeat of one process, and its watch over the others.

    Args:
        rank, world_size: of this process; local_rank: 0 prints the verdict, once per machine.
        timeout: seconds of silence after which a rank counts as lost.
        meeting: the rendezvous of the processes.
    """

    def __init__(self, rank: int, world_size: int, local_rank: int, timeout: float, meeting: Rendezvous) -> None:
        self._rank, self._world_size, self._local_rank = rank, world_size, local_rank
        self._limit = max(_BROKEN_BEATS, round(timeout / _BEAT_SECONDS))
        self._host, self._store = meeting.host, meeting.sealed(_STORE_SECONDS)
        self._doing, self._broken = "starting", False
        self._heard: dict[int, tuple[str, int]] = {}  # last heartbeat by rank, and its age in our own heartbeats
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def set_status(self, doing: str) -> None:
        """Set what this process is doing, such as "step 12", for the message if it is lost."""
        self._doing = doing

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching, and end the other processes if this one ends with an unexpected error.

        Raises:
            LostPeerError: a collective failed without showing which process caused it.
        """
        if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            self._broken = True
            self._thread.join(3 * _BROKEN_BEATS * _BEAT_SECONDS)  # the verdict ends this process
            raise LostPeerError(
                f"A collective failed at {self._doing}, while all processes still answer: {error}"
            ) from error
        self._stop.set()
        self._thread.join()
        if error is None:
            return
        who = f"Rank {self._rank} on {socket.gethostname()}"
        fault = error if isinstance(error, MoceError) else machine_fault(error)
        how = f"{type(error).__name__}: {error}" if fault is None else str(fault)
        message = f"{who} ended at {self._doing}: {how}"
        with suppress(DistError):  # the store may end first
            if isinstance(error, KeyboardInterrupt):
                self._store.set("verdict", f"{STOPPED} {who} was interrupted at {self._doing}.")
            elif fault is not None and not (fault.status == LOST_PEER and fault.every_process):
                status = fault.status if fault.status in _STATUSES else 1
                self._store.set(f"farewell/{self._rank}", f"{status} {message}")
            else:  # a defect, or a fault of this process alone: the others would wait for it forever
                self._store.set("verdict", f"{LOST_PEER} {message}")

    def _run(self) -> None:
        for count in itertools.count():
            try:
                self._store.set(f"beat/{self._rank}", f"{count} {socket.gethostname()}")
                if self._broken:
                    self._store.set("broken", str(self._rank))
                verdict = _parsed(self._store.get("verdict"))
                judgement = None if verdict else self._judge()
            except DistError:
                if self._stop.wait(_BROKEN_BEATS * _BEAT_SECONDS):
                    return  # this process was ending as well
                gone = f"The store on {self._host} is gone, and with it rank 0 or the launcher, which hosts it. {_CURE}"
                judgement, verdict = None, (LOST_PEER, gone)
            if end := judgement or verdict:
                status, text = end
                if judgement or self._local_rank == 0:
                    with suppress(OSError):  # standard error has no reader any more
                        say_error(text if status == STOPPED else f"Error: {text}")
                os._exit(status)
            if self._stop.wait(_BEAT_SECONDS):
                return

    def _judge(self) -> tuple[int, str] | None:
        """A verdict (exit status and message) if a watched rank has been silent for too long; None otherwise."""
        limit = _BROKEN_BEATS if self._store.get("broken") else self._limit
        watched = range(1, self._world_size) if self._rank == 0 else range(1)
        for rank in watched:
            beat = self._store.get(f"beat/{rank}")
            last, age = self._heard.get(rank, ("", 0))
            # Counted in own heartbeats, so that no rank counts as lost after a pause of all processes (Ctrl-Z).
            self._heard[rank] = (beat, age + 1 if beat == last else 0)
            if self._heard[rank][1] >= limit:
                host = beat.partition(" ")[2] or "an unknown host"
                # The step is the one at which this process waits for the lost rank.
                status, text = _parsed(self._store.get(f"farewell/{rank}")) or (
                    LOST_PEER,
                    f"Rank {rank} on {host} has not answered for {limit * _BEAT_SECONDS:.0f} s at {self._doing}. "
                    f"It has died or hangs; the other processes end. {_CURE}",
                )
                self._store.set("verdict", f"{status} {text}")
                return status, text
        return None


def _parsed(verdict: str) -> tuple[int, str] | None:
    """Exit status and message of a verdict or farewell; None if there is none or it is invalid."""
    status, _, text = verdict.partition(" ")
    return next(((known, text) for known in _STATUSES if status == str(known)), None)
