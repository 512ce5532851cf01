"""`moce attach`: shard sets in a real object store, and at other addresses."""

import os
import shutil
import signal
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from moce_ds.common.errors import LOST_PEER, ArtefactError, ConfigError, DataError
from moce_ds.data.attach import attach
from moce_ds.data.loader import Loader
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput, RandomCrop
from tests.examples.object_store import Bucket, object_store


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """A bucket of the store."""
    with object_store() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def address(bucket: Bucket, tiny_shards: Path) -> str:
    """The address of the set in the store."""
    return bucket.upload(tiny_shards, "set")


def read_all(shards: ShardSet) -> list[bytes]:
    return [shards.read(image_id) for image_id in range(shards.count)]


def test_an_attached_set_is_the_set(address: str, tiny_shards: Path, tmp_path: Path) -> None:
    attached, local = attach(f"{address}/", tmp_path / "set"), ShardSet.open(tiny_shards)
    assert not list((tmp_path / "set").glob("*.tar"))
    assert read_all(attached) == read_all(local)
    assert (attached.fingerprint, attached.source(7)) == (local.fingerprint, local.source(7))
    assert attached.describe()["stored at"] == f"{address}/"
    assert attach(address, tmp_path / "set").fingerprint == local.fingerprint, "once more"


def test_a_loader_reads_an_attached_set(address: str, tiny_shards: Path, tmp_path: Path) -> None:
    sampler = ShuffledSampler(RandomOrder(60, seed=1), 20)
    attached, local = (
        [
            batch.images_BCHW
            for batch in Loader(
                shards, sampler.batch, RandomCrop(1), ImageInput(16), first=0, last=3, batch_size=20, threads=1,
                device=torch.device("cpu"),
            )
        ]
        for shards in (attach(address, tmp_path / "set"), ShardSet.open(tiny_shards))
    )  # fmt: skip
    assert torch.equal(torch.cat(attached), torch.cat(local))


def test_a_child_process_reads_an_attached_set(address: str, tmp_path: Path) -> None:
    """After this process has connected: a client of another process cannot be used."""
    attached = attach(address, tmp_path / "set")
    first = attached.read(0)
    if (child := os.fork()) == 0:
        signal.alarm(60)  # ends the child if it waits for a thread that it has not
        os._exit(0 if attached.read(0) == first else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_address_without_a_whole_set_is_refused(bucket: Bucket, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://images-\d+/other/shards\.json is missing: expected a set"):
        attach(bucket.address("other"), tmp_path / "a")
    bucket.upload(tiny_shards, "cut")
    bucket.put("cut/shard-000001.tar", b"short")
    with pytest.raises(DataError, match=r"s3://images-\d+/cut/shard-000001\.tar has 5 bytes, expected \d+"):
        attach(bucket.address("cut"), tmp_path / "a")
    bucket.delete("cut/shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        attach(bucket.address("cut"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_shards_that_vanish_later_are_named(bucket: Bucket, tiny_shards: Path, tmp_path: Path) -> None:
    attached = attach(bucket.upload(tiny_shards, "gone"), tmp_path / "set")
    bucket.delete("gone/shard-000000.tar")
    with pytest.raises(DataError, match=r"s3://images-\d+/gone/shard-000000\.tar can no longer be read"):
        attached.read(0)


def test_another_folder_is_not_replaced(address: str, tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_shards, tmp_path / "set")
    with pytest.raises(ArtefactError, match=r"exists and is not the set at s3://images-\d+/set"):
        attach(address, tmp_path / "set")


@pytest.mark.parametrize("wrong", ["bucket/set", "nothing://bucket/set", "gs://bucket/set"])
def test_an_address_that_nothing_reads_is_explained(wrong: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=wrong):
        attach(wrong, tmp_path / "set")


def test_a_store_that_does_not_answer_is_worth_another_try(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store() as bucket:
        attached = attach(bucket.upload(tiny_shards, "unreachable"), tmp_path / "set")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match="can no longer be read") as caught:
        attached.read(0)
    assert caught.value.status == LOST_PEER


def test_a_web_server_will_do(tiny_shards: Path, tmp_path: Path) -> None:
    """It has no ranges of bytes, so each image costs its shard: for small sets."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tiny_shards))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        attached = attach(f"http://127.0.0.1:{server.server_port}", tmp_path / "set")
        assert attached.read(59) == ShardSet.open(tiny_shards).read(59)
        server.shutdown()
