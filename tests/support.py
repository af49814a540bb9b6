"""What all tests share."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import socket
from collections.abc import Iterator

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the test unless the condition holds; with TESP_REQUIRE_SERVICES=1, as in CI, that is a failure."""
    if condition:
        return
    if os.environ.get("TESP_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def descriptors(most: int) -> Iterator[None]:
    """This process, and what it starts meanwhile, can have no more file descriptors than that; what is open stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process can open nothing. (Less than one, which stdin has, and it could not poll what it has open.)"""
    with descriptors(1):
        yield


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, nor will an outgoing connection be given it while its server is down.

    (Of the ports that are given out, a client that tries again and again to reach a dead server may get that server's
    own, connect to itself, and keep the server from coming back.)
    """
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
