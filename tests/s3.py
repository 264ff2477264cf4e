"""An S3 server in a process of its own, on this machine; a line on its error stream per request."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=True)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
BUCKET = "lab"


@dataclass(frozen=True)
class Server:
    environment: dict[str, str]
    """With which a process reaches it."""
    log: Path

    @property
    def num_requests(self) -> int:
        return self.log.read_text(encoding="utf-8").count('HTTP/1.1" ')


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """The server with an empty bucket, until the end of the context."""
    log = folder / "s3.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
        )
    assert process.stdout is not None
    (port,) = next(line.split()[1:] for line in process.stdout if line.startswith("port "))
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "AKIAOFTHETEST",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
    }
    try:
        yield Server(environment, log)
    finally:
        process.communicate()  # the end of its input is its end
