"""What keeps a store in order, now and then: old tasks go, none waits for a time that is none, own sites stay ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from tesp_api.lifecycle import Policy, longest_pause
from tesp_api.store import Ring, TaskStore

log = logging.getLogger(__name__)

EVERY: float = 60.0
"""Seconds between two rounds."""

OWN_FOR: float = 300.0
"""Seconds for which a site on our own machine stays ours after the last round."""

BATCH = 200
"""Tasks deleted or brought forward in one go; small, so that others need not wait."""

DAY = 86400.0


class Keeper:
    """Deletes tasks that ended more than `days` ago (0: never), in small batches.

    What is due later than the pauses of all `policies` allow was put off before the clock was set back, and is due now.
    `owned`: rights to sites that lie on one machine, and which machine's directory holds them.
    """

    name = "keeper"

    def __init__(
        self,
        store: TaskStore,
        days: float = 0.0,
        owned: Mapping[str, str] | None = None,
        policies: Collection[Policy] = (),
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._store = store
        self._days = days
        self._owned = owned or {}
        # A round more: the clocks of processes differ a little.
        self._longest = max(map(longest_pause, policies or [Policy()])) + EVERY
        self._clock = clock or store.clock
        self._next = 0.0

    async def tick(self) -> int:
        """One batch, if it is time; how many tasks were deleted or brought forward."""
        now = self._clock()
        if now < self._next <= now + EVERY:
            return 0
        if foreign := await self.foreign():
            log.critical("The site %r belongs to a service with another data directory by now.", foreign)
        late = await self._store.bring_forward(now + self._longest, now, BATCH)
        if late:
            log.warning("%d tasks were due far too late and are due now: the clock must have been set back.", late)
        gone = await self._store.purge(now - self._days * DAY if self._days else 0.0, BATCH)
        if max(late, gone) < BATCH:
            self._next = now + EVERY
        if gone:
            log.info("%d tasks that ended more than %g days ago were deleted.", gone, self._days)
        return late + gone

    async def foreign(self) -> str | None:
        """Make the owned sites ours; the first that is another's."""
        for site, holder in self._owned.items():
            if await self._store.hold(f"site {site}", holder, OWN_FOR) is None:
                return site
        return None

    def wakes_on(self) -> Ring:
        """Nothing that happens to a task is urgent here."""
        return Ring(0)

    async def next_due(self) -> float | None:
        """When the next round is."""
        return self._next
