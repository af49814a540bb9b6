"""Small values for tests: tasks in any state, attempts, and an application with nothing but the TES API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI

from tesp_api.api import Api, ServiceDescription, extensions, problems, router
from tesp_api.api.openapi import add_docs, openapi
from tesp_api.store import TaskStore
from tesp_api.task import Attempt, Bodies, Task, job_id, new_task
from tesp_api.tes import TesTask, TesTaskLog, read_task

T = TypeVar("T")

NOW = 1_750_000_000.0
"""A moment for tests: 2025-06-15T15:06:40Z."""

HELLO: Mapping[str, Any] = {"name": "hello", "executors": [{"image": "busybox", "command": ["echo", "hi"]}]}
"""The smallest sensible task."""

SERVICE = ServiceDescription(
    id="org.example.tes",
    name="Test TES",
    organization_name="Example",
    organization_url="https://example.org",
    version="1.2.3",
    description="For tests",
    storage=("file:///data",),
)


def document(**fields: Any) -> dict[str, Any]:
    """A task document: HELLO with these fields on top; None takes a field away."""
    merged = {**HELLO, **fields}
    return {key: value for key, value in merged.items() if value is not None}


def make_spec(**fields: Any) -> TesTask:
    """A validated request."""
    return read_task(json.dumps(document(**fields)).encode())


def make_task(*, now: float = NOW, owner: str = "", record: Mapping[str, Any] | None = None, **fields: Any) -> Task:
    """A stored task; `record` sets fields of Task itself, such as `state`, `attempts` and `bodies`."""
    return replace(new_task(make_spec(**fields), owner=owner, now=now), **(record or {}))


def make_attempt(task_id: str, number: int = 1, log: Mapping[str, Any] | None = None, **fields: Any) -> Attempt:
    """An attempt; `log` is its TaskLog as a document."""
    values = {"site": "local", "assigned": NOW, "job_id": job_id(task_id, number), **fields}
    return Attempt(number=number, log=TesTaskLog.model_validate({"logs": [], "outputs": [], **(log or {})}), **values)


def make_bodies(
    contents: Mapping[int, str] | None = None,
    streams: Mapping[tuple[int, int, str], str] | None = None,
    system: Mapping[int, Sequence[str]] | None = None,
) -> Bodies:
    """The long texts of a task."""
    return Bodies(contents=contents or {}, streams=streams or {}, system=system or {})


def api_app(store: TaskStore, **options: Any) -> FastAPI:
    """An application with the TES API and its documentation only; `options` are fields of Api."""
    options = {"service": SERVICE, "clock": lambda: NOW, **options}
    app = FastAPI(title="Test TES", version="1.2.3", docs_url=None, redoc_url=None)
    problems.install(app)
    api = Api(store=store, **options)
    app.router.routes.extend([*router(api).routes, *extensions(api).routes])
    add_docs(app)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def client_of(app: FastAPI, base: str = "http://tes/ga4gh/tes/v1") -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client in front of the application, in process."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=base) as client:
        yield client


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a loop of its own."""
    return asyncio.run(work)
