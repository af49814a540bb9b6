"""What the dispatcher remembers of the queue: lanes that found no room, and what the waiting tasks were told."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from tesp_api.dispatch.place import Choice
from tesp_api.store import TaskStore
from tesp_api.task import Task
from tesp_api.tes import TesView

BATCH = 64
"""Tasks taken in one go, so that the lease is long enough for all of them."""

FIRST = 8
"""Tasks taken in one go after some have found no room: those that do not find any either have to be put back."""

MOST = 4 * BATCH
"""Tasks looked at in one tick, however many lanes find no room."""

FULL_FOR = 1.0
"""Seconds for which tasks that found no room are let alone, unless something has ended."""

SURVEY_EVERY = 5.0
"""Seconds after which waiting tasks are looked at though there is no room: some will never fit, and the others shall
be told why they wait."""

MOST_LANES = MOST // 2
"""Lanes remembered; more only if somebody wants to be a nuisance. Each tick can look at others besides."""

OFF_FOR = 5.0
"""Seconds for which a task that found no room is put off if its lane is not remembered."""

REST = 0.5
"""Seconds without a look after a tick that has put tasks off, however many more there are."""

TOLD = 10_000
"""Tasks of which it is remembered what they were told."""

WAITS = "The task waits: "


class Lanes:
    """Lanes that are passed over for now. `full`: no site had room for anything. `rests_until`: when the next look is,
    if it is not at once."""

    def __init__(self) -> None:
        self.full = False
        self._blocked: dict[str, None] = {}
        self._careful = False
        self._seen: object = None
        self._at = 0.0
        self._survey = False
        self._surveyed: float | None = None
        self._looked_at = 0.0
        self._turned_away = False
        self.rests_until = 0.0

    def clear(self) -> None:
        """Nothing waits."""
        self._blocked.clear()
        self.full = self._careful = self._survey = False
        self._seen = self._surveyed = None
        self.rests_until = 0.0

    def look(self, world: object, now: float) -> bool:
        """A tick begins; False if it is too soon. `world` is all that decides who finds room: as long as it is the
        same, nobody does.

        Putting tasks back rings the bell too, and must not start the next round.
        """
        if now < self.rests_until <= now + REST:
            return False
        self._looked_at, self._turned_away = now, False
        self._careful = bool(self._blocked)
        waiting = self.full or self._careful
        self._survey = waiting and not (self._surveyed is not None and 0 <= now - self._surveyed < SURVEY_EVERY)
        if self._survey:
            self._surveyed = now
        if self._survey or world != self._seen or not 0 <= now - self._at < FULL_FOR:
            self._blocked.clear()
            self._at = now
        return True

    def looked(self, world: object, *, full: bool) -> None:
        """The tick is over."""
        self._seen, self.full = world, full

    def reopen(self) -> None:
        """Something has changed that may give room to any lane, maybe in the middle of a tick."""
        self._blocked.clear()

    def limit(self, room: int) -> int:
        """How many tasks to take next."""
        if self._survey:
            return BATCH
        return min(room, FIRST if self._careful else BATCH)

    def went(self) -> bool:
        """After a round: whether some in it found no room."""
        self._careful, self._turned_away = self._turned_away, False
        return self._careful

    def block(self, lane: str) -> bool:
        """One of this lane found no room; False if the lane cannot be passed over, so that the task must be put off."""
        self._turned_away = True
        if lane in self._blocked or len(self._blocked) < MOST_LANES:
            self._blocked[lane] = None
            return True
        self.rests_until = self._looked_at + REST
        return False

    def passed_over(self) -> Collection[str]:
        """What not to take now."""
        return list(self._blocked)


class Waits:
    """Tells each task why it waits, once for each reason; what was told before our time is in the store."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._told: dict[str, set[str]] = {}

    async def line(self, task: Task, choice: Choice, why: Callable[[str], str], now: float) -> str:
        """What to write into the task's system logs; empty if it knows, or has not waited worth the mention."""
        if choice.full and not choice.down and 0 <= now - task.created < FULL_FOR:
            return ""
        head = _sentence(choice)
        if head in (told := await self._known(task)):
            return ""
        told.add(head)
        return " ".join([head, *dict.fromkeys(reason for site in choice.down if (reason := why(site)))])

    async def _known(self, task: Task) -> set[str]:
        if task.id not in self._told:
            if len(self._told) >= TOLD:
                self._told.clear()
            found = await self._store.get(task.id, TesView.FULL)
            lines = [each for lines in found.bodies.system.values() for each in lines] if found and found.bodies else []
            self._told[task.id] = {head.group() for line in lines if (head := _HEAD.match(line))}
        return self._told[task.id]


_HEAD = re.compile(f"{WAITS}.*?( is full| takes no jobs now| is being drained)\\.(?= |$)")


def _sentence(choice: Choice) -> str:
    parts = [f"the site {site!r} is full" for site in choice.full]
    parts += [f"the site {site!r} takes no jobs now" for site in choice.down]
    parts += [f"the site {site!r} is being drained" for site in choice.draining]
    return f"{WAITS}{', '.join(parts)}."
