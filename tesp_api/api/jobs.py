"""Reports of jobs: `POST /tesp/v1/jobs/{job id}`, where a runner tells how its job is and hears what is wanted of it.

A report is an observation that nobody asked for, and is noted as such. With `hold` it is a question that stays open:
it is answered as soon as the task is to be cancelled. A cancel in this process wakes it by the store's bell, one in
another is seen by a look at the store, one look for all open questions together.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tesp_api import lifecycle
from tesp_api.api.tasks import read_body
from tesp_api.api.views import Json
from tesp_api.errors import InvalidRequest, StoreUnavailable
from tesp_api.lifecycle import Policy
from tesp_api.record import record, record_tail
from tesp_api.runner.job import HOLD, REPORT_BYTES, Answer, Report, to_document
from tesp_api.sites import documents
from tesp_api.store import Query, Ring, TaskStore
from tesp_api.task import Attempt, Observation, Phase, Task, task_of, token_hash
from tesp_api.tes import TesState, TesView

log = logging.getLogger(__name__)

PATH: Final = "/tesp/v1/jobs"

MAX_OPEN: Final = 500
"""Questions that may be open in one process; each holds a connection."""

MAX_JOB_ID: Final = 64
"""Characters of a job id; ours are shorter."""

LOOK: Final = 1.0
"""Seconds between two looks for cancels that came through another process."""

LEAST: Final = 0.1
"""Seconds between two looks at least, however often the bell rings."""

STOPPING: Final = 2.0
"""Seconds after which a job should ask again when the service is about to stop: another may be there by then."""

PAGE: Final = 1000

UNKNOWN: Final = "There is no such job, or this is not its token."

WANTED: Final = frozenset({TesState.INITIALIZING, TesState.RUNNING})
"""States in which a job is to go on."""


class _Questions:
    """The open questions of this process, one for each job: a new one takes the place of the one before."""

    def __init__(self, store: TaskStore) -> None:
        self.open: dict[str, asyncio.Event] = {}
        self.closed = False
        self._store = store
        self._listener = store.bell.listen()
        self._looking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def ask(self, job_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that says: answer now."""
        if (before := self.open.pop(job_id, None)) is not None:
            before.set()
        mine = self.open[job_id] = asyncio.Event()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="open questions")
        try:
            yield mine
        finally:
            if self.open.get(job_id) is mine:
                del self.open[job_id]

    def close(self) -> None:
        """Answer all, and keep none open from now on."""
        self.closed = True
        for each in self.open.values():
            each.set()

    async def _look(self) -> None:
        """As long as any is open: wake those whose task is to be cancelled."""
        while self.open:
            try:
                await self._wake()
            except StoreUnavailable as error:
                log.debug("no look for cancels: %s", error)
            await asyncio.sleep(LEAST)
            await self._listener.wait(LOOK - LEAST, Ring.OPEN)

    async def _wake(self) -> None:
        by_task = {task_of(job_id)[0]: event for job_id, event in self.open.items()}
        query: Query | None = Query(state=TesState.CANCELING, limit=PAGE)
        while query is not None:
            page = await self._store.page(query)
            for task in page.tasks:
                if task.id in by_task:
                    by_task[task.id].set()
            query = Query(state=TesState.CANCELING, limit=PAGE, after=page.tasks[-1].id) if page.more else None


class Jobs:
    """The reports. `policies` are those of the sites, by name; `most` questions may be open at a time."""

    def __init__(
        self,
        store: TaskStore,
        policies: Mapping[str, Policy],
        clock: Callable[[], float] = time.time,
        most: int = MAX_OPEN,
    ) -> None:
        self._store = store
        self._policies = policies
        self._clock = clock
        self._most = most
        self._questions = _Questions(store)

    @property
    def asked(self) -> Collection[str]:
        """The jobs that have a question open."""
        return self._questions.open.keys()

    def close(self) -> None:
        """The service is about to stop: nobody shall wait for an open question."""
        self._questions.close()

    async def report(self, request: Request) -> Response:
        """Take a report and answer it. Whoever has no token of this very job learns nothing, not even if it exists."""
        job_id = request.path_params["id"]
        task, attempt = await self._find(job_id, request.headers.get("authorization", ""))
        body = await read_body(request, REPORT_BYTES)
        found = await documents.aside(documents.report, body, job_id)
        if found is None:
            raise InvalidRequest(
                "The body must be a report of this job: an object with its progress, as the runner sends."
            )
        task = await self._note(task, attempt, found)
        answer = Answer(cancel=not _is_wanted(task, job_id))
        if found.hold and not answer.cancel:
            answer = await self._hold(task, job_id, found.hold)
        return Json(to_document(answer))

    async def _find(self, job_id: str, credentials: str) -> tuple[Task, Attempt]:
        scheme, _, token = credentials.partition(" ")
        task = None
        if scheme.lower() == "bearer" and len(job_id) <= MAX_JOB_ID and (task_id := _task_id(job_id)):
            task = await self._store.get(task_id, TesView.BASIC)
        hashed = token_hash(token.strip())
        for attempt in task.attempts if task is not None else ():
            if attempt.job_id == job_id and any(hmac.compare_digest(hashed, each) for each in attempt.tokens):
                assert task is not None
                return task, attempt
        raise HTTPException(401, UNKNOWN, headers={"WWW-Authenticate": "Bearer"})

    async def _note(self, task: Task, attempt: Attempt, found: Report) -> Task:
        """Note what a report says; the task as it is then, as far as we know."""
        phase = Phase.RUNNING if found.result is None else Phase.ENDED
        seen = Observation(
            job_id=attempt.job_id, phase=phase, progress=found.progress, result=found.result, reported=True
        )
        policy = self._policies.get(attempt.site, Policy())
        await record_tail(self._store, task, seen)
        noted = await record(
            self._store, task, lambda task: lifecycle.reported(task, seen, self._clock(), policy), aside=seen.long
        )
        return noted or task

    async def _hold(self, task: Task, job_id: str, seconds: float) -> Answer:
        questions = self._questions
        if questions.closed:
            return Answer(pause=STOPPING)
        if len(questions.open) >= self._most and job_id not in questions.open:
            return Answer(pause=HOLD)
        log.debug("%s keeps a question open", job_id)
        async with questions.ask(job_id) as wake:
            current = await self._store.get(task.id, TesView.BASIC)  # a cancel may have come just before
            if _is_wanted(current, job_id):
                try:
                    async with asyncio.timeout(seconds):
                        await wake.wait()
                except TimeoutError:
                    return Answer()
                current = await self._store.get(task.id, TesView.BASIC)
        return Answer(cancel=not _is_wanted(current, job_id), pause=STOPPING if questions.closed else 0.0)


def _task_id(job_id: str) -> str | None:
    """The id of the task of a job, if this can be a job's id."""
    if not job_id.isascii() or not job_id.isprintable():
        return None
    try:
        return task_of(job_id)[0]
    except ValueError:
        return None


def _is_wanted(task: Task | None, job_id: str) -> bool:
    """Whether the job is to go on: not if its task is cancelled, has ended, or is tried anew."""
    return task is not None and task.state in WANTED and task.attempt is not None and task.attempt.job_id == job_id


__all__ = ["PATH", "Jobs"]
