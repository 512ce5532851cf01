"""A real S3 server on this machine, without a network beyond it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 server. Its name is that of no other server: a process keeps the client of an address."""

    name: str

    def upload(self, folder: Path, name: str) -> str:
        """Copy a folder into the bucket; returns its address."""
        for file in folder.iterdir():
            if file.is_file():
                _client().upload_file(str(file), self.name, f"{name}/{file.name}")
        return self.address(name)

    def address(self, name: str) -> str:
        """The address of an object, or of a folder of objects."""
        return f"s3://{self.name}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write an object."""
        _client().put_object(Bucket=self.name, Key=name, Body=content)

    def delete(self, name: str) -> None:
        """Delete an object."""
        _client().delete_object(Bucket=self.name, Key=name)


@contextmanager
def object_store() -> Iterator[Bucket]:
    """An empty bucket of an S3 server, which clients in this process and those that it starts find by environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found_by = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, found_by):
            bucket = Bucket(f"images-{port}")
            _client().create_bucket(Bucket=bucket.name)
            yield bucket
    finally:
        server.stop()


def _client() -> Any:
    import boto3

    return boto3.client("s3")
