"""What is particular to the store on MongoDB: the server's clock, long records, texts that nobody sees, its schema."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import MongoClient, WriteConcern

from tesp_api.errors import StoreUnavailable, StoreUnusable
from tesp_api.lifecycle import Change
from tesp_api.store import Once
from tesp_api.store.mongo import CLOCK_EVERY, INDEXES, MongoStore, record_of
from tesp_api.task import Task
from tesp_api.tes import TesState, TesView
from tests import mongod
from tests.builders import NOW, make_attempt, make_task, run

pytestmark = pytest.mark.service


@pytest.fixture
def uri() -> Iterator[str]:
    with mongod.database() as found:
        yield found


@pytest.fixture
def database(uri: str) -> Iterator[Any]:
    """What really lies in the database."""
    with MongoClient[Any](uri) as client:
        yield client.get_default_database()


class Ahead:
    """A client of a server whose clock is an hour ahead of ours, by its own word."""

    hours = 1

    def __init__(self, uri: str, **options: Any) -> None:
        self._client: Any = AsyncIOMotorClient(uri, **options)
        self.admin = self

    async def command(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self._client.admin.command(name)
        return {**answer, "localTime": answer["localTime"] + timedelta(hours=self.hours)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def test_the_time_is_the_servers(uri: str) -> None:
    """Two services whose clocks are an hour apart agree on what is due, and on who holds a right."""

    async def go() -> None:
        async with MongoStore(uri) as ours, MongoStore(uri, client=Ahead) as ahead:
            assert 3590 < ahead.clock() - ours.clock() < 3610
            until = await ours.hold("place", "me", 60)
            assert until is not None
            assert abs(until - 60 - ours.clock()) < 5
            assert await ahead.hold("place", "you", 60) is None, "the server's clock counts, not that of the caller"

    run(go())


def test_the_time_goes_on_by_what_nobody_sets(uri: str) -> None:
    """The clock of our machine does not matter, and that of the server is read anew now and then."""
    uptime, servers = 100.0, []

    def server(uri: str, **options: Any) -> Ahead:
        servers.append(Ahead(uri, **options))
        return servers[-1]

    async def go() -> None:
        nonlocal uptime
        async with MongoStore(uri, client=server, uptime=lambda: uptime) as store:
            await store.get("nothing")
            start = store.clock()
            assert store.clock() == start, "however long it took"
            uptime += CLOCK_EVERY / 2
            for each in servers:
                each.hours = 0
            await store.get("nothing")
            assert store.clock() == start + CLOCK_EVERY / 2
            uptime += CLOCK_EVERY
            await store.get("nothing")
            assert store.clock() < start - 3000

    run(go())


def test_a_late_write_is_refused_by_the_server(uri: str) -> None:
    async def go() -> None:
        async with MongoStore(uri) as store:
            task = make_task()
            await store.add(task)
            until = await store.hold("place", "me", 60)
            change = Change(version=1, due_at=5.0)
            assert await store.apply(task.id, change, before=until) is not None

    run(go())


def big(task_id: str, number: int, files: int) -> Any:
    """An attempt whose log lists many files."""
    outputs = [{"url": f"file:///data/out/{n:07}", "path": f"/out/{n:07}", "size_bytes": str(n)} for n in range(files)]
    return make_attempt(task_id, number, log={"outputs": outputs})


def test_no_record_comes_near_the_limit(uri: str, database: Any) -> None:
    """A document of megabytes, megabytes of tags, many attempts with long lists of files: all comes back."""

    async def go() -> Task:
        async with MongoStore(uri) as store:
            arguments = ["x" * 1000] * 4000
            tags = {f"k{n}": "v" * 3000 for n in range(1000)}
            task = make_task(executors=[{"image": "i", "command": arguments}], tags=tags)
            await store.add(task)
            current: Task | None = replace(task, bodies=None)
            for number in range(1, 6):
                assert current is not None
                current = await store.apply(
                    task.id, Change(version=current.version, attempt=big(task.id, number, 20_000), system=("l",))
                )
            assert current is not None
            found = await store.get(task.id, TesView.BASIC)
            assert found == current
            assert found.document == task.document
            assert [len(each.log.outputs) for each in found.attempts] == [20_000] * 5
            again = await store.apply(task.id, Change(version=current.version, attempt=make_attempt(task.id, 2)))
            assert again is not None
            assert [len(each.log.outputs) for each in again.attempts] == [20_000, 0, 20_000, 20_000, 20_000]
            return again

    task = run(go())
    (size,) = database.task.aggregate([{"$match": {"_id": task.id}}, {"$project": {"size": {"$bsonSize": "$$ROOT"}}}])
    assert size["size"] < 8 << 20
    pieces = database.text.aggregate([{"$project": {"size": {"$bsonSize": "$$ROOT"}}}])
    assert max(each["size"] for each in pieces) < 8 << 20


def test_texts_of_a_write_that_came_to_nothing_are_not_seen(uri: str, database: Any) -> None:
    """Killed between the texts and the record, or too late: nobody sees those lines."""

    async def go() -> None:
        async with MongoStore(uri) as store:
            task = make_task()
            await store.add(task)
            late = Change(version=7, system=("never",), streams={(1, 0, "stdout"): "never"})
            assert await store.apply(task.id, late) is None
            assert database.text.count_documents({}) == 0, "and they are tidied away"
            first = await store.apply(task.id, Change(version=1, system=("seen",)))
            assert first is not None
            piece = database.text.find_one()
            database.text.insert_one({**piece, "_id": piece["_id"] + "x", "part": "of a dead process"})
            found = await store.get(task.id, TesView.FULL)
            assert found is not None
            assert found.bodies is not None
            assert found.bodies.system == {0: ["seen"]}

    run(go())


def test_indexes_are_made_and_kept(uri: str, database: Any) -> None:
    async def go() -> None:
        async with MongoStore(uri), MongoStore(uri):  # two that start together
            pass
        async with MongoStore(uri):
            pass

    run(go())
    assert set(database.task.index_information()) == {"_id_", *(each.document["name"] for each in INDEXES)}


def test_an_index_of_an_older_release_gives_way(uri: str, database: Any) -> None:
    database.task.create_index([("colour", 1)], name="due")
    database.task.create_index([("key", 1)], name="key")

    async def go() -> None:
        async with MongoStore(uri) as store:
            await store.add(make_task())
            assert len(await store.take_due(queued=True, now=NOW, lease=1, limit=5)) == 1

    run(go())
    found = database.task.index_information()
    assert [name for name, _ in found["due"]["key"]] == ["queued", "due_at", "lane", "_id"]
    assert found["key"]["unique"]


def test_a_store_of_a_newer_release_is_refused(uri: str, database: Any) -> None:
    async def go() -> None:
        async with MongoStore(uri):
            pass

    run(go())
    database.right.update_one({"_id": "schema"}, {"$set": {"version": 99}})
    with pytest.raises(StoreUnusable, match="newer release"):
        run(go())
    assert database.right.find_one({"_id": "schema"})["version"] == 99


def test_takers_that_meet_still_get_everything(uri: str) -> None:
    """Four services, many due tasks, all at once: each task goes to one of them, and none is left over."""

    async def go() -> None:
        stores = [MongoStore(uri) for _ in range(4)]
        for each in stores:
            await each.__aenter__()
        tasks = [make_task() for _ in range(400)]
        await asyncio.gather(*(stores[0].add(task) for task in tasks))

        async def take(store: MongoStore) -> list[str]:
            taken: list[str] = []
            while batch := await store.take_due(queued=True, now=NOW, lease=60, limit=20):
                taken += [task.id for task in batch]
            return taken

        shares = await asyncio.gather(*map(take, stores))
        assert sorted(each for share in shares for each in share) == sorted(task.id for task in tasks)
        assert {each.state for each in tasks} == {TesState.QUEUED}
        for store in stores:
            await store.__aexit__(None, None, None)

    run(go())


def test_a_repeat_is_answered_only_with_a_task_that_no_failover_takes_back(tmp_path: Path) -> None:
    """The record of a create whose process died lies on the primary alone, which is cut off and then dies too."""
    once = Once(body="the same", sender="one", key="key")

    async def go(replicas: mongod.ReplicaSet) -> None:
        async with MongoStore(replicas.uri) as store:
            primary = replicas.primary()
            others = [node for node in replicas.nodes if node is not primary]
            for node in others:
                node.pause()
            with MongoClient[Any](primary.uri) as client:
                tasks = client.get_database("tesp", write_concern=WriteConcern(1))["task"]
                tasks.insert_one(record_of(make_task(), once)[0])
            repeated = make_task()
            asking = asyncio.create_task(store.add(repeated, once))
            await asyncio.wait([asking], timeout=0.5)
            assert not asking.done(), "nobody can know yet whether that record stays"
            primary.kill()
            for node in others:
                node.resume()
            try:
                repeat = await asking
            except StoreUnavailable:
                repeat = await store.add(repeated, once)
            assert await store.get(repeat.task_id if repeat else repeated.id) is not None

    with mongod.ReplicaSet(tmp_path, 3) as replicas:
        run(go(replicas))
