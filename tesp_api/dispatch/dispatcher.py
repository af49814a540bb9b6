"""Due QUEUED tasks: choose a site, plan, note the attempt, submit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tesp_api import lifecycle
from tesp_api.dispatch import place
from tesp_api.dispatch.plan import plan
from tesp_api.dispatch.record import record
from tesp_api.errors import PlanError, SiteRefused, SiteUnavailable
from tesp_api.lifecycle import Policy
from tesp_api.sites import Site, SiteFacts
from tesp_api.store import Load, TaskStore
from tesp_api.task import Attempt, Bodies, Task

log = logging.getLogger(__name__)

BATCH = 64
"""Tasks taken in one round, so that the lease is long enough for all of them."""


class Dispatcher:
    """Sends due QUEUED tasks to sites with room."""

    name = "dispatcher"

    def __init__(self, store: TaskStore, sites: Mapping[str, Site], policies: Mapping[str, Policy]) -> None:
        self._store = store
        self._sites = sites
        self._facts: Sequence[SiteFacts] = [site.facts for site in sites.values()]
        self._policies = policies
        self._lease = min((policy.lease for policy in policies.values()), default=Policy().lease)
        self._submitting: set[asyncio.Task[None]] = set()
        self._blocked = False

    async def tick(self) -> int:
        """Take what is due and fits, and start its submits; how many were assigned."""
        loads = dict(await self._store.loads())
        room = sum(place.room(facts, loads.get(facts.name, Load())) for facts in self._facts)
        self._blocked = room == 0
        if self._blocked:
            return 0
        now = time.time()
        tasks = await self._store.take_due(queued=True, now=now, lease=self._lease, limit=min(room, BATCH))
        assigned = 0
        for task in tasks:
            assigned += await self._assign(task, loads)
        return assigned

    async def next_due(self) -> float | None:
        """The oldest waiting task, unless all sites are full: then the end of another task rings the bell."""
        return None if self._blocked else await self._store.next_due(queued=True)

    async def drain(self) -> None:
        """Wait for the submits under way."""
        while self._submitting:
            await asyncio.wait(self._submitting)

    async def _assign(self, task: Task, loads: dict[str, Load]) -> bool:
        now = time.time()
        facts, reason = place.choose(self._facts, loads, task.spec.resources)
        if facts is None and reason:
            await record(self._store, task, lambda task: _refused(task, now, reason))
            return False
        if facts is None:
            self._blocked = True
            await record(self._store, task, lambda task: _later(task, now))
            return False
        name, policy = facts.name, self._policies[facts.name]
        taken = await record(self._store, task, lambda task: lifecycle.assign(task, name, now, policy))
        if taken is None:  # cancelled meanwhile
            return False
        loads[name] = place.with_one_more(loads.get(name, Load()), task.spec.resources)
        under_way = asyncio.create_task(self.submit(taken), name=f"submit {task.id}")
        self._submitting.add(under_way)
        under_way.add_done_callback(self._submitted)
        return True

    def _submitted(self, under_way: asyncio.Task[None]) -> None:
        self._submitting.discard(under_way)
        if not under_way.cancelled() and (error := under_way.exception()) is not None:
            # The lease brings the task back; nothing is lost.
            log.error("%s failed", under_way.get_name(), exc_info=error)

    async def submit(self, task: Task) -> None:
        """Submit the current attempt and note the answer. May be repeated: the job id stays the same."""
        attempt = task.attempt
        assert attempt is not None, "an assigned task has an attempt"
        policy = self._policies[attempt.site]
        try:
            await self._submit(task, attempt, policy)
        except SiteUnavailable as error:
            reason = str(error)
            await record(self._store, task, lambda task: _unsure(task, attempt, reason, policy))
        except (PlanError, SiteRefused) as error:
            reason = str(error)
            await record(self._store, task, lambda task: _refused(task, time.time(), reason, attempt.number))
        else:
            await record(self._store, task, lambda task: lifecycle.confirmed(task, attempt.number, time.time()))

    async def _submit(self, task: Task, attempt: Attempt, policy: Policy) -> None:
        site = self._sites[attempt.site]
        contents = await self._store.contents(task.id) if _has_contents(task) else {}
        document = plan(replace(task, bodies=Bodies(contents=contents)), site.facts)
        # A process that slept through its lease must not submit: another may have ended the task meanwhile.
        left = (task.due_at or 0.0) - 0.2 * policy.lease - time.time()
        if left <= 0:
            raise SiteUnavailable("The lease ran out before the job was submitted.")
        try:
            async with asyncio.timeout(left):
                await site.submit(document)
        except TimeoutError:
            raise SiteUnavailable(f"The site {attempt.site!r} did not answer the submit in time.") from None


def _has_contents(task: Task) -> bool:
    return any(not item.url for item in task.spec.inputs or ())


def _refused(task: Task, now: float, reason: str, number: int | None = None) -> lifecycle.Change | None:
    if task.final or (number is not None and (task.attempt is None or task.attempt.number != number)):
        return None
    return lifecycle.give_up(task, now, reason)


def _later(task: Task, now: float) -> lifecycle.Change | None:
    """Put a task that found no room back at its place in the queue."""
    return None if task.final else lifecycle.wait(task, now, "", pause=task.created - now)


def _unsure(task: Task, attempt: Attempt, reason: str, policy: Policy) -> lifecycle.Change | None:
    if task.final or task.attempt is None or task.attempt.number != attempt.number:
        return None
    return lifecycle.silent(task, time.time(), reason, policy)
