"""Dispatcher and poller over a real store and a site double, moved by hand: no loops, no real time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tesp_api import lifecycle
from tesp_api.dispatch import loop
from tesp_api.dispatch.dispatcher import Dispatcher
from tesp_api.dispatch.health import Health
from tesp_api.dispatch.inspector import Inspector
from tesp_api.dispatch.keeper import Keeper
from tesp_api.dispatch.poller import Poller
from tesp_api.errors import SiteRefused, SiteUnavailable, StoreUnavailable
from tesp_api.lifecycle import Change, Policy
from tesp_api.runner.job import FileRoot, Plan
from tesp_api.sites import SiteFacts
from tesp_api.store import Bell, Query, Ring
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Attempt, Observation, Phase, Task, token_hash
from tesp_api.tes import TesState as S
from tesp_api.tes import TesView
from tests.builders import NOW, make_task
from tests.doubles import SiteDouble, down

POLICY = Policy(lease=30, patience=300, poll_interval=5, cancel_grace=10, max_attempts=3, backoff=5)


class World:
    """One store, some sites, a clock that only the test moves, and what moves tasks."""

    def __init__(self, store: SqliteStore, *facts: SiteFacts) -> None:
        self.store, self.now = store, NOW
        self.sites = {each.name: SiteDouble(each) for each in facts or (SiteFacts(name="a"),)}
        self.site = next(iter(self.sites.values()))
        self.restart()

    def restart(self, **policy: Any) -> None:
        """A new service takes over, with `policy` changed; what the old one had in memory is gone."""
        policies = dict.fromkeys(self.sites, replace(POLICY, **policy))
        self.health = Health(self.sites, self.clock)
        self.dispatcher = Dispatcher(self.store, self.sites, policies, self.clock, self.health)
        self.poller = Poller(self.store, self.sites, policies, self.dispatcher.submit, self.clock, self.health)
        self.inspector = Inspector(self.store, self.sites, self.health, self.clock)
        self.keeper = Keeper(self.store, policies=policies.values(), clock=self.clock)

    def clock(self) -> float:
        return self.now

    async def add(self, count: int = 1, **fields: Any) -> list[Task]:
        tasks = [make_task(now=self.now, **fields) for _ in range(count)]
        await asyncio.gather(*(self.store.add(task) for task in tasks))
        return tasks

    async def step(self, seconds: float = 0.2) -> None:
        """All tick until nothing is due, then time passes."""
        await self.inspector.tick()
        await self.inspector.wait()
        for _ in range(20):
            moved = await self.keeper.tick()
            moved += await self.dispatcher.tick()
            await self.dispatcher.drain()
            moved += await self.poller.tick()
            await self.poller.drain()
            await self.dispatcher.drain()
            if not moved:
                break
        self.now += seconds

    async def get(self, task: Task) -> Task:
        found = await self.store.get(task.id, TesView.FULL)
        assert found is not None
        return found

    async def state(self, task: Task) -> S:
        return (await self.get(task)).state

    async def lines(self, task: Task) -> str:
        bodies = (await self.get(task)).bodies
        assert bodies is not None
        return " ".join(line for lines in bodies.system.values() for line in lines)

    async def cancel(self, task: Task) -> None:
        while True:
            current = await self.get(task)
            change = lifecycle.cancel(current, self.now)
            if change is None or await self.store.apply(task.id, change) is not None:
                return

    async def until_final(self, task: Task, *, step: float = 5.0, steps: int = 200) -> Task:
        for _ in range(steps):
            await self.step(step)
            if (found := await self.get(task)).final:
                return found
        raise AssertionError(f"{await self.state(task)} for ever")


class SlowToCancel(SiteDouble):
    """A site at which cancels arrive only when the test lets them."""

    def __init__(self, facts: SiteFacts) -> None:
        super().__init__(facts)
        self.arrive = asyncio.Event()

    async def cancel(self, job_id: str, *, force: bool = False) -> None:
        self.calls.append(("begun", job_id))
        await self.arrive.wait()
        await super().cancel(job_id, force=force)


def last_attempt(task: Task) -> Attempt:
    assert task.attempt is not None
    return task.attempt


def on(
    *facts: SiteFacts,
) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Run an async test in a world with these sites."""

    def decorate(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                async with SqliteStore(":memory:") as store:
                    await test(World(store, *facts))

            asyncio.run(main())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


@on()
async def test_a_task_runs(world: World) -> None:
    (task,) = await world.add(inputs=[{"path": "/x", "content": "c"}])
    await world.step()
    assert await world.state(task) is S.INITIALIZING
    assert [each.content for each in world.site.job().plan.inputs] == ["c"]
    world.site.job().run()
    await world.step()
    assert await world.state(task) is S.RUNNING
    world.site.job().end()
    await world.step(1)
    assert await world.state(task) is S.COMPLETE
    await world.step()
    assert world.site.forgotten == [f"{task.id}-1"]
    assert (await world.get(task)).due_at is None
    assert sum(world.site.submits.values()) == 1
    assert not any(call in ("cancel", "kill") for call, _ in world.site.calls)


@on(SiteFacts(name="a", file_roots=(FileRoot("/data"),)))
async def test_content_beside_a_url_wins(world: World) -> None:
    await world.add(inputs=[{"path": "/x", "content": "c", "url": "file:///etc/shadow"}])
    await world.step()
    assert [(each.content, each.url) for each in world.site.job().plan.inputs] == [("c", None)]


@on(SiteFacts(name="a", max_jobs=7), SiteFacts(name="b", max_jobs=3), SiteFacts(name="c", cpus=5.0))
async def test_capacity_is_never_exceeded(world: World) -> None:
    tasks = await world.add(100, resources={"cpu_cores": 2, "ram_gb": 1})
    for _ in range(60):
        await world.step(1.1)
        for site in world.sites.values():
            for each in site.active[:3]:
                each.run()
                each.end()
    assert {await world.state(task) for task in tasks} == {S.COMPLETE}
    assert (world.sites["a"].most, world.sites["b"].most) == (7, 3)
    assert world.sites["c"].most_cpus == 4.0
    assert all(set(site.submits.values()) == {1} for site in world.sites.values())


@on(SiteFacts(name="a", ram_gb=4.0))
async def test_no_room_keeps_the_place_in_the_queue(world: World) -> None:
    tasks = await world.add(3, resources={"ram_gb": 3})
    for task in tasks:
        await world.step(1.1)
        assert await world.state(task) is S.INITIALIZING
        world.site.jobs[f"{task.id}-1"].end()
    await world.step(1.1)
    assert await world.state(tasks[-1]) is S.COMPLETE


@on(SiteFacts(name="a", cpus=1.0))
async def test_a_full_site_does_not_keep_the_loop_busy(world: World) -> None:
    """Tasks that find no room are put back, which rings the bell: that must not start the next round."""
    await world.add(5, resources={"cpu_cores": 1})
    await world.step(0)
    before = [task.version for task in (await world.store.page(Query())).tasks]
    for _ in range(10):
        assert await world.dispatcher.tick() == 0
        assert await world.dispatcher.next_due() is None
    assert [task.version for task in (await world.store.page(Query())).tasks] == before
    world.site.job().end()
    world.now += 0.2
    await world.step(0)
    assert len(world.site.submits) == 2, "at once, without waiting for the pause"


@on(SiteFacts(name="a", cpus=2.0), SiteFacts(name="b", ram_gb=1.0))
async def test_what_fits_nowhere_is_said(world: World) -> None:
    (task,) = await world.add(resources={"cpu_cores": 3, "ram_gb": 2})
    await world.step()
    assert await world.state(task) is S.SYSTEM_ERROR
    assert "'a' has 2 CPUs" in await world.lines(task)
    assert "'b' has 1 GB" in await world.lines(task)
    assert (await world.get(task)).due_at is None


@on()
async def test_what_cannot_be_planned_is_said(world: World) -> None:
    (task,) = await world.add(inputs=[{"path": "/x", "url": "/etc/shadow"}])
    (odd,) = await world.add(inputs=[{"path": "/x", "url": "http://[broken"}])
    await world.step()
    assert await world.state(task) is S.SYSTEM_ERROR
    assert "inputs[0].url" in await world.lines(task)
    assert await world.state(odd) is S.INITIALIZING, "the node says what is wrong with it"
    assert len(world.site.submits) == 1


@on()
async def test_a_site_that_is_down_is_waited_for(world: World) -> None:
    world.site.trouble = down
    (task,) = await world.add()
    for _ in range(20):
        await world.step(5)
    assert await world.state(task) is S.INITIALIZING
    world.site.trouble = lambda call, job_id: None
    await world.step(5)
    await world.step(5)
    assert list(world.site.jobs) == [f"{task.id}-1"]
    world.site.job().end()
    assert (await world.until_final(task)).state is S.COMPLETE


@on()
async def test_a_site_that_stays_down_exhausts_patience(world: World) -> None:
    world.site.trouble = down
    (task,) = await world.add()
    for _ in range(200):
        await world.step(5)
    assert await world.state(task) is S.QUEUED, "for as long as it takes"
    assert (await world.lines(task)).count("silent for") == 2, "half-way and in the end"
    assert (await world.lines(task)).count("The task waits: the site 'a' takes no jobs now. connection refused") == 1
    assert list(world.site.submits) == [f"{task.id}-1"], "no other job while nobody knows whether the first one runs"
    world.site.trouble = lambda call, job_id: None
    for _ in range(4):
        await world.step(5)
    assert list(world.site.submits) == [f"{task.id}-1", f"{task.id}-2"]


@on()
async def test_a_job_given_up_while_the_site_was_down_is_killed_when_it_is_back(world: World) -> None:
    world.restart(max_attempts=1)
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    await world.step()
    world.site.trouble = down
    await world.until_final(task)
    for _ in range(20):
        await world.step(30)
    world.site.trouble = lambda call, job_id: None
    running = world.site.job()
    for _ in range(30):
        await world.step(60)
    assert running.killed, "else its containers would run on"
    assert world.site.forgotten == [f"{task.id}-1"]
    assert await world.state(task) is S.SYSTEM_ERROR


@on()
async def test_a_lost_answer_is_asked_again_under_the_same_id(world: World) -> None:
    world.site.lose_answers = True
    (task,) = await world.add()
    await world.step()
    world.site.lose_answers = False
    await world.step(1)
    assert list(world.site.jobs) == [f"{task.id}-1"]
    world.site.job().end()
    assert (await world.until_final(task)).state is S.COMPLETE
    assert len((await world.get(task)).attempts) == 1


@on()
async def test_a_lost_submit_is_repeated_under_the_same_id(world: World) -> None:
    world.site.trouble = lambda call, job_id: SiteUnavailable("reset") if call == "submit" else None
    (task,) = await world.add()
    await world.step()
    assert world.site.jobs == {}
    world.site.trouble = lambda call, job_id: None
    for _ in range(5):
        await world.step(1)
    assert list(world.site.jobs) == [f"{task.id}-1"]
    assert set(world.site.submits) == {f"{task.id}-1"}


@on()
async def test_killed_between_the_note_and_the_submit(world: World) -> None:
    (task,) = await world.add()
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    assert await world.store.apply(task.id, lifecycle.assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    world.restart()
    await world.step(15)
    assert world.site.submits == {}, "another process may be about to submit"
    await world.step(16)
    await world.step(0)
    assert world.site.submits == {f"{task.id}-1": 1}
    world.site.job().end()
    assert (await world.until_final(task)).state is S.COMPLETE


@on()
async def test_killed_between_the_take_and_the_note(world: World) -> None:
    (task,) = await world.add()
    await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    world.restart()
    await world.step(31)
    assert world.site.submits == {}
    await world.step()
    assert world.site.submits == {f"{task.id}-1": 1}


@on()
async def test_killed_between_the_submit_and_its_note(world: World) -> None:
    world.site.gate = asyncio.Event()
    (task,) = await world.add()
    await world.dispatcher.tick()
    old = world.dispatcher
    world.restart()
    world.site.gate.set()
    await old.drain()
    await world.step(31)
    await world.step(0)
    assert list(world.site.jobs) == [f"{task.id}-1"]
    assert world.site.submits[f"{task.id}-1"] == 1


@on()
async def test_a_process_that_slept_through_its_lease_does_not_submit(world: World) -> None:
    (task,) = await world.add()
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    assigned = await world.store.apply(task.id, lifecycle.assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    assert assigned is not None
    world.now += 29
    await world.dispatcher.submit(assigned)
    assert world.site.submits == {}


@on(SiteFacts(name="a", max_jobs=1))
async def test_the_clock_is_set_back(world: World) -> None:
    """What runs is looked at, and what waits is sent, though they are due only an hour later by the new time."""
    first, second, third = await world.add(3)
    await world.step(1)
    world.site.job().run()
    await world.step(6)
    world.now -= 3600
    world.site.job().end()
    await world.step(1)
    await world.step(1)
    assert await world.state(first) is S.COMPLETE
    assert [await world.state(each) for each in (second, third)].count(S.QUEUED) == 1


@on(SiteFacts(name="a", max_jobs=5))
async def test_two_pairs_share_the_work(world: World) -> None:
    """A second pair takes over mid-way, both go on: nothing is submitted twice."""
    tasks = await world.add(20)
    await world.step(1)
    first = (world.dispatcher, world.poller)
    world.restart()
    for _ in range(30):
        ticks = [first[0].tick(), world.dispatcher.tick(), first[1].tick(), world.poller.tick()]
        await asyncio.gather(*ticks)
        for each in (*first, world.dispatcher, world.poller):
            await each.drain()
        for running in world.site.active:
            running.end()
        world.now += 6
    assert {await world.state(task) for task in tasks} == {S.COMPLETE}
    assert set(world.site.submits.values()) == {1}
    assert len(world.site.submits) == 20


# Cancel


@on()
async def test_cancel_of_a_queued_task(world: World) -> None:
    (task,) = await world.add()
    await world.cancel(task)
    await world.step(100)
    assert await world.state(task) is S.CANCELED
    assert world.site.calls == []


@on()
async def test_cancel_of_a_running_job(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    await world.step()
    await world.cancel(task)
    await world.step()
    assert await world.state(task) is S.CANCELING
    assert (world.site.job().asked_to_stop, world.site.job().killed) == (True, False)
    world.site.job().end("CANCELED")
    await world.step()
    assert await world.state(task) is S.CANCELED
    await world.step()
    assert world.site.forgotten == [f"{task.id}-1"]


@on()
async def test_a_job_that_does_not_heed_the_cancel_is_killed(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    await world.cancel(task)
    done = await world.until_final(task, step=1)
    assert done.state is S.CANCELED
    assert 10 < world.now - NOW < 30
    assert "kill" in [call for call, _ in world.site.calls]


@on()
async def test_cancel_during_the_submit(world: World) -> None:
    """The job arrives after the cancel: it is stopped, and CANCELED is not claimed before."""
    world.site.gate = asyncio.Event()
    (task,) = await world.add()
    await world.dispatcher.tick()
    await asyncio.sleep(0)
    await world.cancel(task)
    await world.poller.tick()
    await world.poller.drain()
    assert await world.state(task) is S.CANCELING
    world.site.gate.set()
    await world.dispatcher.drain()
    arrived = world.site.job()
    arrived.run()
    assert (await world.until_final(task, step=1)).state is S.CANCELED
    assert arrived.killed
    assert world.site.submits == {f"{task.id}-1": 1}


@on()
async def test_cancel_between_the_note_and_a_submit_that_never_comes(world: World) -> None:
    (task,) = await world.add()
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    await world.store.apply(task.id, lifecycle.assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    world.restart()
    await world.cancel(task)
    assert (await world.until_final(task, step=1)).state is S.CANCELED
    assert world.site.submits == {}


@on()
async def test_cancel_of_what_the_site_refuses(world: World) -> None:
    world.site.gate = asyncio.Event()
    world.site.trouble = lambda call, job_id: SiteRefused("No such image.") if call == "submit" else None
    (task,) = await world.add()
    await world.dispatcher.tick()
    await world.cancel(task)
    world.site.gate.set()
    await world.dispatcher.drain()
    assert await world.state(task) is S.CANCELED


@on()
async def test_cancel_after_the_end(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.job().end()
    await world.step()
    await world.cancel(task)
    assert await world.state(task) is S.COMPLETE


@on()
async def test_a_cancel_that_no_site_hears_is_not_called_canceled(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    await world.step()
    world.site.trouble = down
    await world.cancel(task)
    assert (await world.until_final(task)).state is S.SYSTEM_ERROR


@on()
async def test_a_cancel_that_hangs_holds_up_nobody(world: World) -> None:
    (stuck,) = await world.add()
    (other,) = await world.add()
    await world.step()
    hanging = asyncio.Event()

    class Hanging(SiteDouble):
        async def cancel(self, job_id: str, *, force: bool = False) -> None:
            await hanging.wait()

    site = Hanging(world.site.facts)
    site.jobs = world.site.jobs
    world.sites["a"] = site
    world.restart()
    site.jobs[f"{other.id}-1"].end()
    await world.cancel(stuck)
    world.now += 5
    await world.poller.tick()
    async with asyncio.timeout(5):
        while await world.state(other) is not S.COMPLETE:
            await asyncio.sleep(0)
    hanging.set()
    await world.poller.drain()


@pytest.mark.parametrize("call", ["submit", "observe"])
def test_a_stop_that_waits_no_longer_ends_what_is_under_way(call: str) -> None:
    """Left alone, it would go on while the site is being closed, and write that the site failed."""

    @on()
    async def go(world: World) -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        class Hanging(SiteDouble):
            async def submit(self, plan: Plan) -> None:
                await (hang() if call == "submit" else super().submit(plan))

            async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
                await hang()
                return []

        world.sites["a"] = Hanging(world.site.facts)
        world.restart()
        (task,) = await world.add()
        await world.dispatcher.tick()
        if call == "observe":
            await world.dispatcher.drain()
            world.now += 1
            await world.poller.tick()
        async with asyncio.timeout(60):
            await begun.wait()
        before = await world.get(task)
        stop = asyncio.gather(world.dispatcher.drain(), world.poller.drain())
        await asyncio.sleep(0)
        stop.cancel()
        async with asyncio.timeout(60):
            await asyncio.gather(stop, return_exceptions=True)
            await ended.wait()
            await asyncio.gather(world.dispatcher.drain(), world.poller.drain())  # nothing is left
        assert await world.get(task) == before, "the lease brings it back"

    go()


@on()
async def test_a_cancel_that_takes_long_is_asked_once_and_arrives(world: World) -> None:
    """Slower than the looks: begun anew by each of them, it would never come to its end."""
    (task,) = await world.add()
    await world.step()
    site = SlowToCancel(world.site.facts)
    site.jobs = world.site.jobs
    world.sites["a"] = site
    world.restart(lease=0.05)
    site.job().run()
    await world.cancel(task)
    job_id = f"{task.id}-1"
    for _ in range(3):
        world.now += 5
        await world.poller.tick()
        looks = site.calls.count(("observe", job_id))
        async with asyncio.timeout(60):
            while site.calls.count(("observe", job_id)) == looks:
                await asyncio.sleep(0.001)
    assert site.calls.count(("begun", job_id)) == 1
    assert last_attempt(await world.get(task)).cancels == 0
    site.arrive.set()
    await world.poller.drain()
    assert last_attempt(await world.get(task)).cancels == 1
    site.job().end("CANCELED")
    assert (await world.until_final(task)).state is S.CANCELED


@on()
async def test_a_job_that_cannot_be_asked_to_stop_is_killed(world: World) -> None:
    """As by mail, where asking gently needs a small job at the site, for which there may be no room for long."""
    (task,) = await world.add()
    await world.step()
    job = world.site.job()
    job.run()
    world.site.trouble = lambda call, job_id: SiteUnavailable("no room") if call == "cancel" else None
    await world.cancel(task)
    assert (await world.until_final(task, step=1)).state is S.CANCELED
    assert 10 < world.now - NOW < 30
    assert job.killed


@on()
async def test_a_job_that_stopped_as_asked_while_the_service_was_down_is_canceled(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    await world.step()
    await world.cancel(task)
    await world.step()
    assert last_attempt(await world.get(task)).cancels == 1
    world.site.job().end("CANCELED")
    world.now += 3600
    world.restart()
    await world.step()
    assert await world.state(task) is S.CANCELED


@on()
async def test_after_an_outage_the_site_is_asked_once_more_to_stop_the_job(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    job = world.site.job()
    job.run()
    await world.step()
    await world.cancel(task)
    await world.step()
    world.now += 3600
    world.restart()
    world.site.trouble = lambda call, job_id: SiteUnavailable("It starts.") if call == "observe" else None
    await world.step()
    assert job.killed
    world.site.trouble = lambda call, job_id: None
    assert (await world.until_final(task, step=1)).state is S.CANCELED


# Somebody looks


@on()
async def test_the_look_for_one_who_looks_is_a_fresh_one(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    for _ in range(40):
        await world.step(5)
    job_id = f"{task.id}-1"
    assert ("freshen", job_id) not in world.site.calls
    current = await world.get(task)
    change = lifecycle.look_now(current, world.now - 3)
    assert change is not None
    assert await world.store.apply(task.id, change) is not None
    world.now -= 3
    looks = world.site.calls.count(("observe", job_id))
    await world.step()
    assert world.site.calls[-2:] == [("freshen", job_id), ("observe", job_id)]
    assert world.site.calls.count(("observe", job_id)) == looks + 1


@on()
async def test_a_young_job_is_looked_at_freshly_too(world: World) -> None:
    """The pauses between its looks are short, but where looking is dear, they bring nothing new by themselves."""
    (task,) = await world.add()
    await world.step()
    world.site.job().run()
    await world.step()
    current = await world.get(task)
    assert current.due_at is not None
    assert current.due_at - world.now <= 1
    change = lifecycle.look_now(current, world.now)
    assert change is not None
    await world.store.apply(task.id, change)
    await world.step(1)
    await world.step()
    assert ("freshen", f"{task.id}-1") in world.site.calls


# Tokens


@on(SiteFacts(name="a", report_url="http://tes/jobs"))
async def test_each_submit_has_a_token_of_which_only_the_hash_is_kept(world: World) -> None:
    (task,) = await world.add()
    seen: list[Plan] = []

    class Forgetful(SiteDouble):
        async def submit(self, plan: Plan) -> None:
            seen.append(plan)
            if len(seen) < 3:
                raise SiteUnavailable("no answer")
            await super().submit(plan)

    world.sites["a"] = site = Forgetful(world.site.facts)
    world.restart()
    for _ in range(20):
        await world.step(5)
        if site.jobs:
            break
    reports = [each.report for each in seen]
    assert len(reports) == 3
    assert {each.url for each in reports if each} == {f"http://tes/jobs/{task.id}-1"}
    tokens = [each.token for each in reports if each]
    assert len(set(tokens)) == 3
    assert min(map(len, tokens)) >= 43
    assert last_attempt(await world.get(task)).tokens == tuple(map(token_hash, tokens))


@on()
async def test_without_an_address_nobody_is_to_report(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    assert world.site.job().plan.report is None
    assert last_attempt(await world.get(task)).tokens == ()


# Slow sites


class Slow(SiteDouble):
    """Answers to looks at the jobs in `held` wait for `release`; each look takes `seconds`."""

    def __init__(self, site: SiteDouble, *held: str, seconds: float = 0.0) -> None:
        super().__init__(site.facts)
        self.jobs, self.held, self.seconds = site.jobs, held, seconds
        self.release, self.ended = asyncio.Event(), 0

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        seen = await super().observe(job_ids)
        try:
            await asyncio.sleep(self.seconds)
            if set(job_ids) & set(self.held):
                await self.release.wait()
        finally:
            self.ended += 1
        return seen


async def until_state(world: World, task: Task, state: S) -> None:
    async with asyncio.timeout(60):
        while await world.state(task) is not state:
            await asyncio.sleep(0)


@on()
async def test_a_look_that_takes_long_holds_up_no_other_and_is_not_begun_again(world: World) -> None:
    """As with a big result. It is noted when it comes, be that after the lease."""
    slow, quick = await world.add(2)
    await world.step()
    held = f"{slow.id}-1"
    world.sites["a"] = site = Slow(world.site, held)
    world.restart()
    for each in site.jobs.values():
        each.end()
    assert await world.poller.tick() == 2
    await until_state(world, quick, S.COMPLETE)
    for _ in range(3):
        world.now += POLICY.lease + 1
        assert await world.poller.tick() > 0
        await asyncio.sleep(0)
    assert site.calls.count(("observe", held)) == 1
    found = await world.get(slow)
    assert (found.state, last_attempt(found).vain, await world.lines(slow)) == (S.INITIALIZING, None, "")
    assert world.health.of("a").failures == 0
    site.release.set()
    await world.poller.drain()
    assert await world.state(slow) is S.COMPLETE
    assert sum(world.site.submits.values()) == 2


@on()
async def test_a_job_that_a_site_cannot_tell_about_is_no_sign_that_the_site_is_away(world: World) -> None:
    odd, other = await world.add(2)
    await world.step()
    for each in world.site.jobs.values():
        each.run()
    world.site.trouble = lambda call, job_id: SiteUnavailable("500") if job_id == f"{odd.id}-1" else None
    await world.step()
    assert world.health.of("a").failures == 0
    assert last_attempt(await world.get(odd)).vain is not None
    assert (await world.lines(odd), await world.state(other)) == ("", S.RUNNING)
    for _ in range(100):
        world.site.jobs[f"{other.id}-1"].beat += 1
        await world.step(5)
    assert "no sign of life" in await world.lines(odd)
    assert len((await world.get(other)).attempts) == 1


@on()
async def test_a_site_that_answers_nobody_is_silent(world: World) -> None:
    """Once for the whole round, and its looks are ended: the next ones begin anew."""
    tasks = await world.add(5)
    await world.step()
    world.sites["a"] = site = Slow(world.site, *world.site.jobs)
    world.restart(lease=0.05)
    assert await world.poller.tick() == 5
    async with asyncio.timeout(60):
        await world.poller.drain()
    assert site.ended == 5
    assert world.health.of("a").failures == 1
    for task in tasks:
        assert "did not answer in time" in await world.lines(task)
        assert last_attempt(await world.get(task)).vain == world.now
    world.now += 1
    site.release.set()
    assert await world.poller.tick() == 5
    await world.poller.drain()
    assert site.ended == 10


@on()
async def test_jobs_at_a_slow_site_are_looked_at_less_often(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.sites["a"] = Slow(world.site, seconds=0.1)
    world.restart(poll_interval=0.001)
    world.site.job().run()
    for _ in range(2):
        world.now += 60
        assert await world.poller.tick() == 1
        await world.poller.drain()
    due_at = (await world.get(task)).due_at
    assert due_at is not None
    assert due_at - world.now > 0.02


# Trouble


@on()
async def test_observing_fails_for_a_while(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.site.trouble = lambda call, job_id: SiteUnavailable("500") if call == "observe" else None
    for _ in range(10):
        await world.step(5)
    assert await world.state(task) is S.INITIALIZING
    world.site.trouble = lambda call, job_id: None
    world.site.job().end()
    assert (await world.until_final(task)).state is S.COMPLETE


@pytest.mark.parametrize("trouble", [True, False], ids=["a look that fails", "a look without a beat"])
def test_an_outage_of_the_service_ends_no_job(trouble: bool) -> None:
    @on()
    async def main(world: World) -> None:
        (task,) = await world.add()
        await world.step()
        world.site.job().run()
        await world.step()
        world.now += 3600
        world.restart()
        if trouble:
            world.site.trouble = down
        await world.step(5)
        assert await world.state(task) is S.RUNNING
        world.site.trouble = lambda call, job_id: None
        world.site.job().beat += 1000
        await world.step(5)
        assert (last_attempt(await world.get(task)).heard or 0) > NOW + 3600
        world.site.job().end()
        assert (await world.until_final(task)).state is S.COMPLETE
        assert sum(world.site.submits.values()) == 1

    main()


@on()
async def test_forget_is_repeated_until_it_works(world: World) -> None:
    world.site.trouble = lambda call, job_id: SiteUnavailable("no") if call == "forget" else None
    (task,) = await world.add()
    await world.step()
    world.site.job().end()
    for _ in range(5):
        await world.step(2)
    assert (await world.get(task)).due_at is not None
    world.site.trouble = lambda call, job_id: None
    for _ in range(5):
        await world.step(700)
    assert world.site.forgotten == [f"{task.id}-1"]
    assert (await world.get(task)).due_at is None


@on()
async def test_a_clean_up_that_takes_long_is_begun_once(world: World) -> None:
    arrive = asyncio.Event()

    class Slow(SiteDouble):
        async def forget(self, job_id: str, *, force: bool = False) -> bool:
            self.calls.append(("begun", job_id))
            await arrive.wait()
            return await super().forget(job_id, force=force)

    site = Slow(world.site.facts)
    world.sites["a"] = site
    world.restart()
    (task,) = await world.add()
    await world.dispatcher.tick()
    await world.dispatcher.drain()
    site.job().end()
    await world.poller.note("a", site.job().seen())
    for _ in range(5):
        assert await world.poller.tick() == 1
        await asyncio.sleep(0)
        world.now += 2 * POLICY.lease
    assert site.calls.count(("begun", f"{task.id}-1")) == 1
    arrive.set()
    await world.poller.drain()
    assert site.forgotten == [f"{task.id}-1"]
    assert (await world.get(task)).due_at is None


@pytest.mark.parametrize(
    ("code", "started", "attempts"),
    [(2, False, 2), (76, False, 2), (1, False, 2), (1, True, 2), (137, False, 2), (0, False, 2)],
)
def test_a_job_that_ends_without_a_result(code: int, started: bool, attempts: int) -> None:
    @on()
    async def main(world: World) -> None:
        (task,) = await world.add()
        await world.step()
        if started:
            world.site.job().run()
            await world.step()
        world.site.job().exit(code)
        for _ in range(6):
            await world.step(5)
        found = await world.get(task)
        assert [each.number for each in found.attempts] == list(range(1, attempts + 1))
        assert set(world.site.submits) == {each.job_id for each in found.attempts}
        world.site.jobs[f"{task.id}-2"].end()
        assert (await world.until_final(task)).state is S.COMPLETE
        for _ in range(3):
            await world.step(1)
        assert sorted(set(world.site.forgotten)) == [f"{task.id}-1", f"{task.id}-2"]

    main()


@pytest.mark.parametrize("call", ["submit", "observe", "cancel", "forget"])
def test_a_bug_about_one_task_does_not_stop_the_others(call: str, caplog: pytest.LogCaptureFixture) -> None:
    @on()
    async def main(world: World) -> None:
        tasks = await world.add(5)
        poisoned = f"{tasks[2].id}-1"
        world.site.trouble = lambda at, job_id: KeyError("oops") if (at, job_id) == (call, poisoned) else None
        await world.step(1)
        for each in world.site.jobs.values():
            each.run()
        await world.step(1)
        if call == "cancel":
            for task in tasks:
                await world.cancel(task)
            await world.step(1)
        for each in world.site.jobs.values():
            each.end()
        for _ in range(4):
            await world.step(6)
        states = [await world.state(task) for task in tasks]
        end = S.CANCELED if call == "cancel" else S.COMPLETE
        assert [state for task, state in zip(tasks, states, strict=True) if task is not tasks[2]] == [end] * 4
        if call in ("submit", "observe"):
            world.restart(max_attempts=1)
            assert (await world.until_final(tasks[2])).state is S.SYSTEM_ERROR, "patience ends it"
            assert "KeyError" in await world.lines(tasks[2])

    main()
    assert "KeyError" in caplog.text


@on()
async def test_a_site_that_is_configured_no_more(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    world.sites = {"b": SiteDouble(SiteFacts(name="b"))}
    world.restart()
    await world.step(5.1)
    assert await world.state(task) is S.QUEUED
    assert "not configured any more" in await world.lines(task)
    await world.step(1)
    world.sites["b"].jobs[f"{task.id}-2"].end()
    assert (await world.until_final(task)).state is S.COMPLETE
    await world.step()
    assert (await world.get(task)).due_at is None


@on()
async def test_pushed_observations(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    its = world.site.job()
    for job_id in ("", "x", "x-y", f"{task.id}-2", "0" * 26 + "-1", f"{task.id}-99999999999999999999", "é-1"):
        await world.poller.note("a", Observation(job_id=job_id, phase=Phase.ENDED, exit_code=1))
    assert await world.state(task) is S.INITIALIZING
    its.end()
    await world.poller.note("a", its.seen())
    assert await world.state(task) is S.COMPLETE
    await world.poller.note("a", Observation(job_id=f"{task.id}-1", phase=Phase.UNKNOWN))
    assert await world.state(task) is S.COMPLETE


@on(SiteFacts(name="a"), SiteFacts(name="b"))
async def test_a_site_has_no_say_about_the_jobs_of_another(world: World) -> None:
    (task,) = await world.add(resources={"backend_parameters": {"site": "b"}})
    await world.step()
    its = world.sites["b"].job()
    its.end()
    await world.poller.note("a", its.seen())
    assert await world.state(task) is S.INITIALIZING
    await world.poller.note("b", its.seen())
    assert await world.state(task) is S.COMPLETE


def test_a_push_while_the_store_is_away_is_dropped() -> None:
    async def main() -> None:
        async with SqliteStore(":memory:") as store:
            world = World(store)
        await world.poller.note("a", Observation(job_id="0" * 26 + "-1", phase=Phase.ENDED))

    asyncio.run(main())


def test_a_bug_about_a_push_while_the_store_goes_away_ends_no_listener() -> None:
    class Failing(SqliteStore):
        errors: list[Exception]

        async def apply(self, task_id: str, change: Change, *, before: float | None = None) -> Task | None:
            if self.errors:
                raise self.errors.pop(0)
            return await super().apply(task_id, change, before=before)

    async def main() -> None:
        async with Failing(":memory:") as store:
            store.errors = []
            world = World(store)
            (task,) = await world.add()
            await world.step()
            world.site.job().end()
            store.errors = [RuntimeError("a bug"), StoreUnavailable("away")]
            await world.poller.note("a", world.site.job().seen())
            assert not store.errors
            assert (await world.until_final(task)).state is S.COMPLETE

    asyncio.run(main())


# Another attempt


Trouble = Callable[[World, Task], Awaitable[None]]


async def goes_silent(world: World, task: Task) -> None:
    world.site.trouble = down
    for _ in range(70):
        await world.step(5)
        if await world.state(task) is S.QUEUED:
            break
    world.site.trouble = lambda call, job_id: None


async def shows_no_sign_of_life(world: World, task: Task) -> None:
    for _ in range(70):
        await world.step(5)
        if await world.state(task) is S.QUEUED:
            break


async def ends_without_a_result(world: World, task: Task) -> None:
    world.site.job().exit(137)
    for _ in range(14):
        await world.step(1)


async def is_lost(world: World, task: Task) -> None:
    world.site.lost.add(world.site.job().plan.job_id)
    for _ in range(14):
        await world.step(1)


async def says_that_the_node_failed(world: World, task: Task) -> None:
    world.site.job().end("SYSTEM_ERROR", infrastructure=True, system_logs=["The runner was killed."])
    await world.step(1)


@pytest.mark.parametrize(
    "trouble",
    [goes_silent, shows_no_sign_of_life, ends_without_a_result, is_lost, says_that_the_node_failed],
)
def test_the_second_attempt_succeeds(trouble: Trouble) -> None:
    @on()
    async def main(world: World) -> None:
        (task,) = await world.add()
        await world.step()
        world.site.job().run()
        await world.step()
        assert await world.state(task) is S.RUNNING
        await trouble(world, task)
        for _ in range(5):
            await world.step(5)
        assert list(world.site.submits) == [f"{task.id}-1", f"{task.id}-2"]
        kill, submit = ("kill", f"{task.id}-1"), ("submit", f"{task.id}-2")
        assert world.site.calls.index(kill) < world.site.calls.index(submit)
        assert world.site.forgotten == [f"{task.id}-1"], "while the second one is under way"
        assert (await world.get(task)).attempts[0].forgotten
        world.site.jobs[f"{task.id}-2"].end()
        done = await world.until_final(task)
        assert done.state is S.COMPLETE
        assert [bool(each.log.end_time) for each in done.attempts] == [True, True]
        assert done.bodies is not None
        assert list(done.bodies.system) == [1], "the reason is the first attempt's"
        await world.step(1)
        assert sorted(world.site.forgotten) == [f"{task.id}-1", f"{task.id}-2"]
        assert (await world.get(task)).due_at is None

    main()


@on()
async def test_an_executor_that_failed_is_never_run_again(world: World) -> None:
    for state in ("EXECUTOR_ERROR", "SYSTEM_ERROR"):
        (task,) = await world.add()
        await world.step()
        world.site.jobs[f"{task.id}-1"].end(state)
        await world.step(1)
        await world.step(60)
        assert await world.state(task) is S(state)
        assert len((await world.get(task)).attempts) == 1


@on()
async def test_attempts_end_with_the_last_reason(world: World) -> None:
    (task,) = await world.add()
    at = []
    for number in (1, 2, 3):
        while len(world.site.submits) < number:
            await world.step(0.5)
        at.append(world.now)
        world.site.jobs[f"{task.id}-{number}"].end("SYSTEM_ERROR", infrastructure=True, system_logs=[f"no {number}"])
    assert 5 <= at[1] - at[0] < 7
    assert 10 <= at[2] - at[1] < 12
    done = await world.until_final(task)
    assert done.state is S.SYSTEM_ERROR
    assert done.bodies is not None
    assert done.bodies.system == {1: ["no 1"], 2: ["no 2"], 3: ["no 3"]}
    await world.step(100)
    await world.step(100)
    assert sorted(world.site.forgotten) == [f"{task.id}-{number}" for number in (1, 2, 3)]


@on(SiteFacts(name="a"), SiteFacts(name="b"))
async def test_cancel_during_the_backoff(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    job = world.site.job()
    job.run()
    await world.step()
    world.site.lost.add(f"{task.id}-1")
    for _ in range(11):
        await world.step(1)
    assert await world.state(task) is S.QUEUED
    await world.cancel(task)
    assert await world.state(task) is S.CANCELED
    await world.step(1)
    assert job.killed, "what was given up may still run"
    assert world.site.forgotten == [f"{task.id}-1"]
    await world.step(100)
    await world.step(100)
    assert sum(sum(site.submits.values()) for site in world.sites.values()) == 1
    assert (await world.get(task)).due_at is None


@on()
async def test_no_second_job_before_the_first_is_killed(world: World) -> None:
    """The kill must have reached the site; what its answer is does not matter for other sites."""
    (task,) = await world.add()
    await world.step()
    first = world.site.job()
    first.run()
    await world.step()
    world.site.trouble = lambda call, job_id: SiteUnavailable("no") if call in ("observe", "kill") else None
    while await world.state(task) is not S.QUEUED:
        await world.step(5)
    for _ in range(10):
        await world.step(5)
    assert (await world.state(task), len((await world.get(task)).attempts)) == (S.INITIALIZING, 2)
    assert list(world.site.submits) == [f"{task.id}-1"]
    world.site.trouble = lambda call, job_id: None
    await world.step(5)
    assert first.killed
    await world.step(5)
    world.site.jobs[f"{task.id}-2"].end()
    assert (await world.until_final(task)).state is S.COMPLETE


@on()
async def test_a_slow_kill_of_the_first_job_is_begun_once(world: World) -> None:
    """Slower than a submit waits for it: begun anew by each submit, it would never come to its end."""
    (task,) = await world.add()
    await world.step()
    first = world.site.job()
    first.run()
    world.site.trouble = lambda call, job_id: SiteUnavailable("no") if call == "observe" else None
    while await world.state(task) is not S.QUEUED:
        await world.step(5)
    site = SlowToCancel(world.site.facts)
    site.jobs = world.site.jobs
    world.sites["a"] = site
    world.restart(lease=0.05)
    world.now += 100
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    second = await world.store.apply(task.id, lifecycle.assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    assert second is not None
    for _ in range(3):
        await world.dispatcher.submit(second)
    assert (site.submits, site.calls) == ({}, [("begun", f"{task.id}-1")])
    site.arrive.set()
    while not first.killed:
        await asyncio.sleep(0)
    await world.dispatcher.submit(second)
    assert site.submits == {f"{task.id}-2": 1}
    assert site.calls.count(("begun", f"{task.id}-1")) == 1


@on()
async def test_too_little_time_for_a_submit_says_nothing_of_the_site(world: World) -> None:
    (task,) = await world.add()
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    assigned = await world.store.apply(task.id, lifecycle.assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    assert assigned is not None
    assert assigned.due_at is not None
    world.now = assigned.due_at - 0.25 * POLICY.lease
    await world.dispatcher.submit(assigned)
    assert not world.site.submits
    assert world.health.takes("a")
    while not world.site.submits:
        await world.step(10)
    assert world.site.submits == {f"{task.id}-1": 1}


@pytest.mark.parametrize("back", ["while it runs", "after the end"])
def test_a_dead_site_does_not_hold_up_the_next_one(back: str) -> None:
    on(SiteFacts(name="a"), SiteFacts(name="b"))(lambda world: _second_site(world, back))()


async def _second_site(world: World, back: str) -> None:
    a, b = world.sites.values()
    (task,) = await world.add()
    await world.step()
    (job,) = [*a.jobs.values(), *b.jobs.values()]
    there, other = (a, b) if a.jobs else (b, a)
    job.run()
    await world.step()
    there.trouble = down
    while not other.jobs:
        await world.step(5)
        if await world.state(task) is S.QUEUED:  # least loaded may be either
            there.facts = replace(there.facts, max_jobs=0)
            world.restart()
    assert ("kill", f"{task.id}-1") in there.calls
    if back == "while it runs":
        there.trouble = lambda call, job_id: None
        for _ in range(15):
            await world.step(5)
        assert job.killed, "two of a kind run no longer than necessary"
        assert await world.state(task) is S.INITIALIZING
    other.job().end()
    assert (await world.until_final(task)).state is S.COMPLETE
    there.trouble = lambda call, job_id: None
    for _ in range(10):
        await world.step(120)
    assert (job.killed, there.forgotten, other.forgotten) == (True, [f"{task.id}-1"], [f"{task.id}-2"])
    assert (await world.get(task)).due_at is None


# A process that slept in the middle of a submit


async def asleep_in_a_submit(world: World) -> tuple[Task, asyncio.Event, Dispatcher]:
    """A task whose first submit is under way in a process that does not move; another pair has taken over."""
    world.site.gate = asyncio.Event()
    (task,) = await world.add()
    await world.dispatcher.tick()
    while not world.site.submits:
        await asyncio.sleep(0)
    sleeper, gate = world.dispatcher, world.site.gate
    world.site.gate = None
    world.now += 31
    world.restart()
    return task, gate, sleeper


@on()
async def test_a_job_that_arrives_after_its_tasks_end_is_removed(world: World) -> None:
    task, gate, sleeper = await asleep_in_a_submit(world)
    world.site.trouble = lambda call, job_id: SiteRefused("no") if call == "submit" else None
    while not (await world.get(task)).final or (await world.get(task)).due_at is not None:
        await world.step(1)
    assert world.site.forgotten == [f"{task.id}-1"]
    world.site.trouble = lambda call, job_id: None
    gate.set()
    await sleeper.drain()
    assert world.site.jobs == {}
    assert world.site.calls[-2:] == [("kill", f"{task.id}-1"), ("forget", f"{task.id}-1")]
    assert await world.state(task) is S.SYSTEM_ERROR


@on()
async def test_a_job_that_arrives_during_a_later_attempt_is_removed(world: World) -> None:
    task, gate, sleeper = await asleep_in_a_submit(world)
    await world.step(1)
    world.site.job().exit(2)
    await world.step(1)
    await world.step(1)
    second = world.site.jobs[f"{task.id}-2"]
    second.run()
    assert list(world.site.jobs) == [f"{task.id}-2"], "what comes now comes anew"
    gate.set()
    await sleeper.drain()
    assert list(world.site.jobs) == [f"{task.id}-2"]
    assert world.site.calls[-2:] == [("kill", f"{task.id}-1"), ("forget", f"{task.id}-1")]
    second.end()
    assert (await world.until_final(task)).state is S.COMPLETE
    assert not second.killed


@on()
async def test_the_same_job_submitted_by_another_process_is_left_alone(world: World) -> None:
    task, gate, sleeper = await asleep_in_a_submit(world)
    await world.step(1)
    assert (await world.get(task)).attempts[0].submitted is not None
    gate.set()
    await sleeper.drain()
    world.site.job().run()
    world.site.job().end()
    assert (await world.until_final(task)).state is S.COMPLETE
    assert not any(call in ("cancel", "kill") for call, _ in world.site.calls)
    assert world.site.submits == {f"{task.id}-1": 2}


@on()
async def test_the_same_job_that_is_over_already_is_left_to_the_clean_up(world: World) -> None:
    task, gate, sleeper = await asleep_in_a_submit(world)
    await world.step(1)
    world.site.job().end()
    await world.poller.note("a", world.site.job().seen())
    assert await world.state(task) is S.COMPLETE
    gate.set()
    await sleeper.drain()
    await world.step(1)
    assert not any(call in ("cancel", "kill") for call, _ in world.site.calls)
    assert world.site.forgotten == [f"{task.id}-1"]


@on()
async def test_a_late_job_whose_removal_fails_is_left_to_the_clean_up(world: World) -> None:
    task, gate, sleeper = await asleep_in_a_submit(world)
    await world.cancel(task)
    while not (await world.get(task)).final or (await world.get(task)).due_at is not None:
        await world.step(1)
    assert await world.state(task) is S.CANCELED
    world.site.trouble = lambda call, job_id: SiteUnavailable("no") if call in ("kill", "forget") else None
    gate.set()
    await sleeper.drain()
    late = world.site.job()
    assert not late.killed
    world.site.trouble = lambda call, job_id: None
    await world.step(1)
    assert late.killed
    assert world.site.jobs == {}
    assert await world.state(task) is S.CANCELED


@on()
async def test_a_late_submit_whose_answer_is_lost(world: World) -> None:
    """It sleeps in the middle of the call, so the call ends in an error, and the job is there all the same."""
    task, gate, sleeper = await asleep_in_a_submit(world)
    await world.cancel(task)
    while not (await world.get(task)).final or (await world.get(task)).due_at is not None:
        await world.step(1)
    world.site.lose_answers = True
    gate.set()
    await sleeper.drain()
    assert world.site.jobs == {}
    assert world.site.forgotten[-1] == f"{task.id}-1"


# The loop


class Ticker:
    """Counts its ticks; each does the next of what it was given."""

    name = "test"

    def __init__(self, *steps: int | BaseException) -> None:
        self.steps = list(steps)
        self.ticks = 0
        self.ticked = asyncio.Event()

    async def tick(self) -> int:
        self.ticks += 1
        self.ticked.set()
        step = self.steps.pop(0) if self.steps else 0
        if isinstance(step, BaseException):
            raise step
        return step

    def wakes_on(self) -> Ring:
        return Ring.QUEUED

    async def next_due(self) -> float | None:
        return None

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(5):
            while self.ticks < count:
                self.ticked.clear()
                await self.ticked.wait()


def looped(*steps: int | BaseException) -> Callable[[Callable[[Ticker, Bell], Awaitable[None]]], Callable[[], None]]:
    def decorate(test: Callable[[Ticker, Bell], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                ticker, bell = Ticker(*steps), Bell()
                running = asyncio.create_task(loop.run(ticker, bell))
                try:
                    await test(ticker, bell)
                    assert not running.done()
                finally:
                    running.cancel()
                    await asyncio.gather(running, return_exceptions=True)

            asyncio.run(main())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


@looped()
async def test_the_loop_wakes_on_the_bell_at_once(ticker: Ticker, bell: Bell) -> None:
    await ticker.reach(1)
    clock = asyncio.get_running_loop().time
    begun = clock()
    for count in range(2, 30):
        for _ in range(5):  # let it fall asleep
            await asyncio.sleep(0)
        bell.ring(Ring.QUEUED)
        await ticker.reach(count)
    assert clock() - begun < loop.LONGEST_WAIT


@looped()
async def test_the_loop_sleeps_through_what_does_not_concern_it(ticker: Ticker, bell: Bell) -> None:
    await ticker.reach(1)
    for _ in range(20):
        bell.ring(Ring.OPEN)
        await asyncio.sleep(0)
    assert ticker.ticks == 1


@looped(3, 2, 1, 0)
async def test_the_loop_goes_on_while_there_is_work(ticker: Ticker, bell: Bell) -> None:
    await ticker.reach(4)


@looped(StoreUnavailable("away"), ValueError("bug"), 0)
async def test_the_loop_survives_errors(ticker: Ticker, bell: Bell) -> None:
    await ticker.reach(3)


def test_the_loop_backs_off() -> None:
    pauses = [loop._backoff(failures) for failures in range(1, 12)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.2, 10.0)
