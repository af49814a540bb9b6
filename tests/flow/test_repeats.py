"""A create happens once: with and without an Idempotency-Key, at one replica and at two that share a store."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from tesp_api.api import Access
from tesp_api.api.repeats import Creates, Limits, body_digest
from tesp_api.errors import StoreUnavailable
from tesp_api.store import Once, Query, Repeat, TaskStore
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Task
from tests.builders import HELLO, api_app, client_of, document, make_task, run

BODY = json.dumps(HELLO).encode()
OTHER = json.dumps(document(name="other")).encode()
PATIENT = Limits(slow=60, glance=60, settled=60)
"""Nothing is ever late, however slow this machine is."""
LATE = Limits(slow=0, glance=0)
"""Every answer may come too late."""
WATCHFUL = Limits(slow=60, glance=0, settled=60)
"""What counts is whether the sender is still there."""


async def nothing() -> None:
    pass


class Troubled(SqliteStore):
    """A store that does what the test says around its writes; an error `after` one leaves it done."""

    def __init__(self, path: Path | str = ":memory:") -> None:
        super().__init__(path)
        self.before: Callable[[], Awaitable[None]] = nothing
        self.after: Callable[[], Awaitable[None]] = nothing
        self.before_answered: Callable[[], Awaitable[None]] = nothing
        self.adds = 0
        self.batches: list[int] = []

    async def add(self, task: Task, once: Once | None = None) -> Repeat | None:
        self.adds += 1
        await self.before()
        repeat = await super().add(task, once)
        await self.after()
        return repeat

    async def answered(self, sender: str, creates: Mapping[str, str]) -> None:
        self.batches.append(len(creates))
        await self.before_answered()
        await super().answered(sender, creates)


def failing(times: int) -> Callable[[], Awaitable[None]]:
    """Says for a number of times that the store is away."""
    left = [times]

    async def fail() -> None:
        if left[0]:
            left[0] -= 1
            raise StoreUnavailable("The test wants it so.")

    return fail


class Gate:
    """Holds up whoever comes, one after the other until it is open."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.open.wait()


def app_on(store: TaskStore, creates: Creates, **options: Any) -> FastAPI:
    return api_app(store, creates=creates, clock=store.clock, **options)


@asynccontextmanager
async def replica(store: TaskStore, limits: Limits = PATIENT, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a process of its own on the store."""
    creates = Creates(store, limits)
    async with creates.noting(), client_of(app_on(store, creates, **options), "http://tes") as client:
        yield client


@asynccontextmanager
async def dead_replica(store: TaskStore) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a process that is killed before it can note an answer."""
    async with client_of(app_on(store, Creates(store, PATIENT)), "http://tes") as client:
        yield client


async def post(
    client: httpx.AsyncClient, content: bytes = BODY, status: int = 200, base: str = "/ga4gh/tes/v1", **headers: str
) -> str:
    answer = await client.post(
        f"{base}/tasks", content=content, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    assert answer.status_code == status, answer.text
    return str(answer.json()["id"] if status == 200 else answer.json()["message"])


async def stored(store: TaskStore) -> set[str]:
    page = await store.page(Query(limit=2000))
    assert not page.more
    return {task.id for task in page.tasks if task.owner != "probe"}


async def marked(store: TaskStore, content: bytes = BODY) -> bool:
    """Whether another process would find an unanswered create of this body."""
    once = Once(body=body_digest("", content), sender=secrets.token_hex(4))
    probe = make_task(owner="probe")
    if await store.add(probe, once) is not None:
        return True
    await store.answered(once.sender, {probe.id: once.body})
    return False


async def unmarked(store: TaskStore) -> None:
    async with asyncio.timeout(30):
        while await marked(store):
            await asyncio.sleep(0.01)


class Sender:
    """Posts one task over plain ASGI, and may leave without waiting for the answer."""

    def __init__(self, app: FastAPI, content: bytes = BODY) -> None:
        self._app, self._content = app, content
        self._sent = False
        self._gone = asyncio.Event()
        self.body = b""
        self.work = asyncio.create_task(self._post())

    def leave(self) -> None:
        """Hang up."""
        self._gone.set()

    async def _post(self) -> None:
        path = "/v1/tasks"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        more = {"headers": [(b"host", b"tes")], "http_version": "1.1", "scheme": "http", "root_path": ""}
        await self._app({**scope, **more, "asgi": {"version": "3.0"}}, self._receive, self._send)  # type: ignore[arg-type]

    async def _receive(self) -> Any:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.body += message.get("body", b"")

    @property
    def task_id(self) -> str:
        return str(json.loads(self.body)["id"])


# With a key


def test_a_key_makes_one_task(tmp_path: Path) -> None:
    async def flow() -> None:
        async with (
            SqliteStore(tmp_path / "s") as one,
            SqliteStore(tmp_path / "s") as two,
            replica(one) as here,
            replica(two) as there,
        ):
            first = await post(here, idempotency_key="k 1")
            for client in (here, there):
                for base in ("/v1", "/ga4gh/tes/v1"):
                    assert await post(client, base=base, idempotency_key="k 1") == first
            assert await post(there, idempotency_key="k 2") != first
            assert await post(there) != first
            message = await post(there, OTHER, 400, idempotency_key="k 1")
            assert message == "Idempotency-Key has been used for another request; use a new one for each task."
            many = await asyncio.gather(*(post(each, idempotency_key="m") for each in [here, there] * 10))
            assert len(set(many)) == 1
            assert len(await stored(one)) == 4

    run(flow())


@pytest.mark.parametrize("key", ["x" * 256, "", "\x7f", "a\tb", "ü"])
def test_a_wrong_key_is_named(key: str) -> None:
    async def flow() -> None:
        async with SqliteStore(":memory:") as store, replica(store) as client:
            answer = await client.post("/v1/tasks", content=BODY, headers=[(b"Idempotency-Key", key.encode())])
            assert answer.status_code == 400
            assert answer.json()["details"][0]["field"] == "Idempotency-Key"
            assert answer.json()["message"] == "Idempotency-Key must be 1 to 255 printable ASCII characters."
            two = [("Idempotency-Key", "a"), ("idempotency-key", "a")]
            answer = await client.post("/v1/tasks", content=BODY, headers=two)
            assert (answer.status_code, answer.json()["details"][0]["field"]) == (400, "Idempotency-Key")
            assert await stored(store) == set()
            assert await post(client, idempotency_key="~" * 255)

    run(flow())


def test_a_key_of_a_create_that_failed_after_its_write() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as client:
            store.after = failing(1)
            await post(client, status=503, idempotency_key="k")
            (kept,) = await stored(store)
            assert await post(client, idempotency_key="k") == kept
            assert await stored(store) == {kept}

    run(flow())


def test_owners_share_neither_keys_nor_bodies() -> None:
    async def by_header(request: Request) -> Access:
        return Access(owner=request.headers["x-name"])

    async def flow() -> None:
        async with SqliteStore(":memory:") as store, replica(store, LATE, access=by_header) as client:
            ann, bob = [await post(client, x_name=name, idempotency_key="k") for name in ("ann", "bob")]
            assert ann != bob
            assert await post(client, x_name="ann", idempotency_key="k") == ann
            ann, bob = [await post(client, x_name=name) for name in ("ann", "bob")]
            assert ann != bob
            assert await post(client, x_name="ann") == ann

    run(flow())


def test_a_bad_task_uses_up_no_key() -> None:
    async def flow() -> None:
        async with SqliteStore(":memory:") as store, replica(store) as client:
            await post(client, b"{}", 400, idempotency_key="k")
            assert await post(client, idempotency_key="k")

    run(flow())


# Without: equal tasks


def test_equal_creates_are_separate_tasks() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as client:
            ids = await asyncio.gather(*(post(client, base=base) for base in ["/v1", "/ga4gh/tes/v1"] * 100))
            ids += [await post(client) for _ in range(5)]
            assert len(set(ids)) == 205
            assert await stored(store) == set(ids)
            assert store.adds == 205
            await unmarked(store)

    run(flow())


def test_equal_creates_at_two_replicas_are_separate_tasks(tmp_path: Path) -> None:
    async def flow() -> None:
        async with (
            SqliteStore(tmp_path / "s") as one,
            SqliteStore(tmp_path / "s") as two,
            replica(one) as here,
            replica(two) as there,
        ):
            ids = await asyncio.gather(*(post(client) for client in [here, there] * 40))
            for client in (here, there, here, there):
                ids.append(await post(client))
            assert len(set(ids)) == 84
            assert await stored(one) == set(ids)

    run(flow())


def test_a_create_waits_for_the_answer_to_an_equal_one(tmp_path: Path) -> None:
    async def flow() -> None:
        async with (
            Troubled(tmp_path / "s") as one,
            Troubled(tmp_path / "s") as two,
            replica(one) as here,
            replica(two) as there,
        ):
            one.before_answered = gate = Gate()
            first = await post(here)
            second = asyncio.create_task(post(there))
            async with asyncio.timeout(30):
                while two.adds < 3:
                    await asyncio.sleep(0.01)
            assert not second.done()
            gate.open.set()
            assert await second != first
            assert len(await stored(one)) == 2

    run(flow())


# Without: repeats at the same process


def test_a_late_answer_is_given_again() -> None:
    async def flow() -> None:
        async with SqliteStore(":memory:") as store, replica(store, LATE) as client:
            first = await post(client)
            assert await post(client, base="/v1") == first
            assert await post(client, OTHER) != first
            assert len(await stored(store)) == 2
            assert await marked(store)

    run(flow())


def test_an_old_create_is_not_repeated() -> None:
    async def flow() -> None:
        async with SqliteStore(":memory:") as store, replica(store, Limits(slow=0, window=0)) as client:
            assert await post(client) != await post(client)

    run(flow())


def test_what_is_remembered_is_bounded() -> None:
    async def flow() -> None:
        async with SqliteStore(":memory:") as store, replica(store, Limits(slow=0, many=2)) as client:
            bodies = [json.dumps(document(name=str(n))).encode() for n in range(4)]
            ids = [await post(client, body) for body in bodies]
            assert await post(client, bodies[3]) == ids[3]
            assert await post(client, bodies[0]) != ids[0]

    run(flow())


@asynccontextmanager
async def a_sender_has_left() -> AsyncIterator[tuple[Troubled, FastAPI, Gate, Sender]]:
    """Store, application, the gate that the writes wait at, and a sender whose create waits there, and who has gone."""
    async with Troubled() as store:
        creates = Creates(store, WATCHFUL)
        async with creates.noting():
            app = app_on(store, creates)
            store.before = gate = Gate()
            first = Sender(app)
            await gate.reached.wait()
            first.leave()
            yield store, app, gate, first


def test_a_sender_that_left_is_answered_when_it_comes_again() -> None:
    async def flow() -> None:
        async with a_sender_has_left() as (store, app, gate, first):
            gate.open.set()
            await first.work
            assert await marked(store)
            second, third = Sender(app), Sender(app)
            await asyncio.gather(second.work, third.work)
            assert second.task_id == first.task_id
            assert third.task_id != first.task_id
            await unmarked(store)
            fourth = Sender(app)
            await fourth.work
            assert await stored(store) == {each.task_id for each in (second, third, fourth)}

    run(flow())


def test_a_repeat_waits_for_a_create_under_way() -> None:
    async def flow() -> None:
        async with a_sender_has_left() as (store, app, gate, first):
            second = Sender(app)
            stays = Sender(app)  # an equal one of somebody else
            async with asyncio.timeout(10):
                while store.adds < 2:
                    await asyncio.sleep(0.01)
            second.leave()
            third = Sender(app)
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(*(each.work for each in (first, second, third, stays)))
            assert first.task_id == second.task_id == third.task_id
            assert stays.task_id != first.task_id
            assert store.adds == 2
            assert await stored(store) == {first.task_id, stays.task_id}
            await unmarked(store)

    run(flow())


def test_a_create_that_failed_after_its_write() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as client:
            store.after = failing(1)
            await post(client, status=503)
            (kept,) = await stored(store)
            assert await post(client, base="/v1") == kept
            assert await post(client, base="/v1") != kept
            assert len(await stored(store)) == 2
            await unmarked(store)

    run(flow())


def test_a_create_that_failed_before_its_write() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as client:
            store.before = failing(2)
            await post(client, status=503)
            await post(client, status=503)
            assert await stored(store) == set()
            kept = await post(client)
            assert await stored(store) == {kept}
            assert await post(client) != kept
            await unmarked(store)

    run(flow())


class Delayed(Troubled):
    """Gives up on its first write, which gets through much later."""

    def __init__(self) -> None:
        super().__init__()
        self.late: Callable[[], Awaitable[Any]] | None = None

    async def add(self, task: Task, once: Once | None = None) -> Repeat | None:
        if self.late is None:
            self.late = lambda: super(Delayed, self).add(task, once)
            raise StoreUnavailable("No answer yet.")
        return await super().add(task, once)


@pytest.mark.parametrize("when", ["after", "between"])
def test_a_write_that_gets_through_after_its_repeat(when: str) -> None:
    """Both would store a task of their own, if the repeat had another id."""

    async def flow() -> None:
        async with Delayed() as store, replica(store) as client:
            await post(client, status=503)
            assert store.late is not None
            late = store.late
            if when == "between":  # the repeat has looked for the task, and has not written it yet

                async def get_through() -> None:
                    store.before = nothing
                    await late()

                store.before = get_through
            kept = await post(client)
            with pytest.raises(StoreUnavailable):
                await late()
            assert await stored(store) == {kept}

    run(flow())


def test_many_equal_creates_that_failed_end_as_many_tasks() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as client:
            store.before, store.after = failing(7), failing(13)
            statuses = await asyncio.gather(*(client.post("/v1/tasks", content=BODY) for _ in range(30)))
            failed = [answer for answer in statuses if answer.status_code == 503]
            ids = [answer.json()["id"] for answer in statuses if answer.status_code == 200]
            assert (len(failed), len(ids)) == (20, 10)
            assert len(await stored(store)) == 23
            ids += await asyncio.gather(*(post(client) for _ in failed))
            assert len(set(ids)) == 30
            assert await stored(store) == set(ids)
            await unmarked(store)

    run(flow())


# Without: repeats at another process


def test_a_create_of_a_killed_process_is_repeated(tmp_path: Path) -> None:
    async def flow() -> None:
        async with SqliteStore(tmp_path / "s") as one, SqliteStore(tmp_path / "s") as two:
            async with dead_replica(one) as killed:
                first = await post(killed)
            async with replica(two, Limits(settled=0.2)) as client:
                assert await post(client, OTHER) != first
                assert await post(client) == first
                await unmarked(two)
                assert await post(client) != first
                assert len(await stored(two)) == 3

    run(flow())


def test_an_old_mark_is_repeated_at_once() -> None:
    async def flow() -> None:
        async with Troubled() as store:
            task = make_task(now=store.clock() - 10)
            await store.add(task, Once(body=body_digest("", BODY), sender="killed"))
            async with replica(store, Limits(slow=5, glance=60, settled=4)) as client:
                store.adds = 0
                assert await post(client) == task.id
                assert store.adds == 1

    run(flow())


@pytest.mark.parametrize("age", [61, -30])
def test_marks_of_another_time_do_not_count(age: float) -> None:
    async def flow() -> None:
        async with SqliteStore(":memory:") as store:
            task = make_task(now=store.clock() - age)
            await store.add(task, Once(body=body_digest("", BODY), sender="killed"))
            async with replica(store) as client:
                assert await post(client) != task.id

    run(flow())


def test_who_is_late_takes_what_is_there() -> None:
    """Ours has then most likely been repeated itself."""

    async def flow() -> None:
        async with SqliteStore(":memory:") as store:
            async with dead_replica(store) as killed:
                first = await post(killed)
            async with replica(store, Limits(slow=0, settled=60)) as client:
                assert await post(client) == first
                assert await stored(store) == {first}

    run(flow())


def test_a_failed_create_is_repeated_at_another_process() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as here, replica(store, Limits(settled=0.2)) as there:
            store.after = failing(1)
            await post(here, status=503)
            (kept,) = await stored(store)
            assert await post(there) == kept

    run(flow())


# Marks


def test_marks_go_in_batches_also_when_the_store_was_away() -> None:
    async def flow() -> None:
        async with Troubled() as store, replica(store) as client:
            store.before_answered = failing(3)
            await asyncio.gather(*(post(client) for _ in range(600)))
            await unmarked(store)
            assert max(store.batches) == 500
            assert len(store.batches) < 30

    run(flow())


def test_marks_are_gone_when_the_service_has_stopped() -> None:
    async def flow() -> None:
        async with Troubled() as store:
            async with replica(store) as client:
                await asyncio.gather(*(post(client) for _ in range(20)))
            assert not await marked(store)
            assert [task for task in asyncio.all_tasks() if task.get_name() == "answered creates"] == []

    run(flow())


def test_a_service_stops_also_without_its_store(caplog: pytest.LogCaptureFixture) -> None:
    async def flow() -> None:
        async with Troubled() as store:
            async with replica(store) as client:
                store.before_answered = failing(1000)
                await post(client)
            assert await marked(store)

    run(flow())
    assert "1 marks of answered creates are left" in caplog.text
