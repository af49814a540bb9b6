"""Due tasks that are not QUEUED: look at their jobs, fulfil cancels, clean up after the end."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace

from tesp_api import lifecycle
from tesp_api.dispatch import loop
from tesp_api.dispatch.health import Health
from tesp_api.errors import SiteClosed, SiteError, StoreUnavailable
from tesp_api.lifecycle import Policy
from tesp_api.record import record, record_tail
from tesp_api.sites import Site
from tesp_api.store import Ring, TaskStore
from tesp_api.task import ACTIVE, Attempt, Observation, Phase, Task, task_of
from tesp_api.tes import TesState, TesView

log = logging.getLogger(__name__)

BATCH = 128

EARLIER_EVERY = 12
"""Looks at a job from one try to end the task's earlier jobs to the next."""

MOST_LOOKS = 200.0
"""Looks per second at one site, above which each job is looked at less often: a look costs us and the site time."""

ALONE = 4.0
"""For how many times as long as a look at its site takes a job is left alone before the next, if it is not young."""

STUCK = 10.0
"""For how many times our patience a look may be under way. At a slow site it can be long before its turn comes, and to
break it off loses that; so this is only against one that hangs for ever."""

COUNT_EVERY = 5.0
"""Seconds after which the jobs of the sites are counted again."""

Submit = Callable[[Task], Awaitable[None]]


class Poller:
    """Looks at due jobs. `submit` repeats a submit whose answer was lost (the dispatcher's)."""

    name = "poller"

    def __init__(
        self,
        store: TaskStore,
        sites: Mapping[str, Site],
        policies: Mapping[str, Policy],
        submit: Submit,
        clock: Callable[[], float] = time.time,
        health: Health | None = None,
    ) -> None:
        self._store = store
        self._sites = sites
        self._policies = policies
        self._lease = min((policy.lease for policy in policies.values()), default=Policy().lease)
        self._submit = submit
        self._clock = clock
        self._health = health or Health(sites, clock)
        self._at_work: set[asyncio.Task[None]] = set()
        self._cleaning: set[tuple[str, bool]] = set()  # tasks that are cleaned up after, and whether they were over
        self._stopping: dict[str, asyncio.Task[None]] = {}  # cancels under way, by job id
        self._asking: set[str] = set()  # jobs of which an answer is awaited
        self._answered: dict[str, float] = defaultdict(lambda: -math.inf)  # when a site last answered a look
        self._took: dict[str, float] = defaultdict(float)  # seconds of a look at a site, the latest ones counting most
        self._calm = dict(policies)
        self._counted: float | None = None

    async def tick(self) -> int:
        """Take what is due and start one look per site; how many tasks were taken."""
        now = self._clock()
        tasks = await self._store.take_due(queued=False, now=now, lease=self._lease, limit=BATCH)
        if tasks and not (self._counted is not None and 0 <= now - self._counted < COUNT_EVERY):
            await self._count(now)
        by_site: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            if task.final:
                self._begin_clean_up(task, lifecycle.unforgotten(task))
            elif task.state is TesState.CANCELING and task.attempt is not None:
                # To cancel can take as long as a submit under way; that must not keep the others waiting.
                self._start(self._look(task.attempt.site, [task]), f"cancel {task.id}")
            elif task.attempt is not None:
                by_site[task.attempt.site].append(task)
        for name, group in by_site.items():
            # A slow or dead site must not keep the others waiting, so each group goes its own way.
            self._start(self._look(name, group), f"look at {name}")
        return len(tasks)

    async def _count(self, now: float) -> None:
        """With many jobs at a site, or a slow one, make the longest pause between two looks at a job longer."""
        loads = await self._store.loads()
        for name, policy in self._policies.items():
            jobs = loads[name].jobs if name in loads else 0
            enough = max(jobs / MOST_LOOKS, ALONE * self._took[name])
            pause = max(policy.poll_interval, min(enough, policy.patience / 3))
            self._calm[name] = replace(policy, poll_interval=pause)
        self._counted = now

    def wakes_on(self) -> Ring:
        """Whatever is under way."""
        return Ring.OPEN

    async def next_due(self) -> float | None:
        """When the next job is to be looked at."""
        return await self._store.next_due(queued=False)

    async def drain(self) -> None:
        """Wait for the looks under way. Cancelled, it ends them."""
        try:
            while self._at_work:
                await asyncio.wait(self._at_work)
        finally:
            await loop.end(self._at_work)

    def _start(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        under_way: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]
        self._at_work.add(under_way)
        under_way.add_done_callback(self._done)
        return under_way

    def _done(self, under_way: asyncio.Task[None]) -> None:
        self._at_work.discard(under_way)
        if not under_way.cancelled() and (error := under_way.exception()) is not None:
            # The lease brings the tasks back; nothing is lost.
            log.error("%s failed", under_way.get_name(), exc_info=error)

    async def _look(self, name: str, tasks: list[Task]) -> None:
        site = self._sites.get(name)
        if site is None:
            reason = f"The site {name!r} is not configured any more."
            policy = next(iter(self._policies.values()), Policy())  # attempts and backoff are the same for all
            for task in tasks:
                await record(self._store, task, lambda task: lifecycle.unreachable(task, self._clock(), reason, policy))
            return
        policy = self._calm[name]
        if policy.poll_interval > self._policies[name].poll_interval:  # what came in one wave must not stay one
            policy = replace(policy, poll_interval=policy.poll_interval * random.uniform(0.75, 1.0))  # noqa: S311
        for task in tasks:
            self._clean_up_earlier(task)
        tasks = [await self._fulfil_cancel(site, task, policy) for task in tasks]
        await self._observe(site, tasks, policy)

    async def _observe(self, site: Site, tasks: list[Task], policy: Policy) -> None:
        """Ask about each job by itself and note each answer as it comes, so that a slow one keeps no other waiting.

        As long as the site answers any, the others only take long, and a look under way is not begun once more.
        """
        jobs = {task.attempt.job_id: task for task in tasks if task.attempt is not None}
        jobs = {job_id: task for job_id, task in jobs.items() if job_id not in self._asking}
        self._freshen(site, jobs)
        name, began = site.facts.name, time.monotonic()
        failed: dict[str, Exception] = {}
        looks = {
            job_id: self._start(self._ask(site, task, job_id, policy, failed), f"look at {job_id}")
            for job_id, task in jobs.items()
        }
        silent = await self._while_it_answers(name, looks, within=0.7 * policy.lease)
        failed.update((job_id, TimeoutError()) for job_id in silent)
        answers = not silent and self._answered[name] >= began
        if failed and not answers:
            self._tell(name, next(iter(failed.values())))
        missed = (self._miss(jobs[job_id], error, policy, answers=answers) for job_id, error in failed.items())
        await asyncio.gather(*missed)

    async def _while_it_answers(
        self, name: str, looks: Mapping[str, asyncio.Task[None]], *, within: float
    ) -> Sequence[str]:
        """Wait for answers until the site has given none at all `within` so many seconds; the jobs that are left then,
        whose looks are ended."""
        asked = list(looks)
        while asked:
            await asyncio.wait([looks[job_id] for job_id in asked], timeout=within)
            asked = [job_id for job_id in asked if job_id in self._asking and not looks[job_id].done()]
            if asked and self._answered[name] < time.monotonic() - within:
                await loop.end(looks[job_id] for job_id in asked)
                break
        return asked

    def _freshen(self, site: Site, jobs: Mapping[str, Task]) -> None:
        now = self._clock()
        watched = [job_id for job_id, task in jobs.items() if task.attempt and lifecycle.is_watched(task.attempt, now)]
        if watched:
            site.freshen(watched)

    async def _ask(
        self, site: Site, task: Task, job_id: str, policy: Policy, failed: MutableMapping[str, Exception]
    ) -> None:
        """Look at one job and note what is seen, or put into `failed` why nothing could be."""
        name, began = site.facts.name, time.monotonic()
        self._asking.add(job_id)
        try:
            async with asyncio.timeout(STUCK * policy.patience):
                found = await site.observe([job_id])
        except (SiteError, TimeoutError) as error:
            failed[job_id] = error
            return
        except Exception as error:
            log.exception("looking at %s failed", job_id)
            await self._be_patient(task, f"The service failed: {error!r}", policy)
            return
        finally:
            self._asking.discard(job_id)
        self._answered[name] = now = time.monotonic()
        self._took[name] += 0.1 * (now - began - self._took[name])
        self._health.answers(name)
        await self._note_safely(task, found[0] if found else Observation(job_id=job_id, phase=Phase.UNKNOWN), policy)

    async def _miss(self, task: Task, error: Exception, policy: Policy, *, answers: bool) -> None:
        """Nothing was learned of a job. If its site `answers` about others, what it fails to tell of shows no sign of
        life, and what only takes long is left to its next look."""
        if not answers:
            await self._be_patient(task, str(error) or "It did not answer in time.", policy)
        elif isinstance(error, SiteError) and task.attempt is not None:
            seen = Observation(job_id=task.attempt.job_id, phase=Phase.RUNNING, detail=str(error))
            await self._note_safely(task, seen, policy)

    def _tell(self, name: str, error: Exception) -> None:
        """A site that could not be asked may still take jobs, but not if that goes on, or if it does not let us in."""
        if isinstance(error, SiteClosed):
            self._health.refused(name, str(error))
        else:
            self._health.silent(name, str(error) or "It did not answer in time.")

    async def _be_patient(self, task: Task, reason: str, policy: Policy) -> None:
        await record(self._store, task, lambda task: _silent(task, self._clock(), reason, policy))

    async def _fulfil_cancel(self, site: Site, task: Task, policy: Policy) -> Task:
        """Have the site asked to stop the job if it is time; the task as it is then.

        What takes long stays under way beside the looks that follow. Begun anew by each of them, it would never arrive.
        """
        force = lifecycle.must_stop(task, self._clock(), policy)
        if force is None or task.attempt is None:
            return task
        job_id = task.attempt.job_id
        if job_id not in self._stopping:
            stop = self._start(self._stop(site, task, job_id, force, policy), f"stop {job_id}")
            self._stopping[job_id] = stop
            stop.add_done_callback(lambda _: self._stopping.pop(job_id, None))
        done, _ = await asyncio.wait([self._stopping[job_id]], timeout=0.2 * policy.lease)
        return (await self._store.get(task.id, TesView.BASIC) or task) if done else task

    async def _stop(self, site: Site, task: Task, job_id: str, force: bool, policy: Policy) -> None:
        began = self._clock()
        try:
            async with asyncio.timeout(policy.patience):
                await site.cancel(job_id, force=force)
        except Exception as error:
            if isinstance(error, SiteError | TimeoutError):
                log.info("cancel of %s: %s", job_id, str(error) or "no answer in time")
            else:
                log.exception("cancel of %s failed", job_id)
            await record(self._store, task, lambda task: lifecycle.could_not_stop(task, began))
        else:
            await record(self._store, task, lambda task: lifecycle.asked_to_stop(task, self._clock()))

    async def _note_safely(self, task: Task, seen: Observation, policy: Policy) -> None:
        """A mistake of ours about one task must not stop the others; if it stays, patience ends the task."""
        try:
            await self._note(task, seen, policy)
        except StoreUnavailable as error:
            log.warning("%s: %s", seen.job_id, error)  # the lease brings the task back
        except Exception as error:
            log.exception("noting what %s does failed", seen.job_id)
            with suppress(StoreUnavailable):  # as above; and no loop that listens to a site may end by it
                await self._be_patient(task, f"The service failed: {error!r}", policy)

    async def _note(self, task: Task, seen: Observation, policy: Policy) -> None:
        attempt = task.attempt
        if (
            seen.phase is Phase.UNKNOWN
            and seen.result is None
            and task.state is TesState.INITIALIZING
            and attempt is not None
            and attempt.job_id == seen.job_id
            and attempt.submitted is None
        ):
            await self._submit(task)  # the submit was lost, or we were killed before it
            return
        await record_tail(self._store, task, seen)
        if attempt is not None and seen.result is None and seen.exit_code in lifecycle.NO_PYTHON:
            self._health.refused(attempt.site, lifecycle.NO_PYTHON[seen.exit_code], lame=True)
        elif attempt is not None and lifecycle.has_begun(seen):
            self._health.began(attempt.site)
        now = self._clock()
        await record(self._store, task, lambda task: lifecycle.observed(task, seen, now, policy), aside=seen.long)

    async def note(self, site: str, seen: Observation) -> None:
        """Take an observation that a site has pushed; one that is of no use is dropped, since polling finds it too.

        A site has a say about its own jobs only: it can guess the ids of those that others got after it.
        """
        try:
            task_id, _ = task_of(seen.job_id)
            task = await self._store.get(task_id, TesView.BASIC)
        except ValueError:
            return
        except StoreUnavailable as error:
            log.warning("%s: %s", seen.job_id, error)
            return
        if task is not None and task.attempt is not None and task.attempt.site == site:
            await self._note_safely(task, seen, self._policies[site])

    def _clean_up_earlier(self, task: Task) -> None:
        """Beside a look now and then: end what was given up, as soon as its site answers again."""
        now_and_then = task.attempt is not None and task.attempt.looks % EARLIER_EVERY == 0
        if now_and_then and (earlier := lifecycle.running_on(task)):
            self._begin_clean_up(task, earlier)

    def _begin_clean_up(self, task: Task, attempts: Sequence[Attempt]) -> None:
        """Unless it is under way: where it takes longer than a lease, each of these would begin it once more."""
        key = task.id, task.final
        if key not in self._cleaning:
            self._cleaning.add(key)
            under_way = self._start(self._forget_all(task, attempts), f"clean up {task.id}")
            under_way.add_done_callback(lambda _: self._cleaning.discard(key))

    async def _forget_all(self, task: Task, attempts: Sequence[Attempt]) -> None:
        done = frozenset([each.number for each in attempts if await self._forget(each)])
        policy = self._policies.get(task.attempts[-1].site, Policy()) if task.attempts else Policy()
        for _ in range(max(1, len(done))):
            await record(self._store, task, lambda task: lifecycle.forgotten(task, done, self._clock(), policy))

    async def _forget(self, attempt: Attempt) -> bool:
        site = self._sites.get(attempt.site)
        if site is None:
            return True  # a site that is configured no more is its admin's to clean
        late = attempt.ended is not None and self._clock() - attempt.ended > 30
        try:
            async with asyncio.timeout(site.facts.patience):
                if attempt.abandoned:  # each time: a kill that did not arrive would leave the job running
                    await site.cancel(attempt.job_id, force=True)
                return await site.forget(attempt.job_id, force=late)
        except (SiteError, TimeoutError) as error:
            log.info("clean-up of %s: %s", attempt.job_id, str(error) or "no answer in time")
            return False
        except Exception:
            log.exception("clean-up of %s failed", attempt.job_id)
            return False


def _silent(task: Task, now: float, reason: str, policy: Policy) -> lifecycle.Change | None:
    if task.state not in ACTIVE or task.attempt is None:
        return None
    return lifecycle.silent(task, now, reason, policy)
