"""The store at which the processes of a run meet, and what keeps strangers out of it.

PyTorch's TCPStore has no password: whoever reaches its port can list, read and write every key. So the processes of one
machine meet on its loopback interface, and what they tell each other through the store is sealed (docs/security.md).
"""

import itertools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

from torch.distributed import PrefixStore, Store, TCPStore

from moce_ds.sealing import SECRET, Sealer
from moce_ds.text import printable

LONGEST_TEXT = 4000
"""Characters of a sealed text; a longer one is cut as it is written, and is not ours where it is read."""

_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACES = ("lo", "lo0")
_sessions = itertools.count()  # of this process; all processes have the same number of them


def host_on_loopback(port: int = 0) -> TCPStore:
    """A store that this process hosts on 127.0.0.1; `port` 0: one that is free. Raises OSError.

    TCPStore listens on all addresses, whatever host it is told, unless it is given a socket that is bound already.
    """
    listening = socket.create_server((_LOOPBACK, port))
    port = listening.getsockname()[1]
    return TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def on_loopback(host: str) -> bool:
    """Whether an address is one of the loopback interface. Names but localhost are not looked up: a node's own name is
    often 127.0.1.1 in its /etc/hosts, and other nodes must reach it."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def interfaces(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep gloo and NCCL on the loopback interface, where all processes run on one machine."""
    processes = environment.get("WORLD_SIZE")
    one_machine = processes is not None and environment.get("LOCAL_WORLD_SIZE") == processes
    if not one_machine and not on_loopback(environment.get("MASTER_ADDR", "")):
        return {}
    found = next((name for _, name in socket.if_nameindex() if name in _LOOPBACK_INTERFACES), None)
    return {"GLOO_SOCKET_IFNAME": found, "NCCL_SOCKET_IFNAME": f"={found}"} if found else {}


class SealedStore:
    """Texts under keys of a store, each sealed together with its key."""

    def __init__(self, store: TCPStore, prefix: str, sealer: Sealer) -> None:
        self._store, self._prefix, self._sealer = store, prefix, sealer

    def set(self, key: str, text: str) -> None:
        """Write a text, without what could command a terminal, and cut to `LONGEST_TEXT`. Raises DistError."""
        key, text = self._prefix + key, printable(text)[:LONGEST_TEXT]
        self._store.set(key, f"{self._sealer.seal(key + text)} {text}")

    def get(self, key: str) -> str:
        """The text of a key; "" where there is none, or one that is not ours. Never waits. Raises DistError."""
        key = self._prefix + key
        if not self._store.check([key]):
            return ""
        seal, _, text = self._store.get(key).decode("utf-8", "replace").partition(" ")
        ours = len(text) <= LONGEST_TEXT and self._sealer.is_genuine(seal, key + text)
        return printable(text) if ours else ""


@dataclass(frozen=True)
class Rendezvous:
    """Where the processes of a run meet; each makes one for each process group.

    Attributes:
        host, port: of the store.
        hosted: whether this process hosts it: rank 0, where no launcher does.
        sealer: with the secret of the run.
        name: of this meeting; a later one at the same store has another.
    """

    host: str
    port: int
    hosted: bool
    sealer: Sealer
    name: str

    @classmethod
    def here(cls) -> "Rendezvous":
        """By the variables that torchrun and our launchers set: RANK, MASTER_ADDR and MASTER_PORT are there."""
        given = os.environ
        sealer = Sealer(given.get(SECRET, "").encode())
        return cls(
            given["MASTER_ADDR"],
            int(given["MASTER_PORT"]),
            given["RANK"] == "0" and given.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            sealer,
            # With something of the secret, so that two runs which meet at one port by mistake do not get mixed up;
            # not the secret itself, as keys can be listed. torchrun keeps its store, and in it the verdict on the start
            # before, when it starts all processes again.
            f"{sealer.seal('name')[:16]}/{given.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_sessions)}/",
        )

    def connect(self, seconds: float) -> TCPStore:
        """A connection to the store; raises DistError if there is none after so many seconds."""
        return TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=seconds))

    def group_store(self, seconds: float) -> Store:
        """The store for the process group, hosted here if this process is to. It lives as long as the group.

        Raises:
            OSError, DistError: the port is taken, or the store does not answer for so many seconds.
        """
        if not self.hosted:
            store = self.connect(seconds)
        elif on_loopback(self.host):
            store = host_on_loopback(self.port)
        else:
            store = TCPStore(self.host, self.port, is_master=True, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=seconds))
        return PrefixStore(f"{self.name}group", store)

    def sealed(self, seconds: float) -> SealedStore:
        """What the processes tell each other; a connection of its own, as a thread may wait in the group's.

        Raises:
            DistError: the store does not answer for so many seconds.
        """
        return SealedStore(self.connect(seconds), f"{self.name}watch/", self.sealer)
