"""A server of S3's interface on this computer, and what machines must be told to use it."""

import contextlib
import logging
import pathlib
import secrets
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server that lasts as long as the context."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def machine(server: str, cache: pathlib.Path) -> dict[str, str]:
    """The environment of a machine with a disk of its own."""
    return {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(cache),
    }  # fmt: skip


def new_bucket() -> str:
    """The name of a bucket that was made for this test."""
    import s3fs

    bucket = f"bucket-{secrets.token_hex(8)}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return bucket
