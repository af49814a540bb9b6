"""Due QUEUED tasks: choose a site, plan, note the attempt, submit."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tesp_api import lifecycle
from tesp_api.dispatch import loop, place
from tesp_api.dispatch.health import Health
from tesp_api.dispatch.lanes import BATCH, MOST, OFF_FOR, Lanes, Waits
from tesp_api.dispatch.place import Choice
from tesp_api.dispatch.plan import plan
from tesp_api.dispatch.right import Right
from tesp_api.errors import (
    PlanError,
    RightLost,
    SiteClosed,
    SiteError,
    SiteRefused,
    SiteUnavailable,
    StoreUnavailable,
)
from tesp_api.lifecycle import Policy
from tesp_api.parameters import lane as lane_of
from tesp_api.record import record
from tesp_api.runner.job import Plan, ReportTo
from tesp_api.sites import Site, SiteFacts
from tesp_api.store import Load, Ring, TaskStore
from tesp_api.task import ACTIVE, Attempt, Bodies, Task, token_hash
from tesp_api.tes import TesState, TesView

log = logging.getLogger(__name__)

MOST_KILLS = 10_000
"""Kills of earlier attempts that are under way, or whose outcome the next submit of their task takes up."""


MOST_SUBMITS = 64
"""Submits under way at one site. What is assigned beyond that would wait in a line, and its lease run out there."""

FEW_SUBMITS = 32
"""As few as that must be under way until a site with the most of them gets more."""


class Dispatcher:
    """Sends due QUEUED tasks to sites with room.

    A lane is what tasks with the same wishes share. Once a task has found no room, the lane is passed over until the
    loads or the sites have changed, so that it holds up no other. Of more lanes than can be remembered, each task is
    put off by itself.
    """

    name = "dispatcher"

    def __init__(
        self,
        store: TaskStore,
        sites: Mapping[str, Site],
        policies: Mapping[str, Policy],
        clock: Callable[[], float] = time.time,
        health: Health | None = None,
        take_over: float = 5.0,
    ) -> None:
        self._store = store
        self._sites = sites
        self._facts: Sequence[SiteFacts] = [site.facts for site in sites.values()]
        self._policies = policies
        self._lease = min((policy.lease for policy in policies.values()), default=Policy().lease)
        self._submitting: set[asyncio.Task[None]] = set()
        self._in_hand = Counter[str]()  # submits under way, by site
        self._busy: frozenset[str] = frozenset()  # sites with the most of these
        self._kills: dict[str, asyncio.Task[Exception | None]] = {}  # that took long, by job id
        self._tokens: dict[str, str] = {}  # of jobs about to be submitted for the first time
        self._clock = clock
        self._health = health or Health(sites, clock)
        self._queue = Lanes()
        self._waits = Waits(store)
        # Where nothing is limited nothing is counted, and all processes may place at once.
        limited = any((facts.max_jobs, facts.cpus, facts.ram_gb) != (None, None, None) for facts in self._facts)
        self._right = Right(store, "place", take_over) if limited else None
        self._before: float | None = None
        self._elsewhere = False

    async def tick(self) -> int:
        """Take what is due and fits, and start its submits; how many were assigned."""
        due_at = await self._store.next_due(queued=True)
        if due_at is None or due_at > self._clock():
            self._queue.clear()
            self._elsewhere = False
            return 0
        if self._right is not None:
            self._before = await self._right.until()
            self._elsewhere = self._before is None
            if self._elsewhere:
                return 0
        try:
            return await self._place()
        except RightLost:
            assert self._right is not None, "only a right can be lost"
            self._right.lost()
            return 0

    async def _place(self) -> int:
        """Rounds, each without the lanes that found no room in those before."""
        loads, now = dict(await self._store.loads()), self._clock()
        if not self._queue.look(self._world(loads), now):
            return 0
        looked_at = assigned = 0
        while looked_at < MOST and (limit := self._queue.limit(self._room(loads))):
            skip = self._queue.passed_over()
            if skip and not self._is_due(await self._store.next_due(queued=True, skip=skip)):
                break  # to take nothing is still a write
            tasks = await self._store.take_due(queued=True, now=now, lease=self._lease, limit=limit, skip=skip)
            for task in tasks:
                assigned += await self._assign_safely(task, loads)
            looked_at += len(tasks)
            if len(tasks) < limit or (not self._queue.went() and looked_at >= BATCH):
                break
        self._queue.looked(self._world(loads), full=self._is_full(loads))
        return assigned

    def _world(self, loads: Mapping[str, Load]) -> object:
        """All that decides who finds room."""
        return loads, self._health.changes, self._busy

    def _takers(self) -> list[SiteFacts]:
        return [facts for facts in self._facts if not facts.draining and self._health.takes(facts.name)]

    def _is_full(self, loads: Mapping[str, Load]) -> bool:
        return not any(place.room(facts, loads.get(facts.name, Load())) for facts in self._takers())

    def _room(self, loads: Mapping[str, Load]) -> int:
        """How many jobs the sites may get just now."""
        return sum(
            min(place.room(facts, loads.get(facts.name, Load())), MOST_SUBMITS - self._in_hand[facts.name])
            for facts in self._takers()
            if facts.name not in self._busy
        )

    def _waits_for_sites(self) -> bool:
        """Whether new tasks are of no interest as long as nothing changes at the sites."""
        return self._queue.full or all(facts.name in self._busy for facts in self._takers())

    def _is_due(self, due_at: float | None) -> bool:
        return due_at is not None and due_at <= self._clock()

    def wakes_on(self) -> Ring:
        """New tasks, but only room when there is none: a burst of creates must not cost a look each."""
        if self._elsewhere:
            return Ring(0)
        return Ring.ROOM if self._waits_for_sites() else Ring.QUEUED | Ring.ROOM

    async def next_due(self) -> float | None:
        """The oldest task that may find room, unless all sites are full: then the end of another rings the bell."""
        if self._elsewhere or self._waits_for_sites():
            return None
        due_at = await self._store.next_due(queued=True, skip=self._queue.passed_over())
        return None if due_at is None else max(due_at, self._queue.rests_until)

    async def drain(self) -> None:
        """Wait for the submits under way, and let others place. Cancelled, it ends them."""
        try:
            if self._right is not None:
                await self._right.give_back()
            while self._submitting:
                await asyncio.wait(self._submitting)
        finally:
            await loop.end([*self._submitting, *self._kills.values()])

    async def _assign_safely(self, task: Task, loads: dict[str, Load]) -> bool:
        """A mistake of ours about one task must not hold up the others."""
        try:
            return await self._assign(task, loads)
        except (StoreUnavailable, RightLost):
            raise
        except Exception as error:
            log.exception("%s could not be assigned", task.id)
            reason = f"The service failed: {error!r}"
            await record(self._store, task, lambda task: _misfit(task, self._clock(), reason))
            return False

    async def _assign(self, task: Task, loads: dict[str, Load]) -> bool:
        now, lane = self._clock(), lane_of(task.spec)
        need = place.need_of(task.spec)
        choice = place.choose(self._facts, loads, need, self._health.takes, self._busy)
        if choice.site is None and choice.reason:
            await record(self._store, task, lambda task: _misfit(task, now, choice.reason))
            return False
        if choice.site is None:
            pause = 0.0 if self._queue.block(lane) else OFF_FOR
            line = "" if choice.busy else await self._waits.line(task, choice, self._health.why, now)
            await record(self._store, task, lambda task: lifecycle.hold(task, now, line, pause=pause))
            return False
        name, policy = choice.site.name, self._policies[choice.site.name]
        token = secrets.token_urlsafe(32) if choice.site.report_url else ""
        hashed = token_hash(token) if token else ""
        taken = await record(
            self._store, task, lambda task: lifecycle.assign(task, name, now, policy, token=hashed), before=self._before
        )
        if taken is None:  # cancelled meanwhile
            return False
        if token and taken.attempt is not None:
            self._tokens[taken.attempt.job_id] = token
        loads[name] = place.with_one_more(loads.get(name, Load()), need)
        self._health.sends(name)
        under_way = asyncio.create_task(self.submit(taken, fresh=True), name=f"submit {task.id}")
        self._submitting.add(under_way)
        self._in_hand[name] += 1
        if self._in_hand[name] >= MOST_SUBMITS:
            self._busy |= {name}
        under_way.add_done_callback(lambda done: self._submitted(done, name))
        return True

    def _submitted(self, under_way: asyncio.Task[None], site: str) -> None:
        self._submitting.discard(under_way)
        self._in_hand[site] -= 1
        if site in self._busy and self._in_hand[site] <= FEW_SUBMITS:
            self._busy -= {site}
            self._queue.reopen()
            self._store.bell.ring(Ring.ROOM)
        if not under_way.cancelled() and (error := under_way.exception()) is not None:
            # The lease brings the task back; nothing is lost.
            log.error("%s failed", under_way.get_name(), exc_info=error)

    async def submit(self, task: Task, *, fresh: bool = False) -> None:
        """Submit the current attempt and note the answer. May be repeated: the job id stays the same.

        `fresh`: it was assigned just now, so nobody else can have sent it yet.
        """
        attempt = task.attempt
        assert attempt is not None, "an assigned task has an attempt"
        policy = self._policies[attempt.site]
        try:
            try:
                await self._submit(task, attempt, policy)
            finally:
                self._tokens.pop(attempt.job_id, None)
        except _TooLate as error:  # no fault of the site
            reason = str(error)
            await self._noted(task, attempt, lambda task: _unsure(task, attempt, self._clock(), reason, policy))
        except (SiteUnavailable, SiteClosed) as error:
            await self._not_heard(task, attempt, error, policy, fresh=fresh)
        except (PlanError, SiteRefused) as error:
            reason = str(error)
            if isinstance(error, SiteRefused):
                log.warning("The site %r refused job %s: %s", attempt.site, attempt.job_id, reason)
                self._health.answers(attempt.site)
            await record(self._store, task, lambda task: lifecycle.refused(task, attempt.number, self._clock(), reason))
        except StoreUnavailable:
            raise
        except Exception as error:  # a mistake of ours or of the site's; patience ends it if it stays
            log.exception("the submit of %s failed", attempt.job_id)
            reason = f"The service failed: {error!r}"
            await self._noted(task, attempt, lambda task: _unsure(task, attempt, self._clock(), reason, policy))
        else:
            now = self._clock()
            self._health.took(attempt.site)
            await self._noted(task, attempt, lambda task: lifecycle.confirmed(task, attempt.number, now, policy))

    async def _not_heard(self, task: Task, attempt: Attempt, error: SiteError, policy: Policy, *, fresh: bool) -> None:
        """The site failed, not the task. It goes back into the queue if it has surely not left us."""
        reason = str(error)
        if isinstance(error, SiteClosed):
            self._health.refused(attempt.site, reason)
            unsent = True
        else:
            self._health.silent(attempt.site, reason)
            unsent = isinstance(error, SiteUnavailable) and error.unsent
        if fresh and unsent:
            line = await self._waits.line(task, Choice(down=(attempt.site,)), lambda site: reason, self._clock())
            back = await record(
                self._store,
                task,
                lambda current: lifecycle.unassign(current, task, self._clock(), *([line] if line else [])),
            )
            if back is not None:
                return
        await self._noted(task, attempt, lambda task: _unsure(task, attempt, self._clock(), reason, policy))

    async def _noted(self, task: Task, attempt: Attempt, decide: Callable[[Task], lifecycle.Change | None]) -> None:
        """Note what became of a submit. A process that slept through its lease in the middle of it finds that the task
        has moved on; then nobody waits for the job that may have arrived by now."""
        if await record(self._store, task, decide) is not None:
            return
        current = await self._store.get(task.id, TesView.BASIC)
        if lifecycle.is_over(current, attempt.number):
            await self._withdraw(current, attempt)

    async def _withdraw(self, task: Task | None, attempt: Attempt) -> None:
        """Remove a job that came too late; if its site does not hear us now, the clean-up after the task's end does."""
        log.warning("Job %s came too late to its site %r and is removed.", attempt.job_id, attempt.site)
        site = self._sites[attempt.site]
        try:
            async with asyncio.timeout(self._lease):
                await site.cancel(attempt.job_id, force=True)
                await site.forget(attempt.job_id, force=True)
        except Exception as error:
            log.warning("Job %s could not be removed yet: %s", attempt.job_id, str(error) or "no answer in time")
            if task is not None:
                await record(self._store, task, lambda task: lifecycle.left_behind(task, attempt.number, self._clock()))

    async def _submit(self, task: Task, attempt: Attempt, policy: Policy) -> None:
        site = self._sites[attempt.site]
        await self._stop_earlier(task, attempt, policy)
        contents = await self._store.contents(task.id) if task.spec.inputs else {}
        document = _planned(replace(task, bodies=Bodies(contents=contents)), site.facts)
        if site.facts.report_url:
            document = document._replace(report=await self._report_to(task, attempt, site.facts.report_url))
        # A process that slept through its lease must not submit: another may have ended the task meanwhile.
        left = (task.due_at or 0.0) - 0.2 * policy.lease - self._clock()
        if left <= 0.1 * policy.lease:  # so little time says nothing of the site
            raise _TooLate("The lease ran out before the job was submitted.")
        try:
            async with asyncio.timeout(left):
                await site.submit(document)
        except TimeoutError:
            raise SiteUnavailable(f"The site {attempt.site!r} did not answer the submit in time.") from None

    async def _report_to(self, task: Task, attempt: Attempt, url: str) -> ReportTo:
        """Where the job reports to. Only the hash of its token is kept, so a repeated submit brings a new one."""
        token = self._tokens.pop(attempt.job_id, "")
        if not token:
            token = secrets.token_urlsafe(32)
            hashed = token_hash(token)
            await record(self._store, task, lambda task: lifecycle.with_token(task, attempt.number, hashed))
        return ReportTo(f"{url}/{attempt.job_id}", token)

    async def _stop_earlier(self, task: Task, attempt: Attempt, policy: Policy) -> None:
        """Have earlier attempts killed that were given up but may still run. At the site of this attempt that must
        succeed; another site may be gone for good, so it does not hold up this one."""
        earlier = [each for each in lifecycle.running_on(task) if each.site in self._sites]
        if not earlier:
            return
        errors = await asyncio.gather(*(self._kill(each, policy, wait=self._is_up(each, attempt)) for each in earlier))
        for each, error in zip(earlier, errors, strict=True):
            if error is not None and each.site == attempt.site:
                raise error

    def _is_up(self, earlier: Attempt, attempt: Attempt) -> bool:
        """Whether the site of an earlier attempt may answer; of one that is down, no other site's jobs shall wait."""
        return earlier.site == attempt.site or not self._health.of(earlier.site).opened

    async def _kill(self, attempt: Attempt, policy: Policy, *, wait: bool) -> Exception | None:
        """Have a job killed; what went wrong.

        One that takes long stays under way, and the next submit takes up its outcome. Begun anew by each of them, it
        would never arrive.
        """
        kill = self._kills.pop(attempt.job_id, None) or asyncio.create_task(
            self._kill_within(attempt, policy.patience), name=f"kill {attempt.job_id}"
        )
        done, _ = await asyncio.wait([kill], timeout=0.2 * policy.lease if wait else 0.0)
        if done:
            return kill.result()
        self._kills[attempt.job_id] = kill
        if len(self._kills) > MOST_KILLS:  # of tasks that others submit by now
            self._kills.pop(next(iter(self._kills))).cancel()
        return SiteUnavailable(f"The site {attempt.site!r} did not answer the kill of {attempt.job_id} in time.")

    async def _kill_within(self, attempt: Attempt, seconds: float) -> Exception | None:
        try:
            async with asyncio.timeout(seconds):
                await self._sites[attempt.site].cancel(attempt.job_id, force=True)
        except Exception as error:
            log.info("kill of %s: %r", attempt.job_id, error)
            return error
        return None


class _TooLate(Exception):
    """We were too slow; the task is not ours any more."""


def _planned(task: Task, facts: SiteFacts) -> Plan:
    """The plan; a mistake of ours in making it will not go away, so it is no reason to try again."""
    try:
        return plan(task, facts)
    except PlanError:
        raise
    except Exception as error:
        log.exception("planning of %s failed", task.id)
        raise PlanError(f"The service cannot plan this task: {error!r}") from error


def _misfit(task: Task, now: float, reason: str) -> lifecycle.Change | None:
    return lifecycle.give_up(task, now, reason) if task.state is TesState.QUEUED else None


def _unsure(task: Task, attempt: Attempt, now: float, reason: str, policy: Policy) -> lifecycle.Change | None:
    if task.state not in ACTIVE or task.attempt is None or task.attempt.number != attempt.number:
        return None
    return lifecycle.silent(task, now, reason, policy)
