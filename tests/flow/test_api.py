"""The TES API in process: the real routes over a real store in memory."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from tesp_api import lifecycle
from tesp_api.api import Access
from tesp_api.api.tasks import page_token
from tesp_api.lifecycle import Change, Policy
from tesp_api.parameters import Offer
from tesp_api.store import Query, TaskStore
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Task
from tesp_api.tes import TesView
from tests.builders import HELLO, NOW, SERVICE, api_app, client_of, document, make_task, run

Flow = Callable[[httpx.AsyncClient, TaskStore], Awaitable[None]]


def with_api(
    flow: Flow, store: SqliteStore | None = None, base: str = "http://tes/ga4gh/tes/v1", **options: Any
) -> None:
    """Run `flow` with a client and the store behind the API."""

    async def go() -> None:
        async with store or SqliteStore(":memory:") as opened, client_of(api_app(opened, **options), base) as client:
            await flow(client, opened)

    run(go())


async def create(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await client.post("tasks", json=document(**fields))
    assert answer.status_code == 200, answer.text
    assert answer.json().keys() == {"id"}
    return str(answer.json()["id"])


async def names(client: httpx.AsyncClient, query: Any) -> list[str]:
    answer = await client.get("tasks", params=[("view", "BASIC"), *query])
    assert answer.status_code == 200, answer.text
    return [task["name"] for task in answer.json()["tasks"]]


def assert_problem(answer: httpx.Response, status: int, field: str = "") -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"status", "error", "message", "details"}
    assert body["status"] == status
    assert body["message"].endswith((".", "?"))
    if field:
        assert body["details"][0]["field"] == field
        assert body["message"].startswith(f"{field} ")


def assert_no_nulls(value: Any) -> None:
    assert value is not None
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_no_nulls(item)


# --- create and get ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["http://tes/ga4gh/tes/v1", "http://tes/v1"])
def test_create_get_cancel(base: str) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client)
        assert (await client.get(f"tasks/{task_id}")).json() == {"id": task_id, "state": "QUEUED"}
        assert (await client.post(f"tasks/{task_id}:cancel")).json() == {}
        assert (await client.get(f"tasks/{task_id}")).json() == {"id": task_id, "state": "CANCELED"}

    with_api(flow, base=base)


def test_answers_hold_what_was_sent_and_no_nulls() -> None:
    """py-tes fails on any key that it does not know, and its old version on nulls as well."""
    sent = document(
        description="d",
        inputs=[{"path": "/a", "content": "text"}, {"path": "/b", "url": "s3://", "name": "n"}],
        outputs=[{"path": "/o/*", "path_prefix": "/o", "url": "file:///x/"}],
        resources={"cpu_cores": 1.0, "ram_gb": 0.5, "zones": ["a"]},
        volumes=["/v"],
        tags={"a": ""},
    )
    kept = json.loads(json.dumps(sent))
    for item in (*kept["inputs"], *kept["outputs"]):
        item["type"] = "FILE"

    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        noisy = {**sent, "id": "7", "state": 0, "logs": None, "creation_time": None, "vendor": 1}
        task_id = (await client.post("tasks", json=noisy)).json()["id"]
        assert task_id != "7"
        server = {"id": task_id, "state": "QUEUED", "creation_time": "2025-06-15T15:06:40.000000Z"}
        full = (await client.get(f"tasks/{task_id}?view=FULL")).json()
        assert full == {**kept, **server}
        basic = (await client.get(f"tasks/{task_id}?view=BASIC")).json()
        assert "content" not in basic["inputs"][0]
        assert (await client.get("tasks?view=FULL")).json() == {"tasks": [full]}
        assert (await client.get("tasks?view=BASIC")).json() == {"tasks": [basic]}
        assert (await client.get("tasks")).json() == {"tasks": [{"id": task_id, "state": "QUEUED"}]}
        for path in (f"tasks/{task_id}?view=FULL", "tasks?view=FULL", "service-info", "tasks/service-info"):
            assert_no_nulls((await client.get(path)).json())

    with_api(flow)


def test_running_task_has_no_log_of_an_executor_that_still_runs() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client)
        task = await store.get(task_id, TesView.BASIC)
        assert task is not None
        change = lifecycle.assign(task, "local", NOW, Policy())
        assert change is not None
        assert await store.apply(task_id, change) is not None
        shown = (await client.get(f"tasks/{task_id}?view=FULL")).json()
        assert shown["state"] == "INITIALIZING"
        assert shown["logs"][0]["logs"] == []
        assert shown["logs"][0]["metadata"] == {"site": "local"}

    with_api(flow)


def test_bad_task() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        assert_problem(await client.post("tasks", json=document(executors=[])), 400, "executors")
        assert_problem(await client.post("tasks", content=b"{"), 400)
        assert_problem(await client.post("tasks"), 400)
        assert (await client.get("tasks")).json() == {"tasks": []}

    with_api(flow)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/xml"])
def test_content_type_does_not_matter(content_type: str) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        answer = await client.post("tasks", content=json.dumps(HELLO), headers={"content-type": content_type})
        assert answer.status_code == 200

    with_api(flow)


def test_large_bodies() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        text = "x" * (1 << 20)
        task_id = await create(client, inputs=[{"path": "/a", "content": text}])
        assert (await client.get(f"tasks/{task_id}?view=FULL")).json()["inputs"][0]["content"] == text
        assert_problem(await client.post("tasks", content=b" " * (2 << 20)), 413)

        async def pieces() -> Any:
            for _ in range(32):
                yield b" " * (64 << 10)

        assert_problem(await client.post("tasks", content=pieces()), 413)

    with_api(flow, max_body=(1 << 20) + 1000)


def test_backend_parameters() -> None:
    service = replace(SERVICE, backend_parameters=("site",))

    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client, resources={"backend_parameters": {"Site": "a", "VmSize": "b"}})
        shown = (await client.get(f"tasks/{task_id}?view=FULL")).json()
        assert shown["resources"] == {"backend_parameters": {"Site": "a"}}
        assert "'VmSize' is not supported" in shown["logs"][0]["system_logs"][0]
        strict = {"backend_parameters": {"VmSize": "b"}, "backend_parameters_strict": True}
        answer = await client.post("tasks", json=document(resources=strict))
        assert_problem(answer, 400, "resources.backend_parameters.VmSize")
        info = (await client.get("service-info")).json()
        assert info["tesResources_backend_parameters"] == ["site"]

        for value in ({"site": "b"}, {"SITE": ""}):  # makes no sense, strict or not
            answer = await client.post("tasks", json=document(resources={"backend_parameters": value}))
            assert_problem(answer, 400, f"resources.backend_parameters.{next(iter(value))}")

    with_api(flow, service=service, offers={"a": Offer()})


def test_canceling_can_be_folded() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client)
        task = await store.get(task_id, TesView.BASIC)
        assert task is not None
        change = lifecycle.assign(task, "local", NOW, Policy())
        assert change is not None
        await store.apply(task_id, change)
        assert (await client.post(f"tasks/{task_id}:cancel")).json() == {}
        assert (await client.get(f"tasks/{task_id}")).json()["state"] == "RUNNING"
        assert (await client.get(f"tasks/{task_id}?view=BASIC")).json()["state"] == "RUNNING"
        shown = {"id": task_id, "state": "RUNNING"}
        assert (await client.get("tasks?state=RUNNING")).json() == {"tasks": [shown]}
        assert (await client.get("tasks?state=CANCELING")).json() == {"tasks": []}
        assert (await client.post(f"tasks/{task_id}:cancel")).json() == {}

    with_api(flow, fold_canceling=True)


# --- paths and methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ga4gh/tes/v1/ga4gh/tes/v1/tasks", 404),
        ("POST", "/ga4gh/tes/v1/v1/tasks", 404),
        ("GET", "/v1/ga4gh/tes/v1/service-info", 404),
        ("GET", "/tasks", 404),
        ("GET", "/v1/tasks/none", 404),
        ("GET", "/v1/tasks/none?view=FULL", 404),
        ("GET", "/v1/tasks/%00", 404),
        ("GET", "/v1/tasks/%ff%fe", 404),
        ("GET", "/v1/tasks/" + "x" * 5000, 404),
        ("GET", "/v1/tasks/a%2Fb", 404),
        ("POST", "/v1/tasks/none:cancel", 404),
        ("POST", "/v1/tasks/%00:cancel", 404),
        ("POST", "/v1/tasks/none", 405),
        ("GET", "/v1/tasks/none:cancel", 405),
        ("DELETE", "/v1/tasks", 405),
        ("PUT", "/v1/service-info", 405),
        ("PATCH", "/v1/tasks/none", 405),
    ],
)
def test_nothing_there(method: str, path: str, status: int) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        answer = await client.request(method, path)
        assert_problem(answer, status)
        if status == 405:
            assert "OPTIONS" in answer.headers["allow"]

    with_api(flow, base="http://tes")


def test_head_and_options() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        assert (await client.head("tasks")).status_code == 200
        assert (await client.head("tasks/none")).status_code == 404
        answer = await client.options("tasks")
        assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
        assert (await client.options("tasks/x:cancel")).headers["allow"] == "OPTIONS, POST"

    with_api(flow)


def test_service_info() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        assert (await client.get("service-info")).json() == {
            "id": "org.example.tes",
            "name": "Test TES",
            "type": {"group": "org.ga4gh", "artifact": "tes", "version": "1.1.0"},
            "description": "For tests",
            "organization": {"name": "Example", "url": "https://example.org"},
            "version": "1.2.3",
            "storage": ["file:///data"],
            "tesResources_backend_parameters": [],
        }
        old = {"name": "Test TES", "doc": "For tests", "storage": ["file:///data"]}
        assert (await client.get("tasks/service-info")).json() == old

    with_api(flow)


def test_docs() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        assert (await client.get("/")).headers["location"] == "/docs"
        page = await client.get("/docs")
        assert page.status_code == 200
        assert "/openapi.json" in page.text
        if importlib.util.find_spec("fastapi_offline"):
            linked = re.findall(r'(?:href|src)="([^"]+)"', page.text)
            assert len(linked) >= 3
            for link in linked:
                assert (await client.get(link)).status_code == 200

    with_api(flow, base="http://tes")


# --- cancel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"content": b"{}"},
        {"content": b"garbage"},
        {"content": b"", "headers": {"content-type": "application/json"}},
        {"headers": {"authorization": "Basic Tm9uZTpOb25l"}},
    ],
)
def test_cancel_with_any_body_and_twice(request_body: dict[str, Any]) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client)
        for _ in range(2):
            answer = await client.post(f"tasks/{task_id}:cancel", **request_body)
            assert (answer.status_code, answer.json()) == (200, {})
            answer = await client.post(f"tasks/{task_id}%3Acancel", **request_body)
            assert (answer.status_code, answer.json()) == (200, {})

    with_api(flow)


class Contended(SqliteStore):
    """Lets somebody else be faster, a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__(":memory:")
        self.times = times

    async def apply(self, task_id: str, change: Change) -> Task | None:
        if self.times:
            self.times -= 1
            await super().apply(task_id, Change(version=change.version, system=("faster",)))
        return await super().apply(task_id, change)


def test_cancel_tries_again_when_somebody_was_faster() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client)
        assert (await client.post(f"tasks/{task_id}:cancel")).status_code == 200
        assert (await client.get(f"tasks/{task_id}")).json()["state"] == "CANCELED"

    with_api(flow, Contended(3))


def test_cancel_gives_up_in_the_end() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        task_id = await create(client)
        assert_problem(await client.post(f"tasks/{task_id}:cancel"), 503)

    with_api(flow, Contended(10_000))


# --- list ----------------------------------------------------------------------------------------------------------

TRUTH = [
    # filter, tags of a task, whether they match: the table of the standard, and a few more
    ([("foo", "bar")], {"foo": "bar"}, True),
    ([("foo", "bar")], {"foo": "bat"}, False),
    ([("foo", "")], {"foo": ""}, True),
    ([("foo", "bar"), ("baz", "bat")], {"foo": "bar", "baz": "bat"}, True),
    ([("foo", "bar")], {"foo": "bar", "baz": "bat"}, True),
    ([("foo", "bar"), ("baz", "bat")], {"foo": "bar"}, False),
    ([("foo", "")], {"foo": "bar"}, True),
    ([("foo", "")], {}, False),
    ([("foo", "bar"), ("foo", "bat")], {"foo": "bar"}, False),
    ([("foo", "bar"), ("foo", "bar")], {"foo": "bar"}, True),
    ([("a.b", "$c")], {"a.b": "$c"}, True),
    ([("a.b", "")], {"a": "b"}, False),
    ([("FOO", "bar")], {"foo": "bar"}, False),
    ([("foo", "%")], {"foo": "bar"}, False),
]


@pytest.mark.parametrize(("pairs", "tags", "matches"), TRUTH)
def test_tags(pairs: list[tuple[str, str]], tags: dict[str, str], matches: bool) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        await create(client, name="the one", tags=tags)
        keys = [("tag_key", key) for key, _ in pairs]
        values = [("tag_value", value) for _, value in pairs]
        expected = ["the one"] if matches else []
        assert await names(client, [*keys, *values]) == expected
        assert await names(client, [pair for two in zip(keys, values, strict=True) for pair in two]) == expected
        while values and not values[-1][1]:
            values.pop()
            assert await names(client, [*keys, *values]) == expected

    with_api(flow)


def test_name_prefix_is_literal() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        every = ["abc", "a.c", "a%c", "a_c", "a[b]", "a\\c", "Abc", "ä", ".*", "'; --", "a*"]
        for name in every:
            await create(client, name=name)
        await client.post("tasks", json=document(name=None))
        for prefix in [*every, "a", "A", ".", "%", "_", "^a", "ab", "abcd", "'"]:
            found = await names(client, [("name_prefix", prefix)])
            assert sorted(found) == sorted(name for name in every if name.startswith(prefix)), prefix
        answer = await client.get("tasks", params={"name_prefix": ""})
        assert len(answer.json()["tasks"]) == len(every) + 1

    with_api(flow)


def test_state_and_several_filters() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        await create(client, name="a1", tags={"x": "1"})
        gone = await create(client, name="a2", tags={"x": "1"})
        await create(client, name="b3", tags={"x": "1"})
        await client.post(f"tasks/{gone}:cancel")
        assert await names(client, [("state", "QUEUED")]) == ["b3", "a1"]
        assert await names(client, [("state", "canceled")]) == ["a2"]
        assert await names(client, [("state", "UNKNOWN")]) == []
        assert await names(client, [("state", "")]) == ["b3", "a2", "a1"]
        assert await names(client, [("state", "QUEUED"), ("name_prefix", "a"), ("tag_key", "x")]) == ["a1"]

    with_api(flow)


@pytest.mark.parametrize("filters", [{}, {"name_prefix": "hel"}, {"tag_key": "x"}, {"state": "QUEUED"}])
def test_paging_through_tasks_of_one_moment(filters: dict[str, str]) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        tasks = [make_task(tags={"x": "y"}) for _ in range(1000)]
        await asyncio.gather(*(store.add(task) for task in tasks))
        seen: list[str] = []
        token, pages = "", 0
        while True:
            page = (await client.get("tasks", params={"page_size": 99, "page_token": token, **filters})).json()
            seen += [task["id"] for task in page["tasks"]]
            pages += 1
            token = page.get("next_page_token")
            if token is None:
                break
            assert len(page["tasks"]) == 99
        assert seen == sorted((task.id for task in tasks), reverse=True)
        assert pages == 11
        assert len((await client.get("tasks")).json()["tasks"]) == 256
        assert len((await client.get("tasks?page_size=2047")).json()["tasks"]) == 1000
        exact = (await client.get("tasks?page_size=1000")).json()
        assert "next_page_token" not in exact

    with_api(flow)


def test_a_page_is_not_shifted_by_new_tasks() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        ids = [await create(client) for _ in range(4)]
        first = (await client.get("tasks?page_size=2")).json()
        await create(client)
        second = (await client.get("tasks", params={"page_token": first["next_page_token"]})).json()
        assert [task["id"] for task in first["tasks"] + second["tasks"]] == ids[::-1]

    with_api(flow)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("page_size=0", "page_size"),
        ("page_size=2048", "page_size"),
        ("page_size=-1", "page_size"),
        ("page_size=1.5", "page_size"),
        ("page_size=ten", "page_size"),
        ("page_size=%D9%A3", "page_size"),
        ("page_size=" + "9" * 5000, "page_size"),
        ("page_size=1&page_size=2", "page_size"),
        ("view=SOME", "view"),
        ("view=BASIC&view=FULL", "view"),
        ("state=DONE", "state"),
        ("state=%00", "state"),
        ("name_prefix=%00", "name_prefix"),
        ("tag_value=x", "tag_value"),
        ("tag_key=a&tag_value=x&tag_value=y", "tag_value"),
        ("tag_key=%00", "tag_key"),
        ("&".join(["tag_key=x"] * 101), "tag_key"),
        ("page_token=x", "page_token"),
        ("page_token=%00", "page_token"),
        ("page_token=%C3%BC", "page_token"),
        ("page_token=W10", "page_token"),
        ("page_token=WzEsIm4iLCJ4Il0", "page_token"),
        ("page_token=" + "W" * 60_000, "page_token"),
    ],
)
def test_bad_query(query: str, field: str) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        assert_problem(await client.get(f"tasks?{query}"), 400, field)
        if field == "view":
            assert_problem(await client.get(f"tasks/x?{query}"), 400, field)

    with_api(flow)


@pytest.mark.parametrize(
    "query",
    ["", "view=&state=&page_token=&page_size=&name_prefix=", "other=1", "name_prefix=%FF%FE", "view=full", "%", "&&=&"],
)
def test_harmless_query(query: str) -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        answer = await client.get(f"tasks?{query}")
        assert (answer.status_code, answer.json()) == (200, {"tasks": []})

    with_api(flow)


def test_page_token_belongs_to_its_filters() -> None:
    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        for _ in range(3):
            await create(client, tags={"a": "b"})
        token = (await client.get("tasks?page_size=1&tag_key=a")).json()["next_page_token"]
        same = await client.get("tasks", params={"page_token": token, "tag_key": "a", "view": "FULL", "page_size": 9})
        assert len(same.json()["tasks"]) == 2
        for other in ({}, {"tag_key": "b"}, {"tag_key": "a", "state": "QUEUED"}, {"tag_key": "a", "name_prefix": "h"}):
            assert_problem(await client.get("tasks", params={"page_token": token, **other}), 400, "page_token")
        for damaged in (token[1:], token[:-1], token + "A", token.swapcase()):
            query = {"page_token": damaged, "tag_key": "a"}
            assert_problem(await client.get("tasks", params=query), 400, "page_token")
        forged = page_token(Query(tags=(("a", ""),)), "~")
        answer = await client.get("tasks", params={"page_token": forged, "tag_key": "a"})
        assert answer.status_code == 200

    with_api(flow)


# --- access --------------------------------------------------------------------------------------------------------


def test_other_peoples_tasks_are_not_there() -> None:
    async def by_header(request: Request) -> Access:
        name = request.headers.get("x-name", "")
        return Access(owner=name, only=None if name == "admin" else name)

    async def flow(client: httpx.AsyncClient, store: TaskStore) -> None:
        ann, bob, admin = ({"x-name": name} for name in ("ann", "bob", "admin"))
        task_id = (await client.post("tasks", json=HELLO, headers=ann)).json()["id"]
        await client.post("tasks", json=HELLO, headers=ann)
        path = f"tasks/{task_id}"
        assert_problem(await client.get(path, headers=bob), 404)
        assert_problem(await client.post(f"{path}:cancel", headers=bob), 404)
        assert (await client.get("tasks", headers=bob)).json() == {"tasks": []}
        for who in (ann, admin):
            assert (await client.get(path, headers=who)).json()["state"] == "QUEUED"
            assert len((await client.get("tasks", headers=who)).json()["tasks"]) == 2
        token = (await client.get("tasks?page_size=1", headers=ann)).json()["next_page_token"]
        assert_problem(await client.get("tasks", params={"page_token": token}, headers=bob), 400, "page_token")
        assert (await client.post(f"{path}:cancel", headers=admin)).json() == {}
        assert (await client.get(path, headers=ann)).json()["state"] == "CANCELED"

    with_api(flow, access=by_header)
