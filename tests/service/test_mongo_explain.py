"""Every command that the MongoDB store sends finds what it wants by an index, by the server's own word."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import MongoClient
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from tesp_api.lifecycle import Change
from tesp_api.store import FEW, Once, Query, TaskStore
from tesp_api.store.mongo import INDEXES, MongoStore, record_of
from tesp_api.task import Tail, Task
from tesp_api.tes import TesState, TesView
from tests import mongod
from tests.builders import NOW, make_attempt, make_bodies, make_task
from tests.contract.test_store import QUERIES
from tests.support import require

pytestmark = pytest.mark.service

Command = dict[str, Any]

QUERYING = {"find", "aggregate", "update", "delete", "findAndModify", "count", "distinct"}
OTHER = {"insert", "hello", "createIndexes", "getMore", "endSessions", "killCursors"}
"""Commands that look for nothing, or go on with what another has found."""

FRAME = {"lsid", "txnNumber", "writeConcern", "readConcern", "maxTimeMS"}
"""What every command carries besides its question, and `explain` does not take; so is all that begins with `$`."""

MORE_QUERIES = {
    "two states": Query(state=TesState.RUNNING, or_state=TesState.CANCELING),
    "two states of an owner": Query(state=TesState.RUNNING, or_state=TesState.CANCELING, owner="o", after="x"),
    "a rare name": Query(name_prefix="rare"),
    "a rare name after": Query(name_prefix="rare", after="x"),
    "a rare name of an owner": Query(name_prefix="rare", owner="o"),
    "a name that goes on for ever": Query(name_prefix="\U0010ffff"),
    "a name with a tag": Query(name_prefix="rare", tags=(("k", "v"),)),
}


@pytest.fixture(autouse=True)
def _needs_mongod() -> None:
    require(mongod.binary(), "No mongod: see scripts/mongod")


class Spy(CommandListener):
    """Notes the commands of all clients that it is given to."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def started(self, event: CommandStartedEvent) -> None:
        """Keep it."""
        self.commands.append(dict(event.command))

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Of no interest."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Of no interest."""


def tasks() -> Iterator[Task]:
    """Some thousand, with all that the queries ask for; names are n0, n1, ..., and ten rare ones."""
    states = list(TesState)
    for number in range(4000):
        task = make_task(
            name=f"rare{number}" if number % 400 == 0 else f"n{number}",
            owner="o" if number % 2 else "p",
            tags={"k": "v", "l": str(number), "m": "w"},
            record={"state": states[number % len(states)], "due_at": NOW + number, "bodies": make_bodies({0: "text"})},
        )
        yield replace(task, attempts=(make_attempt(task.id),) if number % 3 else ())


def fill(uri: str) -> list[str]:
    """Put them in; their ids."""
    both = [record_of(task) for task in tasks()]
    with MongoClient[Any](uri) as client:
        database = client.get_default_database()
        database["task"].insert_many([record for record, _ in both])
        database["text"].insert_many([piece for _, part in both for piece in part.pieces])
    return [record["_id"] for record, _ in both]


async def use_all(store: TaskStore, known: str) -> set[str]:
    """Call every operation in every way that leads to another command; the names of the operations."""
    task = make_task()
    once = Once(body="b", sender="me", since=NOW - 1)
    await store.add(task, once)
    assert await store.add(make_task(), replace(once, sender="you")) is not None
    with_key = replace(once, key="key")
    await store.add(make_task(), with_key)
    assert await store.add(make_task(), with_key) is not None
    await store.answered("me", {task.id: "b"})
    for each in (known, "gone"):
        await store.put_tail(each, Tail(attempt=1, executor=0))
    for view in TesView:
        await store.get(known, view, owner="o")
        for query in [*QUERIES.values(), *MORE_QUERIES.values()]:
            await store.page(query, view)
    for queued in (True, False):
        await store.next_due(queued=queued)
        assert await store.take_due(queued=queued, now=NOW + 2000, lease=30, limit=5)
    await store.next_due(queued=True, skip=["1 1", "2 2"])
    assert await store.take_due(queued=True, now=NOW + 2000, lease=30, limit=5, skip=["1 1", "2 2"])
    assert await store.bring_forward(NOW + 2000, NOW, 3) == 6
    await store.report("a", NOW, "text")
    assert await store.reports() == {"a": (NOW, "text")}
    assert await store.loads()
    until = await store.hold("right", "me", 60)
    assert await store.hold("right", "you", 60) is None
    task = make_task(inputs=[{"path": "/a", "content": "c"}])
    await store.add(task)
    change = Change(version=1, state=TesState.COMPLETE, due_at=None, attempt=make_attempt(task.id), system=("s",))
    assert await store.apply(task.id, change, before=until)  # type: ignore[arg-type]
    assert await store.apply(task.id, change) is None
    assert await store.contents(task.id) == {0: "c"}
    await store.hold("right", "me", 0)
    assert await store.purge(store.clock() + 1, 3)
    await store.ping()
    return {
        "add",
        "answered",
        "get",
        "page",
        "next_due",
        "take_due",
        "bring_forward",
        "loads",
        "report",
        "reports",
        "hold",
        "apply",
        "put_tail",
        "contents",
        "purge",
        "ping",
    }


def stages(plan: Any) -> Iterator[Mapping[str, Any]]:
    """All stages of a plan."""
    if isinstance(plan, dict):
        if "stage" in plan:
            yield plan
        plan = [value for name, value in plan.items() if name not in ("rejectedPlans", "parsedQuery", "command")]
    if isinstance(plan, list):
        for each in plan:
            yield from stages(each)


def single(command: Command) -> Iterator[Command]:
    """The command without its frame; `explain` takes one update or delete at a time."""
    bare = {name: value for name, value in command.items() if name not in FRAME and not name.startswith("$")}
    lists = [name for name in ("updates", "deletes") if name in bare]
    for name in lists:
        yield from ({**bare, name: [each]} for each in bare[name])
    if not lists:
        yield bare


def hints(command: Command) -> list[Any]:
    """Every hint in it."""
    inner = [each for name in ("updates", "deletes") for each in command.get(name, ())]
    return [each["hint"] for each in (command, *inner) if "hint" in each]


def by_id(command: Command) -> bool:
    """Whether it names the records that it is about."""
    (each,) = command.get("updates") or command.get("deletes") or [command]
    condition = each.get("q") or each.get("query") or each.get("filter") or {}
    return "_id" in condition and "$lt" not in str(condition["_id"])


def check(database: Any, command: Command) -> None:
    """Assert what this file is about for one command."""
    collection = str(command[next(iter(command))])
    plan = database.command("explain", command, verbosity="queryPlanner")
    found = list(stages(plan))
    kinds = [stage["stage"] for stage in found]
    said = f"{command}\n{kinds}"
    assert kinds, said
    assert "COLLSCAN" not in kinds, said
    assert {"IXSCAN", "IDHACK", "COUNT_SCAN", "DISTINCT_SCAN"} & {*kinds}, said
    indexes = database[collection].index_information()
    for hint in hints(command):
        assert hint in indexes, said
    if collection == "task":
        assert hints(command) or by_id(command), f"the server is left to choose: {said}"
    if "SORT" in kinds:
        assert hints(command) == ["name"], said
        (named,) = (each for each in command["filter"]["$and"] if "name" in each)
        assert database[collection].count_documents(named) < FEW, said


def test_every_command_uses_an_index() -> None:
    spy = Spy()

    def client(uri: str, **options: Any) -> Any:
        return AsyncIOMotorClient(uri, event_listeners=[spy], **options)

    async def work(uri: str) -> set[str]:
        async with MongoStore(uri, client=client) as store:
            known = fill(uri)
            return await use_all(store, known[-1])

    operations = {
        name for name, each in inspect.getmembers(TaskStore, inspect.iscoroutinefunction) if not name.startswith("_")
    }
    with mongod.database("standalone") as uri:
        assert asyncio.run(work(uri)) == operations
        assert {next(iter(command)) for command in spy.commands} <= QUERYING | OTHER
        asked = [each for command in spy.commands if next(iter(command)) in QUERYING for each in single(command)]
        assert {next(iter(each)) for each in asked} >= {"find", "aggregate", "update", "delete", "findAndModify"}
        with MongoClient[Any](uri) as plain:
            assert {hint for each in asked for hint in hints(each)} >= {index.document["name"] for index in INDEXES}
            for each in asked:
                check(plain.get_default_database(), each)
