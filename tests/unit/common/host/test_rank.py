"""A process's place, as the environment tells it: what is impossible is refused, and who does not come is named."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from moce_ds.common.errors import LOST_PEER, LostPeerError
from moce_ds.common.host.rank import ProcessRank, RankError, is_first, lone_process
from moce_ds.distributed import rendezvous
from moce_ds.distributed.rendezvous import Rendezvous, host_on_loopback
from tests.examples.moce_command import run_here

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SILENCE = 0.2


def test_a_place_is_read_from_the_environment() -> None:
    assert ProcessRank.here(TWO) == ProcessRank(1, 2, 1, "127.0.0.1", 29500)
    assert ProcessRank.here({}) == ProcessRank(0, 1, 0) == ProcessRank.here({"MASTER_PORT": "auto"})
    assert is_first({}) and is_first({"RANK": "0"}) and not is_first(TWO)


def test_a_block_can_count_as_a_lone_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="inside"), lone_process():
        assert ProcessRank.here() == ProcessRank(0, 1, 0)
        raise ValueError("inside")
    assert ProcessRank.here() == ProcessRank.here(TWO)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', expected a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "2.0"}, r"WORLD_SIZE is '2\.0'"),
        ({"WORLD_SIZE": "\u0662"}, "WORLD_SIZE is"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is"),
        ({"RANK": "2"}, "RANK is '2', expected a whole number from 0 to 1"),
        ({"RANK": "first"}, "RANK is 'first'"),
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK is '5', expected 0\\."),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT is 'auto', expected a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
    ],
)
def test_an_impossible_place_is_refused(changes: dict[str, str | None], told: str) -> None:
    given = {name: value for name, value in (TWO | changes).items() if value is not None}
    with pytest.raises(RankError, match=rf"^{told}.*unset WORLD_SIZE and RANK\.$"):
        ProcessRank.here(given)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rendezvous]]:
    """Two processes that are to meet at a free port, the first hosting, with little patience."""
    for name, seconds in {"_SHORTEST_START": 2.0, "_PORT_PAUSE": 0.01}.items():
        monkeypatch.setattr(rendezvous, name, seconds)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    first = Rendezvous.here(ProcessRank(0, 2, 0, "127.0.0.1", port))
    yield [first, replace(first, place=ProcessRank(1, 2, 1, "127.0.0.1", port), hosted=False)]


def test_processes_meet(two: list[Rendezvous]) -> None:
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda meeting: meeting.group_store(SILENCE), two))
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_processes_meet_at_the_address_that_is_given(host: str, two: list[Rendezvous]) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"{host}: {error}")
    there = [replace(meeting, place=replace(meeting.place, host=host)) for meeting in two]
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda meeting: meeting.group_store(SILENCE), there))
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_who_does_not_come_is_named(two: list[Rendezvous], capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{two[0].place.port}"
    with pytest.raises(LostPeerError, match=f"Of 2 processes, ranks 1 did not connect to {address} within 2 s"):
        two[0].group_store(SILENCE)
    assert capsys.readouterr().err == f"Waiting for ranks 1 at {address}.\n"


def test_the_first_that_does_not_come_is_named(two: list[Rendezvous]) -> None:
    told = rf"Rank 0 \(this is rank 1\) does not answer at 127.0.0.1:{two[0].place.port}: "
    with pytest.raises(LostPeerError, match=told):
        two[1].group_store(SILENCE)


def test_two_processes_of_one_rank_are_refused(two: list[Rendezvous]) -> None:
    store = host_on_loopback()
    store.add("0", 1)
    with pytest.raises(RankError, match=r"Two processes have RANK 0 at 127\.0\.0\.1:"):
        two[0]._roll_call(store, SILENCE, SILENCE)


def test_a_port_that_is_taken_is_tried_again(two: list[Rendezvous], monkeypatch: pytest.MonkeyPatch) -> None:
    port = two[0].place.port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(LostPeerError, match=f"Port {port} of this machine"):
        two[0].group_store(SILENCE)
    server = socket.create_server(("127.0.0.1", port))
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: server.close())
    assert two[0]._host_store().port == port, "free at the second attempt"


def test_a_host_without_an_address_is_refused(two: list[Rendezvous]) -> None:
    for host in ("no-such-host.invalid", "x" * 300, "a..b"):
        with pytest.raises(RankError, match=f"MASTER_ADDR is '{host}', which has no address here"):
            replace(two[0], place=replace(two[0].place, host=host)).group_store(SILENCE)


def test_a_verb_tells_it_from_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TWO | {"RANK": "7"}).items():
        monkeypatch.setenv(name, value)
    said = run_here("pretrain", "--dry-run", "data.shards=none", "run.out=none")
    assert said.status == 1 and said.err.startswith("Error: RANK is '7'"), said
    assert LostPeerError.status == LOST_PEER and LostPeerError.every_process
