"""The store at which the processes of a run meet, protected from other users.

PyTorch's TCPStore has no password: any process that reaches its port can list, read and write every key. So the
processes of one machine meet on its loopback interface, and the messages in the store are sealed (docs/security.md).
"""

import errno
import hashlib
import hmac
import itertools
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

from torch.distributed import DistError, DistStoreError, PrefixStore, Store, TCPStore

from moce_ds.common.errors import LostPeerError
from moce_ds.common.host.rank import SECRET, ProcessRank, RankError
from moce_ds.common.text import encoded, printable

_logger = logging.getLogger(__name__)

LONGEST_TEXT = 4000
"""Maximum number of characters of a sealed text. The writer truncates longer ones; the reader rejects them."""

_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACES = ("lo", "lo0")

# Processes start at different times, such as on another machine or after a slow import. The wait for them is `_STARTS`
# times the peer timeout, within these limits in seconds.
_STARTS, _SHORTEST_START, _LONGEST_START = 5, 30.0, 600.0
_PORT_ATTEMPTS, _PORT_PAUSE = 10, 1.0
_RANKS_SHOWN = 8
_RUN_ID = "TORCHELASTIC_RUN_ID"  # set by torchrun
_sessions = itertools.count()  # counted the same in all processes


def host_on_loopback(port: int = 0, host: str = _LOOPBACK) -> TCPStore:
    """A store that this process hosts at one loopback address; `port` 0 means any free port. Raises OSError.

    TCPStore listens on all addresses, whatever host it is given, unless it receives a bound socket.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # localhost may also be ::1, even on machines without IPv6.
    family, *_, address = min(addresses, key=lambda one: one[0] != socket.AF_INET)
    listening = socket.create_server((str(address[0]), port), family=family)
    port = listening.getsockname()[1]
    return TCPStore(str(address[0]), port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _check_host(place: ProcessRank) -> None:
    try:
        socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        raise RankError(
            f"MASTER_ADDR is {place.host!r}, which has no address here ({reason}): set it to the name or address "
            "of the machine of rank 0."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")


def _missing(store: Store, ranks: Sequence[int]) -> str:
    missing = [rank for rank in ranks if not store.check([str(rank)])]
    more = f" and {len(missing) - _RANKS_SHOWN} more" if len(missing) > _RANKS_SHOWN else ""
    return ", ".join(map(str, missing[:_RANKS_SHOWN])) + more


def on_loopback(host: str) -> bool:
    """Whether an address is on the loopback interface.

    Names other than localhost are not resolved: /etc/hosts often maps a node's own name to 127.0.1.1, but other nodes
    must reach it.
    """
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def interfaces(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep gloo and NCCL on the loopback interface if all processes run on one machine."""
    processes = environment.get("WORLD_SIZE")
    one_machine = processes is not None and environment.get("LOCAL_WORLD_SIZE") == processes
    if not one_machine and not on_loopback(environment.get("MASTER_ADDR", "")):
        return {}
    loopback = next((name for _, name in socket.if_nameindex() if name in _LOOPBACK_INTERFACES), None)
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"} if loopback else {}


@dataclass(frozen=True)
class Sealer:
    """Makes and checks message authentication codes (seals) with the secret of a run: HMAC-SHA256."""

    secret: bytes

    def seal(self, text: str) -> str:
        """The seal of a text, 64 hexadecimal digits."""
        return hmac.digest(self.secret, encoded(text), hashlib.sha256).hex()

    def is_genuine(self, seal: str, text: str) -> bool:
        """Whether `seal` is the seal of `text`; takes constant time."""
        return hmac.compare_digest(encoded(seal), self.seal(text).encode())


class SealedStore:
    """Texts under keys of a store, each sealed with its key."""

    def __init__(self, store: TCPStore, prefix: str, sealer: Sealer) -> None:
        self._store, self._prefix, self._sealer = store, prefix, sealer

    def set(self, key: str, text: str) -> None:
        """Write a printable text, truncated to `LONGEST_TEXT`. Raises DistError."""
        key, text = self._prefix + key, printable(text)[:LONGEST_TEXT]
        self._store.set(key, f"{self._sealer.seal(key + text)} {text}")

    def get(self, key: str) -> str:
        """The text of a key; "" if there is none or its seal is wrong. Never waits. Raises DistError."""
        key = self._prefix + key
        if not self._store.check([key]):
            return ""
        seal, _, text = self._store.get(key).decode("utf-8", "replace").partition(" ")
        genuine = len(text) <= LONGEST_TEXT and self._sealer.is_genuine(seal, key + text)
        return printable(text) if genuine else ""


@dataclass(frozen=True)
class Rendezvous:
    """The meeting point of the processes of a run. Each process makes one per process group.

    Attributes:
        place: rank of this process, with host and port of the store.
        hosted: whether this process hosts the store: rank 0, unless a launcher does.
        sealer: holds the secret of the run.
        name: prefix of the keys; a later rendezvous at the same store has another one.
    """

    place: ProcessRank
    hosted: bool
    sealer: Sealer
    name: str

    @classmethod
    def here(cls, place: ProcessRank) -> "Rendezvous":
        """The rendezvous of the process with that rank."""
        environment = os.environ
        sealer = Sealer(environment.get(SECRET, "").encode())
        return cls(
            place,
            place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            sealer,
            # Depends on the secret, so that two runs on the same port by mistake do not mix. It is not the secret
            # itself, because keys can be listed. torchrun keeps its store across restarts, with the verdict on the
            # previous start in it; a start with another number of nodes does not count as a restart.
            f"{sealer.seal('name')[:16]}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}-{place.world_size}-"
            f"{next(_sessions)}/",
        )

    @property
    def host(self) -> str:
        """Name or address of the machine of the store."""
        return self.place.host

    def connect(self, seconds: float) -> TCPStore:
        """A connection to the store. Raises DistError if there is none after that many seconds."""
        return TCPStore(self.host, self.place.port, is_master=False, timeout=timedelta(seconds=seconds))

    def group_store(self, silence: float) -> Store:
        """The store for the process group, hosted here if this process is to. Returns when all processes have joined.

        Args:
            silence: seconds after which a running process counts as lost. A launcher that hosts the store must answer
                within that time; processes may join later, because machines start at different times.

        Raises:
            ConfigError: the host has no address, or another process has the same rank.
            LostPeerError: the port is taken, the store does not answer, or processes are missing; names them.
        """
        _check_host(self.place)
        patience = min(_LONGEST_START, max(_SHORTEST_START, _STARTS * silence))
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = self._host_store() if self.hosted else self.connect(silence if launched else patience)
            self._roll_call(PrefixStore(f"{self.name}here", store), silence, patience)
        except (DistError, OSError) as error:
            who = "The launcher" if launched else f"Rank 0 (this is rank {self.place.rank})"
            raise LostPeerError(
                f"{who} does not answer at {self._address}: {_first_line(error)}. Check that it has started, "
                "that MASTER_ADDR and MASTER_PORT are the same for all processes, and that no firewall blocks the port."
            ) from None
        store.set_timeout(timedelta(seconds=_LONGEST_START))
        return PrefixStore(f"{self.name}group", store)

    @property
    def _address(self) -> str:
        return f"{self.host}:{self.place.port}"

    def _host_store(self) -> TCPStore:
        """A store at this port, which the previous run may hold for a while. Raises LostPeerError if it stays taken."""
        for _ in range(_PORT_ATTEMPTS):
            try:
                if on_loopback(self.host):
                    return host_on_loopback(self.place.port, self.host)
                return TCPStore(self.host, self.place.port, is_master=True, wait_for_workers=False)
            except (DistError, OSError) as error:
                if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
                    raise
            time.sleep(_PORT_PAUSE)
        raise LostPeerError(
            f"Port {self.place.port} of this machine is still taken (address already in use) after "
            f"{_PORT_ATTEMPTS} attempts: another job has it. Choose another MASTER_PORT."
        )

    def _roll_call(self, store: Store, silence: float, patience: float) -> None:
        """Wait until all processes have joined; report a long wait. Raises LostPeerError, ConfigError."""
        rank, everyone = self.place.rank, range(self.place.world_size)
        if store.add(str(rank), 1) > 1:
            if _RUN_ID in os.environ:  # torchrun gives each process its own rank, and can start all again
                raise LostPeerError(
                    f"Rank {rank} of an earlier start has met at {self._address} already, with as many processes: "
                    "torchrun has changed the number of nodes and changed it back. It must start all processes again."
                )
            raise RankError(f"Two processes have RANK {rank} at {self._address}: give each of them its own.")
        with suppress(DistStoreError):
            store.wait([str(other) for other in everyone], timedelta(seconds=min(silence, patience)))
            return
        if rank == 0:
            _logger.info(f"Waiting for ranks {_missing(store, everyone)} at {self._address}.")
        with suppress(DistStoreError):
            store.wait([str(other) for other in everyone], timedelta(seconds=max(1.0, patience - silence)))
            return
        lost = LostPeerError(
            f"Of {self.place.world_size} processes, ranks {_missing(store, everyone)} did not connect to "
            f"{self._address} within {patience:.0f} s. Check that they have started and that all "
            "have the same WORLD_SIZE."
        )
        lost.every_process = False
        raise lost

    def sealed(self, seconds: float) -> SealedStore:
        """The channel for messages between the processes. It has its own connection, because a thread may block in the
        group's.

        Raises:
            DistError: the store does not answer for that many seconds.
        """
        return SealedStore(self.connect(seconds), f"{self.name}watch/", self.sealer)
