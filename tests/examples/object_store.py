"""A real S3 server on this machine, without a network beyond it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

BUCKET = "images"


@contextmanager
def object_store() -> Iterator[None]:
    """An S3 server with an empty bucket, which clients in this process and those that it starts find by environment."""
    import boto3
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
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield
    finally:
        server.stop()


def upload(folder: Path, name: str) -> str:
    """Copy a folder into the bucket; returns its address."""
    import boto3

    client = boto3.client("s3")
    for file in folder.iterdir():
        if file.is_file():
            client.upload_file(str(file), BUCKET, f"{name}/{file.name}")
    return f"s3://{BUCKET}/{name}"
