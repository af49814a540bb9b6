"""The seam to the letters that wait for somebody: the relay keeps here what it takes, until it is passed on.

A letter is a text in a box. Boxes need not be made. Who reads a box sees its letters in the order in which they were
put, under ids that only grow: no letter shows up below an id that was read before, even if the store has been replaced
since by a new one or by an older copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

BOX_LETTERS: Final = 1000
"""Letters that a box holds at most."""

BOX_BYTES: Final = 256 << 20
"""Bytes that the letters of a box have at most together."""

LETTER_BYTES: Final = 64 << 20
"""Bytes of one letter at most."""

READ_LETTERS: Final = 200
READ_BYTES: Final = 8 << 20
"""What one read returns at most, but always one letter if there is one."""


@dataclass(frozen=True)
class Letter:
    """A letter in a box. `id` is above 0."""

    id: int
    text: str


def next_letter_id(last: int, now: float) -> int:
    """The id that follows the last one of a box, in the second `now`: a count that is not behind the microseconds."""
    return max(last + 1, int(now * 1e6))


def last_of_read(sizes: Iterable[tuple[int, int]]) -> int:
    """The id of the last of these letters, given as (id, size), that fits into one read; 0 if there are none."""
    last = total = 0
    for letter_id, size in sizes:
        total += size
        if last and total > READ_BYTES:
            break
        last = letter_id
    return last


class Doorbell:
    """Wakes those of this process who wait for letters. A hint: another process may have put one without a sound."""

    def __init__(self) -> None:
        self._listening: dict[str, set[asyncio.Event]] = {}

    def ring(self, box: str) -> None:
        """There is a new letter in the box. Call it on the event loop's thread."""
        for event in self._listening.get(box, ()):
            event.set()

    @contextmanager
    def listen(self, box: str) -> Iterator[asyncio.Event]:
        """An event that is set by each ring from now on; who clears it before a look misses nothing."""
        event = asyncio.Event()
        self._listening.setdefault(box, set()).add(event)
        try:
            yield event
        finally:
            self._listening[box].discard(event)
            if not self._listening[box]:
                del self._listening[box]


async def rung(event: asyncio.Event, timeout: float) -> None:
    """Return when the event is set, or after `timeout` seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await event.wait()


class Mailbox(Protocol):
    """Keeps letters. Every call may raise StoreUnavailable; whether a write was done is unknown then."""

    doorbell: Doorbell

    async def put(self, box: str, text: str, key: str, *, instead: bool = False) -> int:
        """Keep a letter, durably, behind all others of the box; its id.

        A letter with this key that is still there stays as it is, and its id is returned; with `instead` it gives way
        to the new one. MailboxFull: the box holds too much, nothing was changed. ValueError: more than LETTER_BYTES.
        """

    async def read(self, box: str, after: int = 0) -> Sequence[Letter]:
        """The first letters with ids above `after`, in order, as many as are good to handle at once."""

    async def drop(self, box: str, up_to: int) -> None:
        """Forget the letters with ids up to this one."""

    async def expire(self, before: float) -> None:
        """Forget the letters of all boxes that were put before that time, by the store's clock."""


__all__ = [
    "BOX_BYTES",
    "BOX_LETTERS",
    "LETTER_BYTES",
    "READ_BYTES",
    "READ_LETTERS",
    "Doorbell",
    "Letter",
    "Mailbox",
    "last_of_read",
    "next_letter_id",
    "rung",
]
