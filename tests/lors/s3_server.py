"""A real S3 server on this machine, and what its clients find in their environment."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from processes import within

# The bucket `careless` ignores conditions, as older servers do. One thread: moto itself does not lock its buckets. So a
# client that was stopped between its connection and its request is waited for no longer than `timeout`.
_SERVER = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple
class Handler(WSGIRequestHandler):
    timeout = 1
moto = DomainDispatcherApplication(create_backend_app)
def application(environ, start):
    if environ["PATH_INFO"].startswith("/careless"):
        environ.pop("HTTP_IF_NONE_MATCH", None), environ.pop("HTTP_IF_MATCH", None)
    return moto(environ, start)
run_simple("127.0.0.1", int(sys.argv[1]), application, request_handler=Handler)
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server that is empty and ends here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert within(60, answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def make_bucket(endpoint: str, name: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()


def aws_environment(endpoint: str, secret: str) -> dict[str, str]:
    """For clients of that server, and of nothing else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "NO_PROXY": "127.0.0.1",
    }
