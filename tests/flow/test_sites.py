"""Several sites: who gets which task, what waits and why, and what a site that fails means for the others."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from tesp_api.dispatch.dispatcher import MOST_SUBMITS
from tesp_api.dispatch.health import FAILURES
from tesp_api.errors import SiteClosed, SiteUnavailable
from tesp_api.lifecycle import assign
from tesp_api.sites import SiteFacts
from tesp_api.task import Task
from tesp_api.tes import TesState as S
from tests.builders import api_app, client_of
from tests.doubles import SiteDouble, down
from tests.flow.test_dispatch import POLICY, World, on

A, B = SiteFacts(name="a"), SiteFacts(name="b")


def unsent(call: str, job_id: str) -> SiteUnavailable:
    """Trouble: nothing arrives, and we know it."""
    return SiteUnavailable("Pulsar at a cannot be reached", unsent=True)


def closed(call: str, job_id: str) -> SiteClosed:
    """Trouble: it does not let us in."""
    return SiteClosed("the token is wrong")


def fine(call: str, job_id: str) -> None:
    """No trouble."""


def at(site: str, **more: Any) -> dict[str, Any]:
    return {"resources": {"backend_parameters": {"site": site}, **more}}


async def end(world: World, site: SiteDouble) -> None:
    """All that runs there ends well."""
    for each in site.active:
        each.run()
        each.end()
    await world.step(6)


async def site_of(world: World, task: Task) -> str | None:
    attempt = (await world.get(task)).attempt
    return attempt.site if attempt and not attempt.withdrawn else None


# Who gets it


@on(A, B)
async def test_a_task_runs_where_it_wishes(world: World) -> None:
    tasks = [task for name in "bbab" for task in await world.add(**at(name))]
    await world.step()
    assert [await site_of(world, task) for task in tasks] == ["b", "b", "a", "b"]


@on(SiteFacts(name="hpc", batch=True, queues=("long",)), A)
async def test_the_wishes_reach_the_plan(world: World) -> None:
    await world.add(resources={"backend_parameters": {"Queue": "long", "time_limit": "1:00:00"}})
    await world.add(**at("a"))
    await world.step()
    plan = world.sites["hpc"].job().plan
    assert (plan.queue, plan.time_limit) == ("long", 3600)
    plan = world.sites["a"].job().plan
    assert (plan.queue, plan.time_limit) == (None, None)


# What waits says why, once


@on(SiteFacts(name="a", max_jobs=1))
async def test_a_full_site_is_told_once(world: World) -> None:
    (first,) = await world.add()
    await world.step(1)
    (second,) = await world.add()
    for _ in range(20):
        await world.step(3)
    world.restart()
    for _ in range(20):
        await world.step(3)
    assert await world.state(second) is S.QUEUED
    assert await world.lines(second) == "The task waits: the site 'a' is full."
    assert await world.lines(first) == ""
    await end(world, world.site)
    assert await world.state(second) is S.INITIALIZING
    assert (await world.get(second)).attempts[0].number == 1


@on(SiteFacts(name="a", max_jobs=1))
async def test_what_fits_nowhere_fails_though_all_is_full(world: World) -> None:
    await world.add(100)
    await world.step(1)
    (task,) = await world.add(**at("elsewhere"))
    for _ in range(4):
        await world.step(3)
    assert await world.state(task) is S.SYSTEM_ERROR
    assert "'elsewhere'" in await world.lines(task)


@on(A)
async def test_a_site_that_hears_nothing_uses_up_no_attempt(world: World) -> None:
    world.site.trouble = unsent
    (task,) = await world.add()
    for _ in range(200):
        await world.step(10)
    found = await world.get(task)
    assert found.state is S.QUEUED
    assert found.tries == ()
    assert await world.lines(task) == (
        "The task waits: the site 'a' takes no jobs now. Pulsar at a cannot be reached"
    ), "once, in more than half an hour"
    assert sum(world.site.submits.values()) <= FAILURES
    world.site.trouble = fine
    for _ in range(3):
        await world.step(10)
    assert list(world.site.jobs) == [f"{task.id}-1"]
    await end(world, world.site)
    done = await world.until_final(task)
    assert done.state is S.COMPLETE
    assert [each.withdrawn for each in done.attempts] == [False]


@on(A)
async def test_nobody_is_shown_an_attempt_that_was_none(world: World) -> None:
    world.site.trouble = unsent
    (task,) = await world.add()
    for _ in range(5):
        await world.step(1)
    async with client_of(api_app(world.store)) as client:
        shown = (await client.get(f"tasks/{task.id}?view=FULL")).json()
        (log,) = shown["logs"]
        assert (log["logs"], log["outputs"], "metadata" in log) == ([], [], False)
        assert len(log["system_logs"]) == 1
        await client.post(f"tasks/{task.id}:cancel")
    await world.step()
    found = await world.get(task)
    assert (found.state, found.due_at) == (S.CANCELED, None)


@on(A)
async def test_an_answer_that_is_lost_is_another_matter(world: World) -> None:
    """The site may have the job, so nobody else gets it."""
    world.site.lose_answers = True
    (task,) = await world.add()
    await world.step()
    assert await world.state(task) is S.INITIALIZING
    assert list(world.site.jobs) == [f"{task.id}-1"]


@on(A, B)
async def test_the_others_go_on_while_one_is_down(world: World) -> None:
    world.sites["a"].trouble = unsent
    tasks = await world.add(30)
    for _ in range(3):
        await world.step(1)
    assert {await site_of(world, task) for task in tasks} == {"b"}
    assert sum(world.sites["a"].submits.values()) < 20, "not each task has to find out by itself"
    await end(world, world.sites["b"])
    assert {await world.state(task) for task in tasks} == {S.COMPLETE}
    world.sites["a"].trouble = fine
    for _ in range(3):
        await world.step(15)
    tasks = await world.add(10)
    await world.step()
    assert {await site_of(world, task) for task in tasks} == {"a", "b"}


@on(A, B)
async def test_a_site_that_lets_us_not_in_ends_no_task(world: World) -> None:
    world.sites["a"].trouble = closed
    tasks = [task for _ in range(10) for task in await world.add(**at("a"))]
    free = await world.add(10)
    for _ in range(30):
        await world.step(20)
    assert {await world.state(task) for task in tasks} == {S.QUEUED}
    assert {await site_of(world, task) for task in free} == {"b"}
    assert "the token is wrong" in await world.lines(tasks[0])
    submits = sum(world.sites["a"].submits.values())
    world.sites["a"].trouble = fine
    for _ in range(10):
        await world.step(20)
    assert {await world.state(task) for task in tasks} == {S.INITIALIZING}
    assert {len((await world.get(task)).attempts) for task in tasks} == {1}
    assert submits <= 20, "after a refusal no more jobs go there"


@on(A)
async def test_after_a_refusal_one_job_goes_first(world: World) -> None:
    """The site answers questions but takes no jobs: each pause one of them is tried."""
    world.site.trouble = lambda call, job_id: closed(call, job_id) if call == "submit" else None
    (first,) = await world.add()
    await world.step(1)
    assert sum(world.site.submits.values()) == 1
    await world.add(20)
    for _ in range(61):
        await world.step(1)
    assert 2 <= sum(world.site.submits.values()) <= 8
    assert await world.state(first) is S.QUEUED
    world.site.trouble = fine
    for _ in range(70):
        await world.step(1)
    assert len(world.site.jobs) == 21


@on(A)
async def test_a_lease_that_ran_out_is_no_fault_of_the_site(world: World) -> None:
    (task,) = await world.add()
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    assigned = await world.store.apply(task.id, assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    assert assigned is not None
    world.now += 29
    for _ in range(2 * FAILURES):
        await world.dispatcher.submit(assigned, fresh=True)
    assert world.health.takes("a")
    assert world.health.why("a") == ""
    assert await world.state(task) is S.INITIALIZING


@on(A)
async def test_a_task_that_moved_on_is_not_taken_back(world: World) -> None:
    """Another process looked at it meanwhile and may have sent it."""
    (task,) = await world.add()
    (taken,) = await world.store.take_due(queued=True, now=world.now, lease=30, limit=1)
    assigned = await world.store.apply(task.id, assign(taken, "a", world.now, POLICY))  # type: ignore[arg-type]
    assert assigned is not None
    world.now += 1
    await world.store.take_due(queued=False, now=world.now + 60, lease=30, limit=1)
    world.site.trouble = unsent
    await world.dispatcher.submit(assigned, fresh=True)
    assert await world.state(task) is S.INITIALIZING


# Jobs of a dead site


@on(A, B)
async def test_a_job_of_a_dead_site_is_tried_elsewhere_after_the_patience(world: World) -> None:
    (task,) = await world.add()
    await world.step()
    dead, other = world.sites["a"], world.sites["b"]
    dead.job().run()
    await world.step()
    dead.trouble = down
    for _ in range(11):
        await world.step(25)
    assert await site_of(world, task) == "a", "it may still run there"
    assert other.jobs == {}
    for _ in range(6):
        await world.step(25)
    assert list(other.jobs) == [f"{task.id}-2"]
    dead.trouble = fine
    for _ in range(20):
        await world.step(5)
    assert dead.forgotten == [f"{task.id}-1"], "what is left there is removed when it is back"
    await end(world, other)
    done = await world.until_final(task)
    assert (done.state, [each.site for each in done.attempts]) == (S.COMPLETE, ["a", "b"])


@on(replace(A, draining=True), B)
async def test_a_site_that_is_drained(world: World) -> None:
    """What is there goes on, what asks for it waits and says why, and all else goes elsewhere."""
    (there,) = await world.add()
    taken = assign(there, "a", world.now, POLICY)
    assert taken is not None
    await world.store.apply(there.id, taken)
    (asks,) = await world.add(**at("a"))
    others = await world.add(3)
    for _ in range(20):
        await world.step(3)
    assert list(world.sites["a"].jobs) == [f"{there.id}-1"]
    assert {await site_of(world, task) for task in others} == {"b"}
    assert await world.lines(asks) == "The task waits: the site 'a' is being drained."
    world.restart()
    for _ in range(20):
        await world.step(3)
    assert await world.lines(asks) == "The task waits: the site 'a' is being drained.", "also after a restart"
    await end(world, world.sites["a"])
    assert (await world.until_final(there)).state is S.COMPLETE
    assert await world.state(asks) is S.QUEUED


# Nobody holds up the others


@on(A, B)
async def test_a_site_gets_no_more_at_a_time_than_it_takes_in(world: World) -> None:
    """In a longer line leases would run out, and the site would be blamed for it."""
    slow, other = world.sites["a"], world.sites["b"]
    slow.gate = asyncio.Event()
    tasks = await world.add(3 * MOST_SUBMITS, **at("a"))
    await world.add(5, **at("b"))
    for _ in range(10):
        await world.dispatcher.tick()
        world.now += 1
    assert (slow.submits.total(), other.submits.total()) == (MOST_SUBMITS, 5)
    assert [await world.lines(task) for task in tasks] == [""] * len(tasks), "there is nothing to be said about that"
    slow.gate.set()
    await world.dispatcher.drain()
    for _ in range(10):
        await world.dispatcher.tick()
        await world.dispatcher.drain()
    assert slow.submits == {f"{task.id}-1": 1 for task in tasks}


@on(A, B)
async def test_many_tasks_for_a_dead_site_hold_up_nobody(world: World) -> None:
    world.sites["a"].trouble = unsent
    await world.add(700, **at("a"))
    await world.step(1)
    tasks = await world.add(5, **at("b"))
    await world.step(1)
    assert {await world.state(task) for task in tasks} == {S.INITIALIZING}


@on(SiteFacts(name="a", max_jobs=1), B)
async def test_many_tasks_for_a_full_site_hold_up_nobody(world: World) -> None:
    waiting = await world.add(700, **at("a"))
    await world.step(1)
    for _ in range(3):
        tasks = await world.add(100, **at("b"))
        await world.step(1)
        assert {await world.state(task) for task in tasks} == {S.INITIALIZING}
    assert await world.state(waiting[0]) is S.INITIALIZING
    world.sites["a"].job().end()
    await world.step(1)
    assert await world.state(waiting[1]) is S.INITIALIZING, "in the order in which they came"


@on(SiteFacts(name="a", cpus=4.0))
async def test_small_tasks_get_past_large_ones_that_find_no_room(world: World) -> None:
    await world.add(resources={"cpu_cores": 2})
    await world.step(1)
    large = await world.add(300, resources={"cpu_cores": 4})
    small = await world.add(2, resources={"cpu_cores": 1})
    await world.step(1)
    assert {await world.state(task) for task in small} == {S.INITIALIZING}
    assert {await world.state(task) for task in large} == {S.QUEUED}
    await end(world, world.site)
    await world.step(1)
    assert await world.state(large[0]) is S.INITIALIZING


@on(SiteFacts(name="a", max_jobs=1), SiteFacts(name="b", max_jobs=8))
async def test_many_lanes_without_room(world: World) -> None:
    """Each task has a lane of its own: more than one tick looks at."""
    for n in range(700):
        await world.add(**at("a", zones=[f"z{n}"]))
    (task,) = await world.add(**at("b"))
    for _ in range(10):
        await world.step(0.3)
    assert await world.state(task) is S.INITIALIZING


@on(SiteFacts(name="a", ram_gb=8.0))
async def test_more_lanes_than_are_remembered_neither_starve_others_nor_keep_us_busy(world: World) -> None:
    """One user's tasks differ in what no site knows, and none of them has room."""
    (large,) = await world.add(resources={"ram_gb": 7})
    await world.step(1)
    waiting = [(await world.add(resources={"ram_gb": 5, "zones": [f"z{n}"]}))[0] for n in range(620)]
    (small,) = await world.add(resources={"ram_gb": 1})
    for _ in range(20):
        await world.dispatcher.tick()
        due_at = await world.dispatcher.next_due()
        assert due_at is None or due_at > world.now, "no look is repeated at once"
        world.now = max(due_at or 0.0, world.now + 0.1)
    assert await world.state(small) is S.INITIALIZING
    assert {await world.state(task) for task in waiting} == {S.QUEUED}
    await end(world, world.site)
    await world.step(1)
    assert await world.state(large) is S.COMPLETE
    assert [await world.state(task) for task in waiting].count(S.INITIALIZING) == 1


@on(SiteFacts(name="a", max_jobs=1), B)
async def test_many_lanes_without_room_starve_nobody_while_others_come_and_go(world: World) -> None:
    """What decides who finds room changes all the time, so that each look begins anew."""
    for n in range(700):
        await world.add(**at("a", zones=[f"z{n}"]))
    (task,) = await world.add(**at("b"))
    ended = 0
    for _ in range(12):
        await world.dispatcher.tick()
        await world.dispatcher.drain()
        for job in world.sites["a"].active:
            job.run()
            job.end()
            ended += 1
        world.now += 0.6
        await world.poller.tick()
        await world.poller.drain()
    assert ended == 12
    assert await world.state(task) is S.INITIALIZING


# What is told of sites


@on(A, SiteFacts(name="b", cpus=4.0))
async def test_reports(world: World) -> None:
    world.sites["b"].trouble = closed
    await world.add(**at("a"))
    await world.step(3)
    await world.inspector.tick()
    reports = await world.store.reports()
    a, b = (json.loads(reports[name][1]) for name in "ab")
    assert a == {"health": "up", "version": "1.0"}
    assert (b["health"], b["last_error"]["message"]) == ("down", "the token is wrong")
    facts = [each.facts for each in world.sites.values()]
    async with client_of(api_app(world.store, sites=facts, clock=world.clock), "http://tes") as client:
        one, two = (await client.get("/tesp/v1/sites")).json()["sites"]
        assert (one["health"], one["version"], one["load"]["jobs"]) == ("up", "1.0", 1)
        assert (two["health"], two["capacity"]) == ("down", {"cpus": 4.0})
        world.now += 100
        one, two = (await client.get("/tesp/v1/sites")).json()["sites"]
        assert (one["health"], two["health"]) == ("unknown", "unknown"), "nobody has told for long"
        await world.store.report("a", world.now, "{broken")
        assert (await client.get("/tesp/v1/sites")).json()["sites"][0]["health"] == "unknown"


@on(A)
async def test_a_check_that_fails_in_an_odd_way_is_no_end(world: World) -> None:
    world.site.trouble = lambda call, job_id: KeyError("oops")
    await world.step(5)
    assert "KeyError" in world.health.why("a")
    world.site.trouble = fine
    await world.step(5)
    await world.inspector.tick()
    assert world.health.takes("a")
    await world.inspector.drain()
