"""Old tasks go in small batches; own sites stay with their service; the right to place is held by one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tesp_api.dispatch.keeper import BATCH, DAY, Keeper
from tesp_api.dispatch.right import Right
from tesp_api.errors import StoreUnavailable
from tesp_api.lifecycle import Policy, longest_pause
from tesp_api.store import Query
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Task
from tesp_api.tes import TesState, TesView
from tests.builders import NOW, make_attempt, make_task, run


def ended(store: SqliteStore, days_ago: float, **record: object) -> Task:
    """A task that ended so long ago and is cleaned up."""
    now = store.clock()
    return make_task(
        now=now - days_ago * DAY,
        tags={"k": "v"},
        inputs=[{"path": "/a", "content": "c"}],
        record={"state": TesState.COMPLETE, "due_at": None, **record},
    )


async def stored(store: SqliteStore) -> set[str]:
    return {task.id for task in (await store.page(Query(limit=2000))).tasks}


def test_old_tasks_go_in_batches_and_young_or_unfinished_ones_stay() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store:
            old = [ended(store, 8) for _ in range(BATCH + 50)]
            now = store.clock()
            kept = [
                ended(store, 6),
                ended(store, 30, state=TesState.RUNNING, due_at=now),  # it has run for a month
                ended(store, 30, due_at=now),  # its job is not cleaned up yet
                make_task(now=now - 30 * DAY),
            ]
            late = ended(store, 30)  # it took long: it is its end that counts
            kept.append(replace(late, attempts=(make_attempt(late.id, ended=now - DAY),)))
            await asyncio.gather(*(store.add(task) for task in [*old, *kept]))
            keeper = Keeper(store, 7)
            assert await keeper.tick() == BATCH
            assert await keeper.tick() == 50, "more is done at once, not a minute later"
            assert await keeper.tick() == 0
            assert await stored(store) == {task.id for task in kept}
            assert await store.get(old[0].id, TesView.FULL) is None
            assert await store.contents(old[0].id) == {}
            tagged = await store.page(Query(tags=(("k", "v"),)))
            assert {task.id for task in tagged.tasks} == {each.id for each in kept if each.spec.tags}

    run(go())


def test_nothing_goes_without_the_setting() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store:
            await store.add(ended(store, 10_000))
            assert await Keeper(store).tick() == 0
            assert len(await stored(store)) == 1

    run(go())


def test_a_round_is_not_repeated_at_once() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store:
            keeper = Keeper(store, 7)
            await keeper.tick()
            await store.add(ended(store, 8))
            assert await keeper.tick() == 0
            due = await keeper.next_due()
            assert due is not None
            assert 0 < due - store.clock() <= 60

    run(go())


def test_an_own_site_belongs_to_one_data_directory(tmp_path: Path) -> None:
    async def go() -> None:
        async with SqliteStore(tmp_path / "a") as store:
            mine, same, other = (Keeper(store, 0, {"embedded": holder}) for holder in ("x", "x", "y"))
            assert await mine.foreign() is None
            assert await same.foreign() is None
            assert await other.foreign() == "embedded"

    run(go())


def test_one_holds_the_right_and_another_takes_it_over(tmp_path: Path) -> None:
    async def go() -> None:
        path = tmp_path / "a"
        async with SqliteStore(path) as one, SqliteStore(path) as two:
            first, second = Right(one, "place", 0.3), Right(two, "place", 0.3)
            until = await first.until()
            assert until is not None
            assert await second.until() is None
            assert await first.until() is not None, "it is kept"
            async with asyncio.timeout(10):
                while await second.until() is None:  # the first has died
                    await asyncio.sleep(0.01)
            first.lost()
            assert await first.until() is None
            await second.give_back()
            assert await first.until() is not None, "at once"

    run(go())


def test_a_right_is_not_believed_after_a_store_that_failed() -> None:
    async def go() -> None:
        store = SqliteStore(":memory:")
        async with store:
            right = Right(store, "place", 60)
            right._until = store.clock() + 1
        with pytest.raises(StoreUnavailable):
            await right.until()
        assert right._until is None

    run(go())


def test_what_was_put_off_before_the_clock_was_set_back_is_due_in_batches() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store:
            policy = Policy(lease=2000)
            now = NOW
            keeper = Keeper(store, policies=[policy], clock=lambda: now)
            by_us = [make_task(record={"due_at": NOW + longest_pause(policy)})]
            early = [make_task(record={"due_at": NOW + DAY}) for _ in range(BATCH + 5)]
            await asyncio.gather(*(store.add(task) for task in [*by_us, *early]))
            assert await keeper.tick() == BATCH
            assert await keeper.tick() == 5, "more is done at once"
            assert await keeper.tick() == 0
            assert len(await store.take_due(queued=True, now=NOW, lease=DAY, limit=BATCH * 2)) == BATCH + 5
            now += 5
            assert await keeper.tick() == 0, "not at each tick"
            now -= 600
            assert await keeper.tick() == BATCH, "but at once when the clock has been set back"

    run(go())
