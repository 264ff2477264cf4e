"""Whether a running cluster answers, found out without joining it.

Joining an address where nothing answers keeps Ray trying for minutes in a call that cannot be
interrupted (2 min and more, measured). Where something listens, Ray's own health check tells: in a
process of its own it takes 0.5 s, and can be ended if nothing answers.
"""

from __future__ import annotations

import socket
import subprocess
import sys

from raykernel.errors import InputError

LISTEN_SECONDS = 20.0
"""A head takes a connection in well under a second, over a slow network in a few."""
ANSWER_SECONDS = 120.0
"""The health check imports Ray, for which a loaded machine has needed more than 20 s."""

TOKEN_HINT = (
    "Ray's authentication mode and token must be the same on every node and here: set "
    "RAY_AUTH_MODE=token with RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) where the cluster uses "
    "tokens, RAY_AUTH_MODE=disabled where it does not."
)

START_HINT = "Start a cluster with `ray start --head`, or leave compute.address null."


def check_address(address: str) -> None:
    """Make sure that a cluster answers.

    Args:
        address: `auto`, or HOST:PORT of the cluster's head.

    Raises:
        InputError: if the address has another form, if nothing listens there, if that is no
            cluster, or if it refuses our authentication token.
    """
    if "://" in address or (address != "auto" and not _is_host_port(address)):
        raise InputError(
            f"compute.address: found {address!r}, expected auto or HOST:PORT. From outside a "
            "cluster, hand the command to it with `ray job submit -- raykernel ...` and "
            "compute.address=auto."
        )
    place = []
    if address != "auto":
        _connect(address)
        place = ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *place]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"compute.address={address}: no Ray cluster answered in {ANSWER_SECONDS:g} s. "
            f"{START_HINT}"
        ) from error
    if answer.returncode == 0:
        return
    if "token" in answer.stderr.lower():
        raise InputError(f"compute.address={address}: the cluster refused us. {TOKEN_HINT}")
    where = "on this machine" if address == "auto" else "there"
    raise InputError(f"compute.address={address}: no Ray cluster runs {where}. {START_HINT}")


def _connect(address: str) -> None:
    """Open and close a connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTEN_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"compute.address={address}: nothing listens there ({error}). {START_HINT}"
        ) from error


def _is_host_port(address: str) -> bool:
    """Whether the text is HOST:PORT."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536
