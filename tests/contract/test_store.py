"""What every store must do. A new kind of store joins by an entry in STORES; the end of the file is about SQLite."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import AsyncMongoClient

from tesp_api.errors import RightLost, StoreUnavailable
from tesp_api.lifecycle import KEEP, Change, assign
from tesp_api.lifecycle import Policy as Rules
from tesp_api.parameters import lane
from tesp_api.store import FEW, LONGEST_RIGHT, Load, Once, Query, Repeat, Ring, TaskStore
from tesp_api.store import sqlite as sqlite_store
from tesp_api.store.mongo import MongoStore
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import MANY, Tail, Task
from tesp_api.tes import TesState, TesView
from tests import mongod
from tests.builders import NOW, make_attempt, make_task

Open = Callable[[], TaskStore]
Test = Callable[[TaskStore], Awaitable[None]]


@contextmanager
def on_mongo(kind: mongod.Kind, client: Callable[..., Any] = AsyncIOMotorClient) -> Iterator[Open]:
    """Stores on a fresh database of a real server."""
    with mongod.database(kind) as uri:
        yield lambda: MongoStore(uri, client=client)


STORES: dict[str, Callable[[Path], AbstractContextManager[Open]]] = {
    "sqlite-memory": lambda path: nullcontext(lambda: SqliteStore(":memory:")),
    "sqlite-file": lambda path: nullcontext(lambda: SqliteStore(path / "tasks.sqlite")),
    "mongo": lambda path: on_mongo("standalone"),
    "mongo-replica-set": lambda path: on_mongo("replica"),
    # What motor will be replaced by one day: the store uses nothing that this does not have.
    "mongo-pymongo": lambda path: on_mongo("standalone", AsyncMongoClient),
}


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    with STORES[request.param](tmp_path) as opened:
        yield opened


def on(test: Callable[[TaskStore], Coroutine[Any, Any, None]]) -> Callable[[Open], None]:
    """Run an async test on an open store."""

    def run(open_store: Open) -> None:
        async def main() -> None:
            async with open_store() as store:
                await test(store)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def added(store: TaskStore, *tasks: Task) -> list[Task]:
    await asyncio.gather(*(store.add(task) for task in tasks))
    return list(tasks)


async def ids(store: TaskStore, **query: Any) -> list[str]:
    """All matches, page by page."""
    found: list[str] = []
    limit = query.pop("limit", 256)
    after = None
    while True:
        page = await store.page(Query(limit=limit, after=after, **query))
        assert len(page.tasks) <= limit
        found += [task.id for task in page.tasks]
        if not page.more:
            return found
        after = page.tasks[-1].id


def change(task: Task, **fields: Any) -> Change:
    return Change(version=task.version, **fields)


# Add and get


@on
async def test_a_task_comes_back_in_each_view(store: TaskStore) -> None:
    task = make_task(
        name="n",
        inputs=[
            {"path": "/a", "content": "secret"},
            {"path": "/b", "url": "http://x/b"},
            {"path": "/c", "content": ""},
        ],
        tags={"k": "v"},
        owner="alice",
    )
    await store.add(task)
    minimal = await store.get(task.id)
    assert minimal is not None
    assert (minimal.id, minimal.state, minimal.version, minimal.owner) == (task.id, TesState.QUEUED, 1, "alice")
    assert (minimal.document, minimal.attempts, minimal.bodies) == ("", (), None)
    assert await store.get(task.id, TesView.BASIC) == replace(task, bodies=None)
    full = await store.get(task.id, TesView.FULL)
    assert full == task
    assert full.bodies is not None
    assert full.bodies.contents == {0: "secret", 2: ""}
    assert await store.contents(task.id) == {0: "secret", 2: ""}
    assert "secret" not in full.document


@on
async def test_a_task_with_attempts_and_bodies_can_be_added(store: TaskStore) -> None:
    task = make_task()
    bodies = replace(task.bodies, system={0: ["before"], 1: ["one", "two"]})  # type: ignore[type-var]
    task = replace(task, attempts=(make_attempt(task.id, beat=3, log={"metadata": {"a": "b"}}),), bodies=bodies)
    await store.add(task)
    assert await store.get(task.id, TesView.FULL) == task


@on
async def test_another_owners_task_is_not_there(store: TaskStore) -> None:
    mine, open_to_all = await added(store, make_task(owner="alice"), make_task())
    for view in TesView:
        assert await store.get(mine.id, view, owner="bob") is None
        assert await store.get(mine.id, view, owner="") is None
        assert await store.get(mine.id, view, owner="alice") is not None
        assert await store.get(mine.id, view) is not None
        assert await store.get(open_to_all.id, view, owner="") is not None


@pytest.mark.parametrize("task_id", ["", "x", "0" * 26, "../x", "' OR 1=1 --", "a\0b", "%", "é", "😀", "x" * 100_000])
def test_a_strange_id_is_no_task(open_store: Open, task_id: str) -> None:
    async def main() -> None:
        async with open_store() as store:
            await store.add(make_task())
            assert await store.get(task_id, TesView.FULL) is None
            assert await store.contents(task_id) == {}
            assert await store.apply(task_id, Change(version=1, due_at=None)) is None

    asyncio.run(main())


@on
async def test_a_name_that_is_taken_changes_nothing(store: TaskStore) -> None:
    task = make_task(name="first")
    await store.add(task)
    with pytest.raises(Exception, match=r".+"):
        await store.add(replace(make_task(name="second"), id=task.id))
    assert (await store.get(task.id, TesView.FULL)) == task


@on
async def test_long_bodies(store: TaskStore) -> None:
    text = "é😀\0x" * (2 << 20)  # 16 MiB and more
    task = make_task(inputs=[{"path": "/a", "content": "x" * (8 << 20)}, {"path": "/b", "content": "y" * (8 << 20)}])
    await store.add(task)
    task = replace(task, bodies=None)
    written = await store.apply(task.id, change(task, streams={(1, 0, "stdout"): text}))
    assert written is not None
    full = await store.get(task.id, TesView.FULL)
    assert full is not None
    assert full.bodies is not None
    assert full.bodies.streams[1, 0, "stdout"] == text
    assert [len(each) for each in full.bodies.contents.values()] == [8 << 20, 8 << 20]


@on
async def test_an_attempt_with_many_files(store: TaskStore) -> None:
    task = make_task(record={"state": TesState.INITIALIZING})
    await store.add(task)
    files = [{"url": f"u{at}", "path": f"/{at}", "size_bytes": at} for at in range(3 * MANY)]
    attempt = make_attempt(task.id, log={"outputs": files})
    written = await store.apply(task.id, change(task, attempt=attempt))
    assert written is not None
    assert written.attempts == (attempt,)
    assert (await store.get(task.id, TesView.BASIC)) == written
    following = make_attempt(task.id, 2)
    written = await store.apply(task.id, change(written, attempt=following))
    assert written is not None
    assert written.attempts == (attempt, following)


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "nul\0nul", "\ufffe\uffff", "\x01\x7f", "'\"`;--", "\u202e"])
def test_odd_text_is_kept_or_refused_and_the_store_lives(open_store: Open, text: str) -> None:
    async def main() -> None:
        async with open_store() as store:
            task = make_task()
            await store.add(task)
            others = [make_task(name=str(n)) for n in range(20)]
            odd = replace(task, bodies=None)
            results = await asyncio.gather(
                store.apply(task.id, change(odd, streams={(1, 0, "stdout"): text}, system=("l", text), system_of=1)),
                *(store.add(each) for each in others),
                return_exceptions=True,
            )
            assert not any(isinstance(each, BaseException) for each in results[1:])
            stored = await store.get(task.id, TesView.FULL)
            assert stored is not None
            assert stored.bodies is not None
            if isinstance(results[0], ValueError):  # refused: then all of it
                assert stored.version == 1
                assert (stored.bodies.streams, stored.bodies.system) == ({}, {})
            else:
                assert stored.bodies.streams[1, 0, "stdout"] == text
                assert list(stored.bodies.system[1]) == ["l", text]
            assert len(await ids(store)) == 21

    asyncio.run(main())


# Pages


@on
async def test_pages_are_newest_first_and_complete_while_tasks_are_added(store: TaskStore) -> None:
    """All have the same creation time; every task that was there at the start shows up once."""
    old = await added(store, *(make_task(name=str(n)) for n in range(57)))
    seen: list[str] = []
    after = None
    while True:
        page = await store.page(Query(limit=10, after=after))
        seen += [task.id for task in page.tasks]
        await added(store, make_task(), make_task())
        if not page.more:
            break
        after = page.tasks[-1].id
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == len(set(seen))
    assert set(seen) == {task.id for task in old}


@on
async def test_page_sizes_at_the_edges(store: TaskStore) -> None:
    assert (await store.page(Query())).tasks == ()
    assert not (await store.page(Query())).more
    tasks = await added(store, *(make_task() for _ in range(4)))
    whole = await store.page(Query(limit=4))
    assert (len(whole.tasks), whole.more) == (4, False)
    assert (await store.page(Query(limit=3))).more
    for after in ("", "zzz", "'", "\0", tasks[0].id):
        page = await store.page(Query(after=after))
        assert [task.id for task in page.tasks] == sorted((t.id for t in tasks if t.id < after), reverse=True)


@on
async def test_pages_load_what_the_view_says(store: TaskStore) -> None:
    task = make_task(name="x", inputs=[{"path": "/a", "content": "c"}])
    await store.add(task)
    (minimal,) = (await store.page(Query())).tasks
    (basic,) = (await store.page(Query(), TesView.BASIC)).tasks
    (full,) = (await store.page(Query(), TesView.FULL)).tasks
    assert (minimal.document, minimal.bodies) == ("", None)
    assert basic == replace(task, bodies=None)
    assert full == task


TAGGED: dict[str, dict[str, str] | None] = {
    "none": None,
    "empty": {},
    "foo-empty": {"foo": ""},
    "foo-bar": {"foo": "bar"},
    "foo-bar-more": {"foo": "bar", "baz": "qux"},
    "foo-other": {"foo": "other"},
    "case": {"Foo": "bar"},
    "odd": {"a.b": "1", "$where": "x", "q'\"": "\\", "é😀": "ü", "": "no key", "%_*[": "%"},
}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], set(TAGGED)),
        ([("foo", "")], {"foo-empty", "foo-bar", "foo-bar-more", "foo-other"}),
        ([("foo", "bar")], {"foo-bar", "foo-bar-more"}),
        ([("foo", "bar"), ("baz", "")], {"foo-bar-more"}),
        ([("baz", ""), ("foo", "bar")], {"foo-bar-more"}),
        ([("foo", "bar"), ("foo", "bar")], {"foo-bar", "foo-bar-more"}),
        ([("foo", "bar"), ("foo", "other")], set()),
        ([("foo", "bar"), ("nope", "")], set()),
        ([("nope", "")], set()),
        ([("foo", "ba")], set()),
        ([("foo", "%")], set()),
        ([("Foo", "bar")], {"case"}),
        ([("a.b", "1")], {"odd"}),
        ([("a", "")], set()),
        ([("$where", "x"), ("q'\"", "\\"), ("é😀", "ü"), ("%_*[", "%")], {"odd"}),
        ([("", "")], {"odd"}),
        ([("", "no key")], {"odd"}),
    ],
)
def test_tags(open_store: Open, tags: list[tuple[str, str]], expected: set[str]) -> None:
    async def main() -> None:
        async with open_store() as store:
            tasks = await added(store, *(make_task(name=name, tags=tags) for name, tags in TAGGED.items()))
            names = {task.id: task.spec.name for task in tasks}
            found = await ids(store, tags=tuple(tags), limit=2)
            assert [*found] == sorted(found, reverse=True)
            assert {names[each] for each in found} == expected
            assert len(found) == len(expected)

    asyncio.run(main())


NAMES = [
    "",
    "a",
    "ab",
    "aB",
    "a%b",
    "a_b",
    "a*b",
    "a[b",
    "a\\b",
    "%",
    "😀",
    "😀x",
    "\ud7ff",
    "\ue000",
    "\U0010ffff",
    "\U0010ffffx",
    "é",
]


PREFIXES = [
    "a",
    "a%",
    "a_",
    "a*",
    "a[",
    "a\\",
    "%",
    "_",
    "A",
    "😀",
    "\ud7ff",
    "\U0010ffff",
    "e",
    "zz",
    "ab",
    "a\0",
    "x" * 5000,
]


@pytest.mark.parametrize(
    ("prefix", "few"),
    [
        *((prefix, True) for prefix in PREFIXES),
        *((prefix, False) for prefix in ("a%", "\U0010ffff", "abcdef", "x" * 24, "x" * 30)),
    ],
)
def test_name_prefix_is_literal(open_store: Open, prefix: str, few: bool) -> None:
    async def main() -> None:
        async with open_store() as store:
            many = 0 if few else FEW
            for start in range(0, many, 500):
                await added(store, *(make_task(name=prefix + str(n)) for n in range(start, start + 500)))
            tasks = await added(store, *(make_task(name=name) for name in NAMES))
            expected = sorted((task.id for task in tasks if (task.spec.name or "").startswith(prefix)), reverse=True)
            found = await ids(store, name_prefix=prefix)
            assert found[: len(expected)] == expected
            assert len(found) == len(expected) + many

    asyncio.run(main())


@on
async def test_filters_hold_together(store: TaskStore) -> None:
    expected = []
    for state in (TesState.QUEUED, TesState.COMPLETE):
        for owner in ("alice", "bob"):
            for name in ("run-1", "walk-1"):
                for tags in ({"p": "x", "q": "1"}, {"p": "y"}):
                    task = make_task(name=name, owner=owner, tags=tags, record={"state": state})
                    await store.add(task)
                    expected.append((task.id, state, owner, name, tags))
    for state in (None, TesState.QUEUED, TesState.COMPLETE, TesState.RUNNING):
        for owner in (None, "alice", "nobody", ""):
            for prefix in ("", "run", "walk-", "x"):
                for tags in ((), (("p", "x"),), (("p", ""), ("q", "1"))):
                    found = await ids(store, state=state, owner=owner, name_prefix=prefix, tags=tags, limit=3)
                    wanted = [
                        task_id
                        for task_id, its_state, its_owner, name, its_tags in expected
                        if state in (None, its_state)
                        and owner in (None, its_owner)
                        and name.startswith(prefix)
                        and all(
                            its_tags.get(key) in ({value} if value else set(its_tags.values())) for key, value in tags
                        )
                    ]
                    assert found == sorted(wanted, reverse=True), (state, owner, prefix, tags)


@on
async def test_filters_hold_together_where_each_has_many_tasks(store: TaskStore) -> None:
    states, owners = (TesState.COMPLETE, TesState.QUEUED), ("alice", "bob", "carol")
    tasks = [
        make_task(
            name=f"run-{number % 5}", owner=owners[number % 3], tags={"k": "v"}, record={"state": states[number % 2]}
        )
        for number in range(4 * FEW)
    ]
    for start in range(0, len(tasks), 500):
        await added(store, *tasks[start : start + 500])
    for state in (None, *states):
        for owner in (None, owners[0]):
            for prefix in ("", "run-", "run-1"):
                for tags in ((), (("k", "v"),), (("k", ""),)):
                    page = await store.page(Query(state=state, owner=owner, name_prefix=prefix, tags=tags, limit=9))
                    wanted = [
                        task.id
                        for task in tasks
                        if state in (None, task.state)
                        and owner in (None, task.owner)
                        and (task.spec.name or "").startswith(prefix)
                    ]
                    assert [task.id for task in page.tasks] == sorted(wanted, reverse=True)[:9]


# Changes


@on
async def test_a_change_is_written_once(store: TaskStore) -> None:
    task = make_task()
    await store.add(task)
    first = await store.apply(task.id, change(task, state=TesState.CANCELED, due_at=None))
    assert first is not None
    assert (first.state, first.version, first.due_at) == (TesState.CANCELED, 2, None)
    assert await store.apply(task.id, change(task, state=TesState.SYSTEM_ERROR, system=("lost",))) is None
    stored = await store.get(task.id, TesView.FULL)
    assert stored is not None
    assert stored.state is TesState.CANCELED
    assert stored.bodies is not None
    assert stored.bodies.system == {}


@on
async def test_a_change_leaves_what_it_does_not_name(store: TaskStore) -> None:
    task = make_task(inputs=[{"path": "/a", "content": "c"}], tags={"k": "v"})
    await store.add(task)
    attempt = make_attempt(task.id, beat=7, heard=NOW + 1.23456789)
    written = await store.apply(task.id, change(task, attempt=attempt, due_at=KEEP))
    assert written == replace(task, version=2, attempts=(attempt,), bodies=None)
    written = await store.apply(task.id, change(written, attempt=replace(attempt, number=2, job_id=f"{task.id}-2")))
    assert written is not None
    assert [each.number for each in written.attempts] == [1, 2]
    written = await store.apply(task.id, change(written, attempt=replace(attempt, beat=9), due_at=5.25))
    assert written is not None
    assert [(each.number, each.beat) for each in written.attempts] == [(1, 9), (2, 7)]
    assert written == await store.get(task.id, TesView.BASIC)
    full = await store.get(task.id, TesView.FULL)
    assert full is not None
    assert full.due_at == 5.25
    assert await store.contents(task.id) == {0: "c"}
    assert await ids(store, tags=(("k", "v"),)) == [task.id]
    with pytest.raises(ValueError):
        await store.apply(task.id, change(written, attempt=replace(attempt, number=4)))
    assert (await store.get(task.id, TesView.BASIC)) == written


@on
async def test_of_many_writers_one_wins_each_version(store: TaskStore) -> None:
    task = make_task()
    await store.add(task)
    wins = [0]

    async def writer(number: int) -> None:
        current: Task | None = task
        while current is not None:
            written = await store.apply(task.id, change(current, system=(str(number),), system_of=0))
            if written is not None:
                assert written.version == current.version + 1
                wins[0] += 1
                return
            current = await store.get(task.id)

    await asyncio.gather(*(writer(number) for number in range(50)))
    stored = await store.get(task.id, TesView.FULL)
    assert stored is not None
    assert (wins[0], stored.version) == (50, 51)
    assert stored.bodies is not None
    assert sorted(stored.bodies.system[0], key=int) == [str(number) for number in range(50)]


@on
async def test_bodies_grow_in_order(store: TaskStore) -> None:
    task: Task | None = make_task()
    assert task is not None
    await store.add(task)
    for step in (
        {"system": ("a", "b")},
        {"system": ("c",), "streams": {(1, 0, "stdout"): "out", (1, 0, "stderr"): "err"}, "system_of": 1},
        {"system": ("d", "d"), "streams": {(1, 12, "stdout"): "twelve", (2, 0, "stdout"): ""}},
        {"system": ("e",), "system_of": 1},
    ):
        task = await store.apply(task.id, change(task, **step))  # type: ignore[arg-type]
        assert task is not None
        assert task.bodies is None
    full = await store.get(task.id, TesView.FULL)
    assert full is not None
    assert full.bodies is not None
    assert {number: list(lines) for number, lines in full.bodies.system.items()} == {
        0: ["a", "b", "d", "d"],
        1: ["c", "e"],
    }
    assert full.bodies.streams == {
        (1, 0, "stdout"): "out",
        (1, 0, "stderr"): "err",
        (1, 12, "stdout"): "twelve",
        (2, 0, "stdout"): "",
    }


# The queue


@on
async def test_take_due_takes_what_is_due_longest_first(store: TaskStore) -> None:
    tasks = [make_task(record={"due_at": due}) for due in (NOW + 3, NOW + 1, None, NOW + 2, NOW + 9)]
    await added(store, *tasks)
    taken = await store.take_due(queued=True, now=NOW + 5, lease=30, limit=2)
    assert [task.id for task in taken] == [tasks[1].id, tasks[3].id]
    assert all((task.due_at, task.version) == (NOW + 35, 2) for task in taken)
    assert taken == [await store.get(task.id, TesView.BASIC) for task in taken]
    rest = await store.take_due(queued=True, now=NOW + 5, lease=30, limit=9)
    assert [task.id for task in rest] == [tasks[0].id]
    assert await store.take_due(queued=True, now=NOW + 5, lease=30, limit=9) == []
    assert await store.next_due(queued=True) == NOW + 9
    back = await store.take_due(queued=True, now=NOW + 35, lease=30, limit=9)
    assert {task.id for task in back} == {tasks[i].id for i in (0, 1, 3, 4)}
    assert back[0].id == tasks[4].id
    assert await store.take_due(queued=True, now=NOW, lease=30, limit=0) == []


@on
async def test_lanes_are_passed_over(store: TaskStore) -> None:
    sizes = [4, None, 3, 4, 1]
    tasks = [
        make_task(resources={"cpu_cores": size} if size else None, record={"due_at": NOW + at})
        for at, size in enumerate(sizes)
    ]
    await added(store, *tasks)
    large, small = lane(tasks[0].spec), lane(tasks[4].spec)
    assert await store.next_due(queued=True, skip=[large]) == NOW + 1
    assert await store.next_due(queued=True, skip=[large, small, lane(tasks[1].spec)]) is None
    taken = await store.take_due(queued=True, now=NOW + 9, lease=30, limit=9, skip=[large, "no such lane"])
    assert [task.id for task in taken] == [tasks[1].id, tasks[4].id]
    assert [task.version for task in taken] == [2, 2]
    rest = await store.take_due(queued=True, now=NOW + 9, lease=30, limit=9)
    assert [task.id for task in rest] == [tasks[0].id, tasks[2].id, tasks[3].id]


@on
async def test_the_last_report_of_a_site_counts(store: TaskStore) -> None:
    assert await store.reports() == {}
    await store.report("a", NOW, "one")
    await store.report("b", NOW, "{}")
    await store.report("a", NOW + 1, "two")
    assert await store.reports() == {"a": (NOW + 1, "two"), "b": (NOW, "{}")}


@on
async def test_what_is_due_too_late_is_brought_forward(store: TaskStore) -> None:
    late = [make_task(record={"due_at": NOW + due, "state": TesState.QUEUED}) for due in (900, 800, 700)]
    later = [make_task(record={"due_at": NOW + due, "state": TesState.RUNNING}) for due in (900, 800)]
    others = [make_task(record={"due_at": due}) for due in (None, NOW + 600)]
    await added(store, *late, *later, *others)
    assert await store.bring_forward(NOW + 600, NOW, 2) == 4
    assert await store.next_due(queued=False) == NOW
    queued = await store.take_due(queued=True, now=NOW, lease=30, limit=9)
    assert {task.id for task in queued} == {late[1].id, late[2].id}
    assert len(await store.take_due(queued=False, now=NOW, lease=30, limit=9)) == 2
    assert await store.bring_forward(NOW + 600, NOW + 1, 2) == 1
    assert await store.bring_forward(NOW + 600, NOW + 1, 2) == 0
    assert await store.get(others[0].id, TesView.FULL) == others[0]
    assert await store.apply(late[0].id, change(late[0], system=("nobody else has it",))) is not None


@on
async def test_queued_and_open_tasks_are_apart(store: TaskStore) -> None:
    tasks = {state: make_task(record={"state": state, "due_at": NOW}) for state in TesState}
    await added(store, *tasks.values())
    assert await store.next_due(queued=False) == NOW
    queued = await store.take_due(queued=True, now=NOW, lease=1, limit=99)
    assert [task.state for task in queued] == [TesState.QUEUED]
    rest = await store.take_due(queued=False, now=NOW, lease=1, limit=99)
    assert {task.state for task in rest} == set(TesState) - {TesState.QUEUED}


@on
async def test_what_is_taken_cannot_be_changed_by_who_read_it_before(store: TaskStore) -> None:
    task = make_task()
    await store.add(task)
    (taken,) = await store.take_due(queued=True, now=NOW, lease=30, limit=1)
    assert await store.apply(task.id, change(task, state=TesState.CANCELED)) is None
    assert await store.apply(task.id, change(taken, state=TesState.CANCELED)) is not None


@on
async def test_takers_never_share(store: TaskStore) -> None:
    tasks = await added(store, *(make_task() for _ in range(100)))
    rounds = await asyncio.gather(*(store.take_due(queued=True, now=NOW, lease=30, limit=7) for _ in range(20)))
    taken = [task.id for each in rounds for task in each]
    assert sorted(taken) == sorted(task.id for task in tasks)


@on
async def test_next_due_of_nothing(store: TaskStore) -> None:
    assert await store.next_due(queued=True) is None
    await store.add(make_task(record={"due_at": None}))
    assert await store.next_due(queued=True) is None
    assert await store.next_due(queued=False) is None


@on
async def test_loads_count_what_is_active(store: TaskStore) -> None:
    assert await store.loads() == {}
    resources = {"cpu_cores": 2, "ram_gb": 1.5}
    for state in TesState:
        for site in ("a", "b"):
            task = make_task(resources=resources if site == "a" else None, record={"state": state})
            await store.add(task)
            await store.apply(task.id, change(task, attempt=make_attempt(task.id, site=site)))
    assert await store.loads() == {"a": Load(3, 6.0, 4.5), "b": Load(3, 0.0, 0.0)}


@on
async def test_a_task_weighs_on_the_site_of_its_latest_attempt(store: TaskStore) -> None:
    task = make_task()
    await store.add(task)
    one = await store.apply(task.id, assign(task, "a", NOW, Rules()))  # type: ignore[arg-type]
    assert one is not None
    assert await store.loads() == {"a": Load(1)}
    two = await store.apply(task.id, change(one, attempt=make_attempt(task.id, 2, site="b")))
    assert await store.loads() == {"b": Load(1)}
    assert two is not None
    await store.apply(task.id, change(two, state=TesState.COMPLETE))
    assert await store.loads() == {}


@on
async def test_an_added_task_already_under_way_weighs_as_well(store: TaskStore) -> None:
    task = make_task(record={"state": TesState.RUNNING})
    await store.add(replace(task, attempts=(make_attempt(task.id, site="a"),)))
    assert await store.loads() == {"a": Load(1)}


# The bell, and the end


@on
async def test_the_bell_rings(store: TaskStore) -> None:
    ear = store.bell.listen()

    async def heard(what: Ring) -> bool:
        try:
            async with asyncio.timeout(0):
                await ear.wait(60, what)
        except TimeoutError:
            return False
        return True

    task = make_task()
    await store.add(task)
    assert await heard(Ring.QUEUED)
    assert not await heard(Ring.QUEUED | Ring.ROOM | Ring.OPEN)
    await store.apply(task.id, change(task, system=("nothing becomes due by this",)))
    assert not await heard(Ring.QUEUED | Ring.ROOM | Ring.OPEN)
    taken = (await store.take_due(queued=True, now=NOW, lease=1, limit=1))[0]
    assert not await heard(Ring.QUEUED | Ring.ROOM | Ring.OPEN)
    under_way = await store.apply(task.id, assign(taken, "a", NOW, Rules()))  # type: ignore[arg-type]
    assert under_way is not None
    assert await heard(Ring.OPEN)
    assert await store.apply(task.id, change(taken, due_at=1.0)) is None
    assert not await heard(Ring.QUEUED | Ring.ROOM | Ring.OPEN)
    await store.apply(task.id, change(under_way, state=TesState.COMPLETE))
    assert await heard(Ring.ROOM)


def test_a_closed_store_says_so(open_store: Open) -> None:
    async def main() -> None:
        store = open_store()
        with pytest.raises(StoreUnavailable):
            await store.add(make_task())
        async with store:
            await store.ping()
        with pytest.raises(StoreUnavailable):
            await store.ping()

    asyncio.run(main())


def test_closing_answers_every_call(open_store: Open) -> None:
    """Calls before, during and after the end are done or refused; none is left without an answer."""

    async def main() -> list[Any]:
        store = open_store()
        await store.__aenter__()
        work = [asyncio.create_task(store.add(make_task())) for _ in range(50)]
        await asyncio.sleep(0)
        ending = asyncio.create_task(store.__aexit__(None, None, None))
        await asyncio.sleep(0)
        work += [asyncio.create_task(store.add(make_task())) for _ in range(50)]
        work += [asyncio.create_task(store.ping()) for _ in range(5)]
        async with asyncio.timeout(10):
            await ending
            return await asyncio.gather(*work, return_exceptions=True)

    answers = asyncio.run(main())
    assert all(each is None or isinstance(each, StoreUnavailable) for each in answers)
    assert answers[:50] == [None] * 50


@on
async def test_a_caller_that_leaves_harms_nobody(store: TaskStore) -> None:
    tasks = [make_task() for _ in range(20)]
    calls = [asyncio.create_task(store.add(task)) for task in tasks]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    async with asyncio.timeout(10):
        while set(await ids(store)) != {task.id for task in tasks}:  # what was begun is done, soon
            await asyncio.sleep(0.01)


# A create happens once


def once(body: str = "b", sender: str = "here", **fields: Any) -> Once:
    return Once(body=body, sender=sender, **fields)


@on
async def test_a_key_keeps_one_task(store: TaskStore) -> None:
    first, second, other = make_task(name="first"), make_task(name="second"), make_task(name="other")
    assert await store.add(first, once("body 1", key="k")) is None
    expected = Repeat(first.id, first.created, "body 1", by_key=True)
    for body, sender in (("body 1", "here"), ("body 1", "there"), ("body 2", "here")):
        assert await store.add(second, once(body, sender, key="k", since=NOW + 1e9)) == expected
    assert await store.get(second.id) is None
    assert await store.add(other, once("body 1", key="K")) is None
    assert await store.get(first.id, TesView.FULL) == first
    assert await ids(store) == sorted([first.id, other.id], reverse=True)


@on
async def test_a_key_leaves_no_mark(store: TaskStore) -> None:
    assert await store.add(make_task(), once("b", "there", key="k")) is None
    assert await store.add(make_task(), once("b")) is None
    assert await store.add(make_task(), once("b", key="l")) is None
    assert len(await ids(store)) == 3


@on
async def test_of_many_adds_with_one_key_one_is_kept(store: TaskStore) -> None:
    tasks = [make_task(inputs=[{"path": "/a", "content": str(n)}]) for n in range(50)]
    found = await asyncio.gather(*(store.add(task, once(key="k")) for task in tasks))
    (kept,) = await ids(store)
    assert [task.id for task, repeat in zip(tasks, found, strict=True) if repeat is None] == [kept]
    assert {repeat.task_id for repeat in found if repeat is not None} == {kept}
    assert await store.contents(kept) == {0: next(str(n) for n, task in enumerate(tasks) if task.id == kept)}


@on
async def test_a_key_goes_with_its_task(store: TaskStore) -> None:
    first = make_task()
    await store.add(first, once(key="k"))
    await finish(store, first)
    assert await store.add(make_task(), once(key="k")) is not None
    assert await store.purge(store.clock() + 60, 10) == 1
    second = make_task()
    assert await store.add(second, once(key="k")) is None
    assert await ids(store) == [second.id]


@pytest.mark.parametrize("kind", [kind for kind in STORES if kind != "sqlite-memory"])
def test_keys_and_marks_outlive_their_process(kind: str, tmp_path: Path) -> None:
    async def add(opened: Open, *creates: tuple[Task, Once]) -> list[Repeat | None]:
        async with opened() as store:
            return [await store.add(*create) for create in creates]

    keyed, marked = make_task(), make_task()
    with STORES[kind](tmp_path) as opened:
        assert asyncio.run(add(opened, (keyed, once("b1", key="k")), (marked, once("b2")))) == [None, None]
        found = asyncio.run(add(opened, (make_task(), once("b1", key="k")), (make_task(), once("b2", "there"))))
        assert [repeat and repeat.task_id for repeat in found] == [keyed.id, marked.id]


@on
async def test_an_unanswered_create_of_another_sender_is_returned(store: TaskStore) -> None:
    first, second = make_task(), make_task()
    assert await store.add(first, once("b", "there")) is None
    expected = Repeat(first.id, first.created, "b", by_key=False, sender="there")
    assert await store.add(second, once("b", "here")) == expected
    assert await store.get(second.id) is None
    assert await store.add(make_task(), once("c", "here")) is None
    assert await store.add(make_task(), once("b", "there")) is None
    assert await store.add(second, once("b", "a third")) is not None
    assert len(await ids(store)) == 3


@on
async def test_an_answered_create_is_not_repeated(store: TaskStore) -> None:
    first, second, third = make_task(), make_task(), make_task()
    for task in (first, second):
        await store.add(task, once("b", "there"))
    await store.answered("there", {first.id: "b"})
    repeat = await store.add(third, once("b"))
    assert repeat is not None
    assert repeat.task_id == second.id
    await store.answered("there", {first.id: "b", second.id: "b"})
    assert await store.add(third, once("b")) is None
    assert {task.id for task in (first, second, third)} == set(await ids(store))


@on
async def test_answered_names_what_it_likes(store: TaskStore) -> None:
    task = make_task()
    await store.add(task, once("b", "there"))
    await store.answered("there", {})
    await store.answered("there", {make_task().id: "b", "no id": "c", "": ""})
    await store.answered("nobody", {"x" * 1000: "y" * 1000})
    assert await store.add(make_task(), once("b")) is not None
    await store.answered("there", {**{str(n): "b" for n in range(1000)}, task.id: "b"})
    assert await store.add(make_task(), once("b")) is None
    assert (await store.get(task.id)) == replace(task, document="", bodies=None)


@on
async def test_only_creates_of_a_while_are_repeated(store: TaskStore) -> None:
    task = make_task()
    await store.add(task, once("b", "there"))
    for since, until, repeats in (
        (NOW - 1, NOW + 1, True),
        (NOW - 1, NOW, True),
        (NOW, NOW + 1, False),
        (NOW - 2, NOW - 1, False),
    ):
        found = await store.add(make_task(), once("b", since=since, until=until))
        assert (found is not None) is repeats, (since, until)
        if found is None:
            (latest, *_) = await ids(store)
            await store.answered("here", {latest: "b"})


@on
async def test_a_burst_of_equal_creates_is_kept(store: TaskStore) -> None:
    tasks = [make_task() for _ in range(200)]
    assert set(await asyncio.gather(*(store.add(task, once()) for task in tasks))) == {None}
    assert len(await ids(store)) == 200
    repeat = await store.add(make_task(), once("b", "there"))
    assert repeat is not None
    await store.answered("here", {task.id: "b" for task in tasks})
    assert await store.add(make_task(), once("b", "there")) is None


# Rights


async def granted(store: TaskStore, right: str, holder: str, seconds: float = 60) -> float:
    """Wait until the holder gets the right."""
    async with asyncio.timeout(20):
        while (until := await store.hold(right, holder, seconds)) is None:
            await asyncio.sleep(0.01)
    return until


@on
async def test_a_right_has_one_holder(store: TaskStore) -> None:
    until = await store.hold("r", "a", 30)
    assert until is not None
    assert abs(until - store.clock() - 30) < 5
    assert await store.hold("r", "b", 30) is None
    assert await store.hold("another", "b", 30) is not None
    later = await store.hold("r", "a", 60)
    assert later is not None
    assert later > until
    assert await store.hold("r", "b", 0) is None
    assert await store.hold("r", "b", 30) is None


@on
async def test_a_right_runs_out(store: TaskStore) -> None:
    until = await store.hold("r", "a", 0.05)
    assert until is not None
    await granted(store, "r", "b")
    assert store.clock() > until - 1
    assert await store.hold("r", "a", 30) is None


@on
async def test_a_right_is_given_back(store: TaskStore) -> None:
    await store.hold("r", "a", 300)
    await store.hold("r", "a", 0)
    await granted(store, "r", "b")
    assert await store.hold("r", "a", 0) is None
    assert await store.hold("r", "a", 1) is None


@on
async def test_a_right_can_be_given_back_by_who_never_had_it(store: TaskStore) -> None:
    await store.hold("r", "a", 0)
    await granted(store, "r", "b")


@on
async def test_a_right_from_before_the_clock_was_set_back_is_none(store: TaskStore) -> None:
    (task,) = await added(store, make_task())
    until = await store.hold("r", "dead", LONGEST_RIGHT + 60)
    with pytest.raises(RightLost):
        await store.apply(task.id, change(task, system=("by its word",)), before=until)
    mine = await store.hold("r", "a", 60)
    assert mine is not None
    assert await store.hold("r", "dead", 60) is None
    assert await store.apply(task.id, change(task, system=("in time",)), before=mine) is not None


@on
async def test_of_many_takers_one_gets_the_right(store: TaskStore) -> None:
    for right in ("free", "given back"):
        if right == "given back":
            await store.hold(right, "before", 0)
        holders = [f"{right} {n}" for n in range(20)]
        found = await asyncio.gather(*(store.hold(right, holder, 60) for holder in holders))
        (winner,) = (holder for holder, until in zip(holders, found, strict=True) if until is not None)
        assert await store.hold(right, winner, 60) is not None


@on
async def test_a_change_is_written_while_the_right_lasts(store: TaskStore) -> None:
    task = make_task()
    await store.add(task)
    until = await store.hold("r", "a", 300)
    assert until is not None
    written = await store.apply(task.id, change(task, system=("in time",)), before=until)
    assert written is not None
    assert await store.apply(task.id, change(task, system=("raced",)), before=until) is None


@on
async def test_a_change_after_the_right_is_refused(store: TaskStore) -> None:
    task = make_task()
    await store.add(task)
    until = await store.hold("r", "a", 0.05)
    assert until is not None
    await granted(store, "r", "b")
    late = change(task, state=TesState.CANCELED, due_at=None, system=("late",), streams={(1, 0, "stdout"): "late"})
    with pytest.raises(RightLost):
        await store.apply(task.id, late, before=until)
    assert await store.get(task.id, TesView.FULL) == task
    behind = replace(late, version=7)
    assert await store.apply(task.id, behind, before=until) is None  # a lost race, whatever the time
    assert await store.apply("nothing", late, before=until) is None
    assert await store.apply(task.id, late) is not None


# The purge, and the clock


async def finish(store: TaskStore, task: Task, due_at: float | None = None) -> None:
    """End a task; cleaned up unless it is due once more."""
    ended = change(task, state=TesState.COMPLETE, due_at=due_at, system=("over",), streams={(1, 0, "stdout"): "out"})
    assert await store.apply(task.id, ended) is not None


@on
async def test_a_tail_is_shown_as_long_as_its_task_is_active(store: TaskStore) -> None:
    async def tail(task: Task) -> Tail | None:
        found, (listed,) = await store.get(task.id, TesView.FULL), (await store.page(Query(), TesView.FULL)).tasks
        assert found is not None
        assert found.bodies is not None
        assert listed.bodies is not None
        assert listed.bodies.tail == found.bodies.tail
        return found.bodies.tail

    (task,) = await added(store, make_task())
    one = Tail(attempt=1, executor=0, stdout="a\u00e4\U0001f600\n", stdout_bytes=8)
    await store.put_tail(task.id, one)
    assert await tail(task) is None, "a task that waits says nothing"
    await store.apply(task.id, change(task, state=TesState.INITIALIZING, attempt=make_attempt(task.id)))
    assert await tail(task) is None, "nor is it kept for later"
    await store.put_tail(task.id, one)
    assert await tail(task) == one
    two = replace(one, executor=1, stderr="b", stderr_bytes=1)
    for _ in range(2):
        await store.put_tail(task.id, two)
        assert await tail(task) == two
    current = await store.get(task.id, TesView.BASIC)
    assert current is not None
    assert (current.version, current.bodies) == (2, None)
    await finish(store, current)
    assert await tail(task) is None
    await store.put_tail(task.id, one)
    assert await tail(task) is None
    assert await store.purge(store.clock() + 60, 10) == 1
    await store.put_tail(task.id, one)
    assert await store.get(task.id, TesView.FULL) is None
    await store.add(replace(task, state=TesState.RUNNING))
    assert await tail(task) is None, "what came after the end was not kept"


@on
async def test_a_tail_that_races_with_the_end_of_its_attempt_is_gone(store: TaskStore) -> None:
    for _ in range(20):
        (task,) = await added(store, make_task(record={"state": TesState.RUNNING}))
        puts = [store.put_tail(task.id, Tail(attempt=1, executor=n)) for n in range(5)]
        await asyncio.gather(*puts[:2], store.apply(task.id, change(task, state=TesState.QUEUED)), *puts[2:])
        assert await store.apply(task.id, Change(version=2, state=TesState.INITIALIZING)) is not None
        found = await store.get(task.id, TesView.FULL)
        assert found is not None
        assert found.bodies is not None
        assert found.bodies.tail is None


@on
async def test_the_purge_takes_what_is_over(store: TaskStore) -> None:
    tagged = {"tags": {"k": "v", "l": ""}, "inputs": [{"path": "/a", "content": "c"}], "owner": "o"}
    active, unclean, over = (make_task(name=name, **tagged) for name in ("active", "unclean", "over"))
    await added(store, active, unclean, over)
    await finish(store, unclean, due_at=NOW)
    await finish(store, over)
    assert await store.purge(store.clock() - 60, 10) == 0
    assert len(await ids(store)) == 3
    assert await store.purge(store.clock() + 60, 10) == 1
    assert await store.purge(store.clock() + 60, 10) == 0
    for view in TesView:
        assert await store.get(over.id, view) is None
    assert await store.contents(over.id) == {}
    left = sorted([active.id, unclean.id], reverse=True)
    for query in ({}, {"owner": "o"}, {"tags": (("k", "v"),)}, {"tags": (("l", ""),)}, {"tags": (("k", ""),)}):
        assert await ids(store, **query) == left
    assert await ids(store, name_prefix="over") == []
    assert await ids(store, state=TesState.COMPLETE) == [unclean.id]
    assert await store.contents(active.id) == {0: "c"}
    again = make_task(record={"id": over.id})  # and nothing of the old one shows through
    await store.add(again)
    assert await store.get(over.id, TesView.FULL) == again


@on
async def test_the_purge_takes_the_oldest_first_and_no_more_than_asked_for(store: TaskStore) -> None:
    tasks = await added(store, *(make_task() for _ in range(5)))
    order = [tasks[n] for n in (3, 0, 4, 1, 2)]
    for task in order:
        await finish(store, task)
    assert await store.purge(store.clock() + 60, 0) == 0
    assert await store.purge(store.clock() + 60, 2) == 2
    assert set(await ids(store)) == {task.id for task in order[2:]}
    assert await store.purge(store.clock() + 60, 2) == 2
    assert await ids(store) == [order[4].id]
    assert await store.purge(store.clock() + 60, 2) == 1


@on
async def test_the_clock_is_about_right(store: TaskStore) -> None:
    assert abs(store.clock() - time.time()) < 5


# Stores that outlive their process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "er" / "tasks.sqlite"


def child(file: Path, work: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that does `work` on the same file."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store_work", str(file), work, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
        text=True,
    )


def test_everything_is_there_after_a_restart(file: Path) -> None:
    async def write() -> Task:
        async with SqliteStore(file) as store:
            task = make_task(owner="o", name="n", tags={"k": "v"}, inputs=[{"path": "/a", "content": "c"}])
            await store.add(task)
            bare = replace(task, bodies=None)
            await store.apply(
                task.id, change(bare, attempt=make_attempt(task.id), system=("line",), streams={(1, 0, "stdout"): "s"})
            )
            found = await store.get(task.id, TesView.FULL)
            assert found is not None
            return found

    async def read(task: Task) -> None:
        async with SqliteStore(file) as store:
            assert await store.get(task.id, TesView.FULL) == task
            assert await ids(store, tags=(("k", "v"),), owner="o", name_prefix="n") == [task.id]

    asyncio.run(read(asyncio.run(write())))


def test_nobody_else_may_read_the_file(file: Path) -> None:
    async def main() -> None:
        async with SqliteStore(file) as store:
            await store.add(make_task())
            assert {each.stat().st_mode & 0o077 for each in file.parent.iterdir()} == {0}

    file.parent.mkdir(parents=True, mode=0o755)
    asyncio.run(main())


def test_two_processes_never_take_the_same_task(file: Path) -> None:
    async def fill() -> list[Task]:
        async with SqliteStore(file) as store:
            return await added(store, *(make_task() for _ in range(300)))

    tasks = asyncio.run(fill())
    children = [child(file, "take_all") for _ in range(2)]
    for each in children:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in children:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    printed = [[each.stdout.readline().strip()] for each in children if each.stdout is not None]
    for each in children:
        assert each.stdin is not None
        each.stdin.write("go on\n")
        each.stdin.close()
    for own, each in zip(printed, children, strict=True):
        assert each.stdout is not None
        own += each.stdout.read().split()
        assert each.wait(timeout=30) == 0
        each.stdout.close()
    assert sorted(printed[0] + printed[1]) == sorted(task.id for task in tasks)


def test_processes_that_start_together_all_open_the_new_file(file: Path) -> None:
    children = [child(file, "just_open") for _ in range(3)]
    for each in children:
        each.communicate(timeout=30)
    assert [each.returncode for each in children] == [0] * 3

    async def count() -> int:
        async with SqliteStore(file) as store:
            return len(await ids(store))

    assert asyncio.run(count()) == 3


def test_kill_loses_no_acknowledged_task(file: Path) -> None:
    process = child(file, "add_for_ever")
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(60)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [
        line.strip() for line in process.communicate(timeout=10)[0].splitlines(keepends=True) if line[-1] == "\n"
    ]

    async def check() -> None:
        async with SqliteStore(file) as store:
            assert set(acknowledged) <= set(await ids(store))
            assert await store.contents(acknowledged[0]) == {0: "x" * 1000}
            await store.add(make_task())

    asyncio.run(check())
    with sqlite3.connect(file) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()


# Schema


def test_an_empty_file_of_version_0_is_migrated(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.touch()
    asyncio.run(_add_one(file))
    db = sqlite3.connect(file)
    assert db.execute("PRAGMA user_version").fetchone() == (len(sqlite_store.MIGRATIONS),)
    db.close()


def test_a_migration_keeps_the_data_and_is_noted(file: Path) -> None:
    """The path that the next schema will take, with a made-up one."""

    async def look() -> Task | None:
        async with SqliteStore(file) as store:
            return (await store.page(Query(), TesView.FULL)).tasks[0]

    asyncio.run(_add_one(file))
    before = asyncio.run(look())
    db = sqlite3.connect(file, isolation_level=None)
    later = (*sqlite_store.MIGRATIONS, "ALTER TABLE task ADD COLUMN colour TEXT; UPDATE task SET colour = 'red'")
    sqlite_store._migrate(db, later)
    assert db.execute("PRAGMA user_version").fetchone() == (len(later),)
    assert db.execute("SELECT colour FROM task").fetchall() == [("red",)]
    db.execute(f"PRAGMA user_version = {len(sqlite_store.MIGRATIONS)}")  # as this release knows it
    db.close()
    assert asyncio.run(look()) == before


def test_tasks_from_before_the_lanes_are_in_none(file: Path) -> None:
    """A store of the second schema: what waits there is not passed over, whatever lanes are."""
    file.parent.mkdir(parents=True)
    db = sqlite3.connect(file, isolation_level=None)
    sqlite_store._migrate(db, sqlite_store.MIGRATIONS[:2])
    db.execute("INSERT INTO task VALUES ('a', 'QUEUED', 1, 1.0, 1.0, '', '', NULL, 0, 0, '[]', NULL, NULL, NULL)")
    db.execute("INSERT INTO document VALUES ('a', ?)", (make_task().document,))
    db.close()

    async def look() -> None:
        async with SqliteStore(file) as store:
            assert await store.next_due(queued=True, skip=["0 0"]) == 1.0
            assert len(await store.take_due(queued=True, now=NOW, lease=1, limit=9, skip=["0 0"])) == 1

    asyncio.run(look())


def test_a_newer_schema_is_refused_in_a_sentence(file: Path) -> None:
    file.parent.mkdir(parents=True)
    db = sqlite3.connect(file)
    db.execute("CREATE TABLE future (x)")
    db.execute("PRAGMA user_version = 4711")
    db.close()
    with pytest.raises(StoreUnavailable, match=r"newer release \(schema 4711, this one knows \d+\)\."):
        asyncio.run(_add_one(file))
    db = sqlite3.connect(file)
    assert db.execute("PRAGMA user_version").fetchone() == (4711,)
    db.close()


async def _add_one(file: Path) -> None:
    async with SqliteStore(file) as store:
        await store.add(make_task())


# A disk that fails


def test_a_file_that_is_no_database(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"This is a poem, not a database.\n" * 500)
    with pytest.raises(StoreUnavailable, match="not a database"):
        asyncio.run(_add_one(file))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        asyncio.run(_add_one(tmp_path / "file" / "tasks.sqlite"))


def test_a_full_disk_is_said_and_survived(file: Path) -> None:
    process = child(file, "fill_the_disk")
    assert process.communicate(timeout=60)[0] == "good\n"
    assert process.returncode == 0


# Every query has its index


class Spy:
    """A connection that notes what is asked of it."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.asked: list[tuple[str, Any]] = []

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        self.asked.append((sql, values))
        return self.db.execute(sql, values)

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        rows = list(rows)
        self.asked += [(sql, row) for row in rows[:1]]
        return self.db.executemany(sql, rows)

    def plans(self) -> list[tuple[str, list[str]]]:
        """The steps of each statement since the last call."""
        asked, self.asked = self.asked, []
        return [
            (sql, [row[3] for row in self.db.execute("EXPLAIN QUERY PLAN " + sql, values)]) for sql, values in asked
        ]


QUERIES = {
    "all": Query(),
    "after": Query(after="x"),
    "state": Query(state=TesState.COMPLETE),
    "state after": Query(state=TesState.COMPLETE, after="x"),
    "owner": Query(owner="o"),
    "owner after": Query(owner="o", after="x"),
    "tag": Query(tags=(("k", "v"),)),
    "tag key": Query(tags=(("k", ""),), after="x"),
    "tags": Query(tags=(("k", "v"), ("l", ""), ("m", "w")), owner="o", state=TesState.QUEUED, name_prefix="n"),
    "name": Query(name_prefix="n"),
    "everything": Query(owner="o", state=TesState.QUEUED, name_prefix="n", after="x"),
}


@pytest.mark.parametrize("seed", range(5))
def test_adds_made_as_one_end_as_one_by_one(seed: int) -> None:
    random = Random(seed)
    adds: list[tuple[Task, Once | None]] = []
    for n in range(60):
        task = make_task(name=f"n{n % 3}", tags={"k": str(n), "l": "v"}, inputs=[{"path": "/a", "content": str(n)}])
        body, sender = random.choice("abc"), random.choice(["here", "here", "there", "far"])
        times = {"since": random.choice([0.0, NOW + 1]), "until": random.choice([NOW, NOW + 60])}
        adds.append((task, random.choice([None, once(body, sender, **times), once(body, key=random.choice("akx"))])))
    outcomes = []
    for lots in ([adds[:20], adds[20:]], [[add] for add in adds]):
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            sqlite_store._migrate(db)
            repeats = [repeat for lot in lots for repeat in sqlite_store._add_all(db, lot)]
            outcomes.append((repeats, sorted(db.iterdump())))
    at_once, singly = outcomes
    assert at_once == singly
    assert {each and each.by_key for each in singly[0]} == {None, True, False}


def test_of_adds_made_as_one_a_bad_one_fails_alone(file: Path) -> None:
    async def main() -> None:
        async with SqliteStore(file) as store:
            good, twice = [make_task() for _ in range(20)], make_task()
            adds = [*good[:10], twice, twice, *good[10:]]
            found = await asyncio.gather(*(store.add(task, once()) for task in adds), return_exceptions=True)
            assert [type(each) for each in found].count(StoreUnavailable) == 1
            assert isinstance(found[11], StoreUnavailable)
            assert await ids(store) == sorted([twice.id, *(task.id for task in good)], reverse=True)

    asyncio.run(main())


def test_every_query_uses_an_index() -> None:
    # The store's own functions, each with a connection that notes its statements.
    db = sqlite3.connect(":memory:", isolation_level=None)
    sqlite_store._migrate(db)
    spy: Any = Spy(db)
    task = make_task(inputs=[{"path": "/a", "content": "c"}], tags={"k": "v"})
    sqlite_store._add_all(spy, [(task, Once(body="b", sender="s"))])
    sqlite_store._answered(spy, "s", {task.id: "b"})
    sqlite_store._get(spy, task.id, TesView.FULL, None)
    sqlite_store._take_due(spy, True, NOW, 1, 5)
    sqlite_store._take_due(spy, False, NOW, 1, 5)
    sqlite_store._take_due(spy, True, NOW, 1, 5, ["1 1"])
    sqlite_store._next_due(spy, True)
    sqlite_store._next_due(spy, True, ["1 1"])
    sqlite_store._bring_forward(spy, True, NOW, NOW, 5)
    sqlite_store._bring_forward(spy, False, NOW, NOW, 5)
    sqlite_store._report(spy, "a", NOW, "text")
    sqlite_store._next_due(spy, False)
    sqlite_store._loads(spy)
    sqlite_store._bodies(spy, [task.id])
    sqlite_store._apply(spy, task.id, Change(version=2, system=("s",), streams={(1, 0, "stdout"): "x"}))
    for sql, steps in spy.plans():
        for step in steps:
            assert not step.startswith("SCAN task") or "INDEX" in step, (sql, steps)
            assert not step.startswith(("SCAN tag", "SCAN body", "SCAN unanswered", "SCAN mark")), (sql, steps)
            assert "TEMP B-TREE" not in step, (sql, steps)
    for name, query in QUERIES.items():
        for view in TesView:
            sqlite_store._page(spy, query, view)
            for sql, steps in spy.plans():
                for step in steps:
                    assert not step.startswith("SCAN task") or "INDEX" in step, (name, sql, steps)
                    assert not step.startswith(("SCAN tag", "SCAN body")), (name, sql, steps)
                    if not query.name_prefix:
                        assert "TEMP B-TREE" not in step, (name, sql, steps)
                if name not in ("all", "name"):
                    assert not any(step.startswith("SCAN task") for step in steps), (name, sql, steps)
    db.close()
