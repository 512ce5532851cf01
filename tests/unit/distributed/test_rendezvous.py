"""The store at which processes meet: where it listens, and whose words in it count."""

import errno
import itertools
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest
from torch.distributed import TCPStore

from moce_ds.common.errors import LostPeerError
from moce_ds.common.host.machine import MachineError, machine_fault
from moce_ds.common.host.rank import SECRET, ProcessRank, new_secret
from moce_ds.distributed import rendezvous
from moce_ds.distributed.rendezvous import (
    LONGEST_TEXT,
    Rendezvous,
    SealedStore,
    Sealer,
    host_on_loopback,
    interfaces,
    on_loopback,
)
from moce_ds.distributed.watchdog import Watch, _parsed


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return host_on_loopback()


def test_the_store_is_reached_at_its_own_address_alone(store: TCPStore) -> None:
    socket.create_connection(("127.0.0.1", store.port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):  # what listens on all addresses is reached here too
        socket.create_connection(("127.0.0.2", store.port), timeout=10)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1", "localhost"])
def test_an_address_of_the_loopback(host: str) -> None:
    assert on_loopback(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "node-1", "0.0.0.0", ""])
def test_an_address_that_others_reach(host: str) -> None:
    assert not on_loopback(host)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node-1"}, True),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-1"}, False),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "node-1"}, False),
        ({}, False),
    ],
)
def test_one_machine_needs_no_other_interface(
    given: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "eth0"), (2, "lo")])
    expected = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert interfaces(given) == (expected if kept else {})


def test_only_who_knows_the_secret_is_heard(store: TCPStore) -> None:
    ours, stranger = (SealedStore(store, "a/", Sealer(new_secret().encode())) for _ in range(2))
    assert ours.get("verdict") == ""
    stranger.set("verdict", "75 owned")
    assert ours.get("verdict") == "" and stranger.get("verdict") == "75 owned"
    ours.set("beat", "12 node-1")
    store.set("a/verdict", store.get("a/beat"))
    assert (ours.get("beat"), ours.get("verdict")) == ("12 node-1", ""), "a seal holds for its key"
    for forged in (b"", b" ", b"\xff\x00 75 owned", b"75 owned"):
        store.set("a/verdict", forged)
        assert ours.get("verdict") == ""


def test_what_is_heard_is_short_and_printable(store: TCPStore) -> None:
    sealer = Sealer(b"")
    sealed = SealedStore(store, "b/", sealer)
    sealed.set("text", "\x1b]0;owned\x07\udcff" + "x" * LONGEST_TEXT)
    assert len(sealed.get("text")) == LONGEST_TEXT and "\x1b" not in store.get("b/text").decode()
    raw = "\x1b]0;owned\x07"
    store.set("b/text", f"{sealer.seal(f'b/text{raw}')} {raw}")
    assert sealed.get("text") == "\ufffd]0;owned\ufffd"
    long = "x" * (LONGEST_TEXT + 1)
    store.set("b/text", f"{sealer.seal(f'b/text{long}')} {long}")
    assert sealed.get("text") == ""


@pytest.mark.parametrize("verdict", ["", "0 done", "2 x", "-1 x", "075 x", "255 x", "x", "1"])
def test_a_verdict_ends_nobody_as_if_all_were_well(verdict: str) -> None:
    found = _parsed(verdict)
    assert found is None or found == (1, "")
    assert _parsed("1 the disk is full") == (1, "the disk is full") and _parsed("75 lost") == (75, "lost")


@pytest.mark.parametrize(
    ("number", "agreed", "verdict", "farewell"),
    [(errno.EIO, False, "75", ""), (errno.EIO, True, "", "75"), (errno.ENOSPC, False, "", "1")],
)
def test_what_struck_one_process_alone_ends_the_others_at_once(
    store: TCPStore, number: int, agreed: bool, verdict: str, farewell: str
) -> None:
    sealed = SealedStore(store, f"{number} {agreed}/", Sealer(new_secret().encode()))
    meeting = cast(Rendezvous, SimpleNamespace(host="here", sealed=lambda _: sealed))
    fault = machine_fault(OSError(number, os.strerror(number)))
    assert fault is not None
    fault.every_process = not agreed
    with pytest.raises(MachineError), Watch(1, 2, 1, 60, meeting):
        raise fault
    assert [sealed.get(key).partition(" ")[0] for key in ("verdict", "farewell/1")] == [verdict, farewell]


def test_runs_with_other_secrets_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    names = []
    for secret in ("one", "two", "one"):
        monkeypatch.setenv(SECRET, secret)
        meeting = Rendezvous.here(ProcessRank(0, 2, 0, "127.0.0.1", 1))
        names.append(meeting.name.split("/")[0])  # what follows counts the meetings of a process
        assert secret not in meeting.name and not meeting.hosted
    assert names[0] == names[2] != names[1]


def test_torchrun_with_another_number_of_nodes_meets_at_its_old_store(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the store and does not count such a start as a restart."""
    for name, value in {"USE_AGENT_STORE": "True", "RESTART_COUNT": "0", "RUN_ID": "none"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setattr(rendezvous, "_sessions", itertools.repeat(0))  # each of them is the first of its process
    for world_size in (1, 2):
        starts = [
            Rendezvous.here(ProcessRank(rank, world_size, 0, "127.0.0.1", store.port)) for rank in range(world_size)
        ]
        with ThreadPoolExecutor(2) as pool:
            stores = list(pool.map(lambda meeting: meeting.group_store(10), starts))
        stores[0].set("key", str(world_size))
        assert stores[-1].get("key") == str(world_size).encode()
    with pytest.raises(LostPeerError, match=r"Rank 0 of an earlier start has met at .* changed it back"):
        starts[0].group_store(10)
