"""The seam between Pulsar's messages and what carries them: a broker, or the relay that our own server is.

Pulsar has four boxes for us: three that it reads (`setup`, `kill`, `status`) and one that it writes (`status_update`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Final, Protocol, Self

SETUP: Final = "setup"
KILL: Final = "kill"
STATUS: Final = "status"


class Post(Protocol):
    """Letters to and from one Pulsar manager. An async context; errors are SiteUnavailable and SiteRefused.

    `where` names the other side in error messages, without secrets; `doubt` is what to ask oneself if it is silent.
    """

    where: str
    doubt: str

    async def send(self, box: str, letter: Mapping[str, object]) -> None:
        """Put a JSON object into a box of Pulsar's; once this returns, it is kept until Pulsar takes it.

        SiteUnavailable: it may or may not be kept; `unsent` says that it surely is not.
        """

    def letters(self) -> AsyncIterator[object]:
        """JSON documents that Pulsar writes, for ever; each at least once. One is given back to nobody as soon as the
        next is asked for: until then it survives a crash of ours."""

    def copies(self) -> AsyncIterator[object] | None:
        """The same documents as they come, for each process that listens, to wake who waits for an answer; none of them
        is kept for anybody. None: there are no copies, because `letters` brings this process what it waits for."""

    async def version(self) -> str:
        """The version that Pulsar gave by letter when it started; empty if it gave none."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
