"""Letters to and from a Pulsar that calls us: our own HTTP server is its relay, and the mailbox keeps the letters."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from tesp_api.errors import MailboxFull, SiteRefused, SiteUnavailable, StoreUnavailable
from tesp_api.relay import Manager, write_letter
from tesp_api.sites.pulsar.errand import is_errand
from tesp_api.sites.pulsar.post import KILL, SETUP, STATUS
from tesp_api.store.mailbox import LETTER_BYTES, Letter, Mailbox, rung

log = logging.getLogger(__name__)

LOOK_EVERY: Final = 0.5
"""Seconds between two looks into the inbox: another process may have put a letter there."""

KEEP: Final = 4.0
"""Seconds for which a letter that was worked on is kept: every process of ours reads all of them, since the answer to a
question is known only to the one that asked."""

ERRAND_SLOT: Final = len("tes-errand-") + 2
"""Characters of an errand's name that tell the places of questions about errands apart."""

EXPIRE_EVERY: Final = 3600.0
EXPIRE_AFTER: Final = 7 * 86400.0
"""Seconds after which nobody will come for a letter any more."""


class RelayPost:
    """The Post of one manager at our relay; `keep`, `look_every`: see KEEP, LOOK_EVERY."""

    def __init__(
        self, mailbox: Mailbox, manager: Manager, *, keep: float = KEEP, look_every: float = LOOK_EVERY
    ) -> None:
        self.where = f"the Pulsar that takes its letters at our relay for the site {manager.site}"
        self.doubt = "does it run, and log in here with the right password (our log tells of refused logins)"
        self._mailbox = mailbox
        self._manager = manager
        self._keep, self._look_every = keep, look_every
        self._topics = {SETUP: manager.setup, KILL: manager.kill, STATUS: manager.status}
        self._expired = -math.inf
        self._away = False
        self._old = 0

    async def __aenter__(self) -> Self:
        while found := await self._look(self._old):
            self._old = found[-1].id
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def send(self, box: str, letter: Mapping[str, object]) -> None:
        """See Post. What is asked or told again while the first letter still waits does not make a second one."""
        topic = self._topics[box]
        text = write_letter(topic, json.dumps(letter, separators=(",", ":")))
        if len(text) > LETTER_BYTES:
            raise SiteRefused(f"A letter of {len(text)} bytes is too long for the relay ({LETTER_BYTES}).")
        key = f"{topic} {_slot(letter.get('job_id'), asked=box == STATUS)}"
        try:
            # A kill or a question may have been handed out already, and be repeated because nothing came of it.
            await self._mailbox.put(self._manager.outbox, text, key, instead=box != SETUP)
        except MailboxFull as error:
            raise SiteUnavailable(
                f"Too many letters wait for {self.where}: it does not fetch them.", unsent=True
            ) from error
        except StoreUnavailable as error:
            raise SiteUnavailable(f"The store took no letter for {self.where}: {error}") from error

    async def letters(self) -> AsyncIterator[object]:
        """See Post. After a start the letters of the last few seconds come once more."""
        handled: deque[tuple[float, int]] = deque()
        async for batch in self._batches(0):
            for each in batch:
                yield _document(each)
                handled.append((time.monotonic(), each.id))
            await self._tidy(handled)

    async def copies(self) -> AsyncIterator[object]:
        """See Post. What was there at the start answers nobody's question."""
        async for batch in self._batches(self._old):
            for each in batch:
                yield _document(each)

    async def _batches(self, after: int) -> AsyncIterator[Sequence[Letter]]:
        """What there is to read, look by look, also when there is nothing."""
        with self._mailbox.doorbell.listen(self._manager.inbox) as bell:
            while True:
                bell.clear()
                found = await self._look(after)
                yield found
                if found:
                    after = found[-1].id
                else:
                    await rung(bell, self._look_every)

    async def _look(self, after: int) -> Sequence[Letter]:
        """What there is to read; nothing while the store is away."""
        try:
            if time.monotonic() - self._expired >= EXPIRE_EVERY:
                await self._mailbox.expire(time.time() - EXPIRE_AFTER)
                self._expired = time.monotonic()
            found = await self._mailbox.read(self._manager.inbox, after)
        except StoreUnavailable as error:
            if not self._away:
                log.warning("Letters of %s wait until the store answers: %s", self.where, error)
            self._away = True
            return ()
        self._away = False
        return found

    async def _tidy(self, handled: deque[tuple[float, int]]) -> None:
        """Drop what was worked on a while ago, once that is worth a write."""
        last = 0
        while handled and handled[0][0] <= time.monotonic() - self._keep:
            last = handled.popleft()[1]
        if last:
            with suppress(StoreUnavailable):  # a later one drops them, too
                await self._mailbox.drop(self._manager.inbox, last)

    async def version(self) -> str:
        """See Post."""
        try:
            said = await self._mailbox.read(self._manager.about)
            if len(said) > 1:
                await self._mailbox.drop(self._manager.about, said[-2].id)
        except StoreUnavailable as error:
            raise SiteUnavailable(f"The store did not tell what {self.where} says of itself: {error}") from error
        with suppress(ValueError, RecursionError):
            for each in said[-1:]:
                document = json.loads(each.text)
                version = document.get("pulsar_version") if isinstance(document, dict) else None
                return version[:100] if isinstance(version, str) else ""
        return ""


def _slot(job_id: object, *, asked: bool) -> str:
    """Letters of one topic that have the same one take each other's place.

    Questions about errands are about a new one each time, also while their Pulsar is away, and must not fill the box:
    they share a few hundred places. One that has lost its own is old, or is asked again.
    """
    if not isinstance(job_id, str):
        return secrets.token_hex(8)
    return job_id[:ERRAND_SLOT] if asked and is_errand(job_id) else job_id


def _document(letter: Letter) -> object:
    """What Pulsar wrote; None if it is no JSON, though nobody but our own API writes to the inbox."""
    with suppress(ValueError, RecursionError):
        return json.loads(letter.text)
    return None
