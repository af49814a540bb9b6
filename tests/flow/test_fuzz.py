"""Whatever is sent, the answer is a documented one: requests made up from our own OpenAPI document, and garbage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tesp_api.api.jobs import PATH, Jobs
from tesp_api.api.routes import Methods
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import rfc3339, token_hash
from tesp_api.tes import TesState, TesTask
from tests.builders import HELLO, NOW, api_app, client_of, make_attempt, make_task

STORE = SqliteStore(":memory:")
APP = api_app(STORE)
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
BASE = "http://tes/ga4gh/tes/v1"
ROOT = "http://tes"

quick = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
schema = schemathesis.openapi.from_dict(APP.openapi())

Send = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def send() -> Iterator[Send]:
    """Sends a request to the application and checks the answer's shape."""
    with asyncio.Runner() as runner:

        async def request(arguments: dict[str, Any]) -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=APP)) as client:
                return await client.request(**arguments)

        def call(**arguments: Any) -> httpx.Response:
            response = runner.run(request(arguments))
            assert response.status_code < 500
            assert response.status_code != 422
            if response.status_code >= 400:
                body = response.json()
                assert body.keys() == {"status", "error", "message", "details"}
                assert body["status"] == response.status_code
                assert body["message"]
                assert all(item.keys() == {"field", "message"} for item in body["details"])
            return response

        runner.run(STORE.__aenter__())
        yield call
        runner.run(STORE.__aexit__(None, None, None))


@schema.parametrize()
@quick
def test_operation(case: schemathesis.Case, send: Send) -> None:
    arguments = case.as_transport_kwargs(base_url=ROOT if case.path.startswith("/tesp/") else BASE)
    arguments = {
        key: arguments[key] for key in ("method", "url", "params", "headers", "json", "data") if key in arguments
    }
    if isinstance(arguments.get("data"), bytes | str):
        arguments["content"] = arguments.pop("data")
    try:
        request = httpx.Request(**arguments)
    except (httpx.InvalidURL, UnicodeEncodeError, ValueError):
        return  # no HTTP client could send that
    response = send(method=request.method, url=str(request.url), headers=request.headers, content=request.read())
    case.validate_response(response, checks=list(CHECKS))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
FIELDS = {
    "": (*HELLO, "description", "inputs", "outputs", "resources", "volumes", "tags", "id", "state", "logs"),
    "inputs": ("name", "url", "path", "type", "content", "streamable"),
    "outputs": ("name", "url", "path", "path_prefix", "type"),
    "executors": ("image", "command", "workdir", "stdin", "stdout", "stderr", "env", "ignore_error"),
    "resources": ("cpu_cores", "ram_gb", "disk_gb", "zones", "preemptible", "backend_parameters"),
}
PATHS = st.sampled_from(["/a", "/a/b", "/a/*", "/", "//", "/a/../b", "a", "", "/a\0", "/[x]", "/" + "x" * 5000])


@st.composite
def nearly_tasks(draw: st.DrawFn) -> dict[str, Any]:
    """HELLO with a few fields replaced by anything."""
    task: dict[str, Any] = json.loads(json.dumps(HELLO))
    task |= {"inputs": [{"path": "/i", "url": "u"}], "outputs": [{"path": "/o", "url": "u"}], "resources": {}}
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(sorted(FIELDS)))
        target = task if not where else task[where] if where == "resources" else None
        if target is None:
            target = task[where][0] if isinstance(task[where], list) and task[where] else {}
        if isinstance(target, dict):
            value = draw(JSON | PATHS)
            key = draw(st.sampled_from(FIELDS[where]))
            if where or key not in FIELDS:  # keep the frame, so that the next step finds its place
                target[key] = value
    return task


@quick
@given(task=nearly_tasks())
def test_nearly_tasks(task: dict[str, Any], send: Send) -> None:
    response = send(method="POST", url=f"{BASE}/tasks", content=json.dumps(task).encode())
    if response.status_code == 200:
        shown = send(method="GET", url=f"{BASE}/tasks/{response.json()['id']}?view=FULL")
        assert shown.status_code == 200


@quick
@given(body=st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_bodies(body: bytes, send: Send) -> None:
    assert send(method="POST", url=f"{BASE}/tasks", content=body).status_code == 400


ODD = {
    str: st.text(st.characters(exclude_categories=()), max_size=10) | st.sampled_from(["\ud800", "a" * 5000]),
    int: st.integers() | st.sampled_from([-1, 1 << 31, 1 << 63, 10**300]),
}


@st.composite
def nearly_reports(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A progress and a result of a node, a few of their fields replaced by anything."""
    executor = {"exit_code": 0, "start_time": rfc3339(NOW), "end_time": rfc3339(NOW), "stdout": "o", "stderr": "e"}
    output = {"url": "u", "path": "p", "size_bytes": 1}
    progress = {"phase": "running", "executor": 0, "started": "t", "beat": 1}
    progress |= {"stdout": "x", "stderr": "x", "stdout_bytes": 1, "stderr_bytes": 1}
    result = {"state": "COMPLETE", "start_time": rfc3339(NOW), "end_time": rfc3339(NOW), "infrastructure": False}
    parts: list[dict[str, Any]] = [executor, output, progress, result]
    for _ in range(draw(st.integers(1, 4))):
        part = draw(st.sampled_from(parts))
        key = draw(st.sampled_from(sorted(part)))
        part[key] = draw(ODD.get(type(part[key]), JSON) if draw(st.integers(0, 5)) else JSON)
    rows = {"executors": [executor], "outputs": [output]}
    texts = {"system_logs": draw(st.lists(ODD[str])), "metadata": draw(st.dictionaries(ODD[str], ODD[str]))}
    return progress, {**result, **rows, **texts}


@quick
@given(nearly=nearly_reports())
def test_nearly_reports(nearly: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Whatever a node says is refused, or it can be stored and shown."""
    progress, result = nearly

    async def main() -> None:
        async with SqliteStore(":memory:") as store:
            app = api_app(store)
            Methods(POST=Jobs(store, {}, lambda: NOW).report).add_to(app.router, f"{PATH}/{{id}}")
            task = make_task()
            attempt = make_attempt(task.id, submitted=NOW, tokens=(token_hash("secret"),))
            await store.add(replace(task, state=TesState.RUNNING, attempts=(attempt,), due_at=NOW))
            mine = {"job_id": attempt.job_id}
            async with client_of(app, ROOT) as client:
                for report in ({"progress": {**progress, **mine}}, {"result": {**result, **mine}}):
                    body = {"progress": {**mine, "phase": "done"}, **report}
                    headers = {"Authorization": "Bearer secret"}
                    url = f"{PATH}/{attempt.job_id}"
                    answer = await client.post(url, content=json.dumps(body), headers=headers)
                    assert answer.status_code in (200, 400), answer.text
                    shown = await client.get(f"/v1/tasks/{task.id}?view=FULL")
                    assert shown.status_code == 200
                    TesTask.model_validate(shown.json())
                    for log in shown.json()["logs"][0]["logs"]:
                        assert abs(log["exit_code"]) <= 1 << 31
                        assert all(datetime.fromisoformat(log[key]) for key in log if key.endswith("_time"))

    asyncio.run(main())


WORDS = st.sampled_from(["page_size", "page_token", "view", "state", "tag_key", "tag_value", "name_prefix"])


@quick
@given(pairs=st.lists(st.tuples(WORDS, st.text(max_size=20)), max_size=5))
def test_queries(pairs: list[tuple[str, str]], send: Send) -> None:
    for path in ("/tasks", "/tasks/x"):
        try:
            send(method="GET", url=BASE + path, params=pairs)
        except UnicodeEncodeError:
            return


@quick
@given(query=st.binary(max_size=60))
def test_raw_query_strings(query: bytes) -> None:
    """Bytes that no well-behaved client sends, handed to the application directly."""

    async def ask() -> int:
        status = 0

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        async with SqliteStore(":memory:") as store:
            path = "/v1/tasks"
            scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": query}
            scope |= {"headers": [], "root_path": "", "scheme": "http", "server": ("tes", 80), "http_version": "1.1"}
            await api_app(store)(scope, receive, keep)
        return status

    assert asyncio.run(ask()) in (200, 400)
