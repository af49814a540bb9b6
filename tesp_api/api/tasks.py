"""The four operations on tasks: create, list, get, cancel."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tesp_api import lifecycle
from tesp_api.api.problems import BodyTooLarge
from tesp_api.api.repeats import Creates, body_digest, read_key
from tesp_api.api.service_info import ServiceDescription
from tesp_api.api.views import Document, Json, show
from tesp_api.errors import Detail, InvalidRequest, StoreUnavailable, TaskNotFound
from tesp_api.parameters import Offers, accept
from tesp_api.sites import SiteFacts
from tesp_api.store import Query, TaskStore
from tesp_api.task import Task, new_task
from tesp_api.tes import TesState, TesView, read_task, refusal

PAGE_SIZE: Final = 256
MAX_PAGE_SIZE: Final = 2047
MAX_TAG_FILTERS: Final = 100
MAX_ID: Final = 128
MAX_BODY: Final = 32 << 20
LONG_BODY: Final = 256 << 10
"""Bytes from which on a body is read in a thread, so that others do not wait."""
CANCEL_TRIES: Final = 50
"""How often a cancel may lose the race for a record before it gives up; losing twice is already rare."""
LOOK_EVERY: Final = 1.0
"""Seconds between two looks at a job that are made because somebody looks at its task."""
MAX_LOOKS: Final = 1000


@dataclass(frozen=True)
class Access:
    """What the sender of a request may do: `owner` is whom new tasks belong to, `only` whose tasks can be seen."""

    owner: str = ""
    only: str | None = None


async def everyone(request: Request) -> Access:
    """No authentication: all tasks belong to all."""
    return Access()


@dataclass(frozen=True, kw_only=True)
class Api:
    """What the API is made of.

    `access` looks at the credentials of a request; it raises what should be answered instead. `fold_canceling` shows
    CANCELING as RUNNING, `fold_attempts` only the last attempt. `max_body` is the limit for a request in bytes.
    `offers` says which backend parameters the sites honour, `sites` what else is to be shown of them.
    `creates` belongs to the same store; who runs a service gives it, to run its `noting` as well.
    """

    store: TaskStore
    service: ServiceDescription
    access: Callable[[Request], Awaitable[Access]] = everyone
    fold_canceling: bool = False
    fold_attempts: bool = False
    max_body: int = MAX_BODY
    creates: Creates | None = None
    offers: Offers = field(default_factory=dict)
    sites: Sequence[SiteFacts] = ()
    clock: Callable[[], float] = time.time


class Tasks:
    """The operations, each a handler."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._store = api.store
        self._creates = api.creates or Creates(api.store)
        self._looks: dict[str, float] = {}  # when somebody last saw what a running task does

    async def create(self, request: Request) -> Response:
        """`POST /tasks`. Once this answers, the task is kept whatever happens."""
        begun = time.monotonic()
        access = await self._api.access(request)
        key = read_key(request)
        upload = time.monotonic()
        body = await read_body(request, self._api.max_body)
        arrived = begun + time.monotonic() - upload  # nobody waits for an answer while still sending
        if len(body) > LONG_BODY:
            task, digest = await asyncio.to_thread(self._accept, body, access.owner)
        else:
            task, digest = self._accept(body, access.owner)
        if key:
            task_id = await self._creates.keep_keyed(task, digest, key)
        else:
            task_id = await self._creates.keep(task, digest, request, arrived)
        return Json({"id": task_id})

    def _accept(self, body: bytes, owner: str) -> tuple[Task, str]:
        spec, lines = accept(read_task(body), self._api.offers)
        task = _with_lines(new_task(spec, owner=owner, now=self._api.clock()), lines)
        return task, body_digest(owner, body)

    async def list(self, request: Request) -> Response:
        """`GET /tasks`: newest first."""
        access = await self._api.access(request)
        query, view = read_query(request.query_params, owner=access.only)
        if self._api.fold_canceling and query.state is TesState.CANCELING:
            return Json({"tasks": []})  # nobody gets to see that state
        if self._api.fold_canceling and query.state is TesState.RUNNING:
            query = replace(query, or_state=TesState.CANCELING)
        page = await self._store.page(query, view)
        answer: Document = {"tasks": [self._show(task, view) for task in page.tasks]}
        if page.more and page.tasks:
            answer["next_page_token"] = page_token(query, page.tasks[-1].id)
        return Json(answer)

    async def get(self, request: Request) -> Response:
        """`GET /tasks/{id}`."""
        access = await self._api.access(request)
        view = _view(request.query_params)
        task = await self._find(request, view, access)
        if view is TesView.FULL:
            await self._look_again(task)
        return Json(self._show(task, view))

    async def _look_again(self, task: Task) -> None:
        """Who looks at a running task in FULL will look again, for more of its output: have its job looked at."""
        change, now = lifecycle.look_now(task, self._api.clock()), time.monotonic()
        if change is None or now - self._looks.get(task.id, -LOOK_EVERY) < LOOK_EVERY:
            return
        if len(self._looks) >= MAX_LOOKS:
            self._looks.clear()
        self._looks[task.id] = now
        with suppress(StoreUnavailable):
            await self._store.apply(task.id, change)

    async def cancel(self, request: Request) -> Response:
        """`POST /tasks/{id}:cancel`. It writes the wish; the rest is the dispatcher's. A final task stays as it is."""
        access = await self._api.access(request)
        for _ in range(CANCEL_TRIES):
            task = await self._find(request, TesView.BASIC, access)
            change = lifecycle.cancel(task, self._api.clock())
            if change is None or await self._store.apply(task.id, change) is not None:
                return Json({})
        raise StoreUnavailable("the task changes too quickly")

    async def _find(self, request: Request, view: TesView, access: Access) -> Task:
        task_id = request.path_params["id"]
        task = None
        if task_id.isascii() and task_id.isprintable() and len(task_id) <= MAX_ID:
            task = await self._store.get(task_id, view, owner=access.only)
        if task is None:
            raise TaskNotFound(task_id[:MAX_ID])
        return task

    def _show(self, task: Task, view: TesView) -> Document:
        api = self._api
        return show(task, view, fold_canceling=api.fold_canceling, fold_attempts=api.fold_attempts)


def _with_lines(task: Task, lines: Sequence[str]) -> Task:
    """The task with lines in its system logs from before any attempt."""
    if not lines:
        return task
    assert task.bodies is not None
    return replace(task, bodies=replace(task.bodies, system={0: tuple(lines)}))


async def read_body(request: Request, limit: int) -> bytes:
    """The body, whatever its content type; BodyTooLarge as soon as it is clear that it is larger than `limit`."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise BodyTooLarge(f"The body must not be larger than {limit} bytes.")
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(f"The body must not be larger than {limit} bytes.")
        more = message.get("more_body", False)
    return bytes(body)


# --- query parameters ----------------------------------------------------------------------------------------------


def read_query(parameters: QueryParams, *, owner: str | None) -> tuple[Query, TesView]:
    """What `GET /tasks` asks for; InvalidRequest names the parameter that is wrong."""
    view = _view(parameters)
    state = _word(parameters, "state", TesState)
    size = PAGE_SIZE
    if text := _single(parameters, "page_size"):
        size = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if not 0 < size <= MAX_PAGE_SIZE:
            raise _refuse("page_size", f"must be a whole number from 1 to {MAX_PAGE_SIZE}, but is {text[:40]!r}")
    keys, values = _plain(parameters, "tag_key"), _plain(parameters, "tag_value")
    if len(values) > len(keys):
        raise _refuse("tag_value", f"has {len(values)} values for {len(keys)} tag_key")
    if len(keys) > MAX_TAG_FILTERS:
        raise _refuse("tag_key", f"must not be given more than {MAX_TAG_FILTERS} times")
    values += [""] * (len(keys) - len(values))
    query = Query(
        state=state,
        name_prefix=_single(parameters, "name_prefix"),
        tags=tuple(zip(keys, values, strict=True)),
        owner=owner,
        limit=size,
    )
    if token := _single(parameters, "page_token"):
        query = replace(query, after=read_page_token(query, token))
    return query, view


def _view(parameters: QueryParams) -> TesView:
    return _word(parameters, "view", TesView) or TesView.MINIMAL


Word = TypeVar("Word", TesState, TesView)


def _word(parameters: QueryParams, name: str, words: type[Word]) -> Word | None:
    text = _single(parameters, name)
    if not text:
        return None
    try:
        return words(text.upper())
    except ValueError:
        raise _refuse(name, f"must be one of {', '.join(words)}, but is {text[:40]!r}") from None


def _single(parameters: QueryParams, name: str) -> str:
    """The value of a parameter that may be given once; empty if it is not given."""
    values = _plain(parameters, name)
    if len(values) > 1:
        raise _refuse(name, "must not be given more than once")
    return values[0] if values else ""


def _plain(parameters: QueryParams, name: str) -> list[str]:
    values = parameters.getlist(name)
    if any("\0" in value for value in values):
        raise _refuse(name, "must not contain a NUL character")
    return values


def _refuse(field: str, message: str) -> InvalidRequest:
    return refusal([Detail(field, message)])


# --- page tokens ---------------------------------------------------------------------------------------------------


def page_token(query: Query, last: str) -> str:
    """Where the next page of this query starts, as an opaque text that fits this query only."""
    text = json.dumps([1, last, _digest(query, last)], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_page_token(query: Query, token: str) -> str:
    """The id that a page token holds; InvalidRequest if it is damaged or comes from a query with other filters."""
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        version, last, digest = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if version == 1 and isinstance(last, str) and digest == _digest(query, last):
            return last
    except (ValueError, TypeError, binascii.Error, RecursionError):
        pass
    raise _refuse("page_token", "is damaged, or belongs to a list with other filters")


def _digest(query: Query, last: str) -> str:
    filters = repr((last, query.state and query.state.value, query.name_prefix, query.tags, query.owner))
    return hashlib.blake2b(filters.encode(), digest_size=9).hexdigest()


__all__ = ["Access", "Api", "Tasks", "everyone", "page_token", "read_body", "read_page_token", "read_query"]
