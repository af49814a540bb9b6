"""File descriptors of the service's process: as many as it may have, and never all of them for connections."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

TELL_EVERY: Final = 60.0
"""Seconds from one complaint about too many connections to the next."""


ENOUGH: Final = 65_536
"""More are never asked for: there are programs, jobs perhaps, that close all that they might have one by one."""


def raise_limit() -> None:
    """Let this process, and those that it starts from now on, have enough, or as many as the system grants it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """How many may serve connections; the rest are for the store, the job directories and whatever else is opened."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (ENOUGH if soft == resource.RLIM_INFINITY else soft) * 3 // 4


class BoundedProtocol(HttpToolsProtocol):
    """HTTP for uvicorn that closes each connection above the bound at once.

    uvicorn's own `limit_concurrency` would not do: it answers requests with 503, but leaves all connections open on
    which none is made, and those of strangers would shut out everybody else long before there are too many.
    """

    _told: ClassVar[float] = -TELL_EVERY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_EVERY:
            type(self)._told = now
            log.warning("More than %d connections are open; new ones are closed.", most_connections())
