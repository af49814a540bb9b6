"""The mail carrier: a Pulsar that is reached by letters only, whatever carries them (see Post).

A question of ours is a letter, and so is its answer: like all letters of Pulsar's it names the job, not the question.
Files are read, written and removed by errands, a Pulsar job each; what is asked for at the same time shares one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import reprlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from tesp_api.errors import SiteClosed, SiteError, SiteUnavailable
from tesp_api.runner.bundle import Bundle
from tesp_api.runner.job import EXIT_NO_PYTHON
from tesp_api.sites import documents
from tesp_api.sites.pulsar import errand, messages
from tesp_api.sites.pulsar.errand import Failed, Install, NoRoom, Outcome, Read, Remove, Request, Write
from tesp_api.sites.pulsar.messages import ANSWER, ENDED, JOBDIR, Launch, Status
from tesp_api.sites.pulsar.post import KILL, SETUP, STATUS, Post

log = logging.getLogger(__name__)

T = TypeVar("T")

ASK_AFTER: Final = (0.1, 0.2, 0.4, 0.8, 1.5, 3.0)
"""Pauses in seconds after which an errand is asked for, the last one again and again: a question moves Pulsar on, and
the message of the end may be lost."""

SPENT: Final = 1000
"""Errands whose directories are still to be removed, at most; the oldest are forgotten first."""

DEAF: Final = 0.5
"""Seconds until Pulsar's letters are listened to again after a mistake of ours about one."""

DIRECTORY_OF: Final = {ANSWER: JOBDIR}
"""Where the documents that can be written by letter belong."""


@dataclass
class _Wish:
    """A request and who waits for it."""

    request: Request
    outcome: asyncio.Future[bytes | None] = field(repr=False)


class MailCarrier:
    """See Carrier. `timeout` is the longest wait for Pulsar's answer; after `slow` seconds without one it is found out
    whether Pulsar has passed over the question; `file_pause`: see Carrier."""

    by_mail = True

    def __init__(self, post: Post, *, timeout: float = 30.0, file_pause: float = 20.0, slow: float = 2.0) -> None:
        self.file_pause = file_pause
        self._post = post
        self._timeout = timeout
        self._slow = slow
        self._awaited: dict[str, asyncio.Future[Status]] = {}  # job id -> the next thing that Pulsar says of it
        self._questions: dict[str, asyncio.Task[Status | None]] = {}
        self._numbers = itertools.count()
        self._later: tuple[int, asyncio.Task[Status]] | None = None
        self._errands: dict[str, asyncio.Future[Status]] = {}
        self._spent: deque[str] = deque(maxlen=SPENT)
        self._wishes: dict[Request, _Wish] = {}
        self._runs = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._out: asyncio.Queue[tuple[str, Status]] = asyncio.Queue()
        self._taken = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._post.__aenter__()
        copies = self._post.copies() is not None
        if copies:
            self._start(self._for_ever(self._wake))
        self._start(self._for_ever(lambda: self._sort(wakes=not copies)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = tuple(self._tasks)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for wish in self._wishes.values():
            if not wish.outcome.done():
                wish.outcome.cancel()
        self._wishes.clear()
        await self._post.__aexit__(kind, error, trace)

    # The carrier's verbs

    async def deliver(self, runner: Bundle, *, again: bool) -> None:
        """See Carrier. The errand itself finds out whether the runner is there, and undamaged."""
        await self._have(Install(runner))
        log.info("%s has the runner %s now.", self._post.where, runner.sha256[:12])

    async def launch(self, launch: Launch) -> None:
        """See Carrier."""
        messages.check_id(launch.job_id)
        await self._post.send(SETUP, messages.setup_message(launch))

    async def status(self, job_id: str) -> Status | None:
        """See Carrier. All who ask about a job at the same time share one question."""
        question = self._questions.get(messages.check_id(job_id))
        if question is None:
            question = self._questions[job_id] = self._start(self._ask(job_id))
            question.add_done_callback(lambda _: self._questions.pop(job_id, None))
        return await self._outcome_of(question)

    async def fetch(self, job_id: str, name: str, limit: int) -> bytes | None:
        """See Carrier."""
        return await self._have(Read(messages.check_id(job_id), name, limit))

    async def put(self, job_id: str, name: str, kind: str, data: bytes) -> None:
        """See Carrier; also into the directory of a job that Pulsar has not set up yet."""
        if DIRECTORY_OF.get(name) != kind:
            raise ValueError(f"no errand writes {name!r} as {kind!r}")
        await self._have(Write(messages.check_id(job_id), name, data.decode("ascii")))

    async def kill(self, job_id: str) -> None:
        """See Carrier."""
        await self._post.send(KILL, {"job_id": messages.check_id(job_id)})

    async def clean(self, job_id: str) -> None:
        """See Carrier. A launch of the job that arrives later runs nothing."""
        await self._have(Remove(messages.check_id(job_id)))

    async def updates(self) -> AsyncIterator[tuple[str, Status]]:
        """See Carrier. Pulsar's letter is given back to nobody once the next update is asked for."""
        while True:
            update = await self._out.get()
            yield update
            self._taken.set()

    async def check(self) -> str:
        """See Carrier: a question about a job that is nowhere, whose answer does not tell the version."""
        await self.status(errand.new_id())
        return await self._post.version()

    # Letters

    async def _for_ever(self, listen: Callable[[], Awaitable[None]]) -> None:
        """A mistake of ours must not make us deaf to what follows."""
        while True:
            try:
                await listen()
            except Exception:
                log.exception("listening to %s failed", self._post.where)
            await asyncio.sleep(DEAF)

    async def _wake(self) -> None:
        copies = self._post.copies()
        assert copies is not None, "whoever has none is not listened to twice"
        async for letter in copies:
            with self._bearing():
                if (heard := _read(letter)) is not None:
                    self._hear(*heard)

    async def _sort(self, *, wakes: bool) -> None:
        """Take Pulsar's letters, one by one, each for as long as it takes to be noted."""
        async for letter in self._post.letters():
            with self._bearing():
                await self._take(letter, wakes=wakes)

    @contextmanager
    def _bearing(self) -> Iterator[None]:
        """A mistake of ours about one letter must not bring it back for ever, with all that were before it."""
        try:
            yield
        except Exception:
            log.exception("a message of %s could not be handled", self._post.where)

    async def _take(self, letter: object, *, wakes: bool) -> None:
        heard = _read(letter)
        if heard is None:
            log.warning("%s: a message that is no status of a job was dropped: %s", self._post.where, _words(letter))
            return
        job_id, status = heard
        if wakes:
            self._hear(job_id, status)
        if errand.is_errand(job_id):
            self._hear_of_errand(job_id, status)
            if status.state in ENDED:
                self._spend(job_id)
        elif _is_news(status):
            self._taken.clear()
            self._out.put_nowait(heard)
            await self._taken.wait()

    def _hear(self, job_id: str, status: Status) -> None:
        awaited = self._awaited.get(job_id)
        if awaited is not None and not awaited.done():
            awaited.set_result(status)
        self._hear_of_errand(job_id, status)

    def _hear_of_errand(self, job_id: str, status: Status) -> None:
        waiting = self._errands.get(job_id)
        if waiting is not None and not waiting.done() and status.state in ENDED:
            waiting.set_result(status)

    def _spend(self, errand_id: str) -> None:
        """The directory of an errand that has ended goes with the next errand."""
        if errand_id not in self._spent:
            self._spent.append(errand_id)

    # Questions

    async def _ask(self, job_id: str) -> Status | None:
        """The answer; None if Pulsar answers a later question, but not this one. It takes them in their order, and
        passes over those that it fails at."""
        try:
            async with asyncio.timeout(self._timeout):
                with self._awaiting(job_id) as answer:
                    await self._send_question(job_id)
                    number = next(self._numbers)
                    if await _is_there(answer, self._slow):
                        return answer.result()
                    later = self._later_answer(number)
                    await asyncio.wait((answer, later), return_when=asyncio.FIRST_COMPLETED)
                    if await _is_there(answer, self._slow / 2):
                        return answer.result()
                    later.result()  # a later question that failed says nothing of this one
                    return None
        except TimeoutError:
            raise SiteUnavailable(f"{self._post.where} did not answer in time; {self._post.doubt}?") from None

    def _later_answer(self, number: int) -> asyncio.Task[Status]:
        """The answer to a question after that of this number, about nobody; one for all who wait, as Pulsar is slow."""
        if self._later is None or self._later[0] < number or (self._later[1].done() and not _is_good(self._later[1])):
            self._later = next(self._numbers), self._start(self._ask_about_nobody())
        return self._later[1]

    async def _ask_about_nobody(self) -> Status:
        nobody = errand.new_id()
        async with asyncio.timeout(self._timeout):
            with self._awaiting(nobody) as answer:
                await self._send_question(nobody)
                return await answer

    async def _send_question(self, job_id: str) -> None:
        await self._post.send(STATUS, {"job_id": job_id, "request": "status"})

    @contextmanager
    def _awaiting(self, job_id: str) -> Iterator[asyncio.Future[Status]]:
        answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._awaited[job_id] = answer
        try:
            yield answer
        finally:
            del self._awaited[job_id]

    # Errands

    async def _have(self, request: Request) -> bytes | None:
        """Have a request fulfilled by an errand; whoever wishes the same meanwhile shares it."""
        wish = self._wishes.get(request)
        if wish is None:
            wish = self._wishes[request] = _Wish(request, asyncio.get_running_loop().create_future())
            if not self._runs:
                self._runs += 1
                self._start(self._run_errands())
        return await self._outcome_of(wish.outcome)

    async def _run_errands(self) -> None:
        """One errand after the other, until there are no wishes: what comes while one is under way shares the next."""
        try:
            await asyncio.sleep(0)  # those who wish at the same moment come along
            while self._wishes:
                requests = errand.fitting(self._wishes)
                wishes = [self._wishes.pop(each) for each in requests]
                await self._run_errand(wishes)
        finally:
            self._runs -= 1

    async def _run_errand(self, wishes: Sequence[_Wish]) -> None:
        try:
            found = await self._send_out([each.request for each in wishes])
        except SiteError as error:
            for wish in wishes:
                _fail(wish, error)
            return
        except BaseException:
            for wish in wishes:
                wish.outcome.cancel()
            raise
        for wish in wishes:
            self._settle(wish, found.get(wish.request))

    def _settle(self, wish: _Wish, outcome: Outcome) -> None:
        if isinstance(outcome, NoRoom):
            if (same := self._wishes.setdefault(wish.request, wish)) is not wish:
                same.outcome.add_done_callback(lambda done: _pass_on(done, wish))
        elif isinstance(outcome, Failed):
            reason = documents.words(outcome.reason, 120)
            _fail(wish, SiteUnavailable(f"{self._post.where} could not do what was asked with a file: {reason}."))
        elif not wish.outcome.done():
            wish.outcome.set_result(outcome)

    async def _send_out(self, requests: Sequence[Request]) -> dict[Request, Outcome]:
        errand_id = errand.new_id()
        spent = list(self._spent)
        ended = self._errands[errand_id] = asyncio.get_running_loop().create_future()
        try:
            launch = errand.launch(errand_id, requests, spent)
            await self._post.send(SETUP, messages.setup_message(launch))
            status = await self._until_ended(errand_id, ended)
        finally:
            del self._errands[errand_id]
        self._spend(errand_id)
        found = errand.outcomes(errand_id, status.result, requests)
        if found is None:
            raise self._no_answer(status)
        for each in spent:
            if each in self._spent:
                self._spent.remove(each)
        return dict(found)

    async def _until_ended(self, errand_id: str, ended: asyncio.Future[Status]) -> Status:
        asking = self._start(self._keep_asking(errand_id))
        try:
            async with asyncio.timeout(self._timeout):
                return await ended
        except TimeoutError:
            raise SiteUnavailable(
                f"{self._post.where} did not run a small job of ours in time; is it busy, or {self._post.doubt}?"
            ) from None
        finally:
            asking.cancel()

    async def _keep_asking(self, errand_id: str) -> None:
        pauses = iter(ASK_AFTER)
        while True:
            await asyncio.sleep(next(pauses, ASK_AFTER[-1]))
            try:
                await self._send_question(errand_id)
            except SiteError as error:
                log.debug("%s", error)  # whoever waits for the errand is told by its timeout

    def _no_answer(self, status: Status) -> SiteError:
        where = self._post.where
        if status.state == "failed":
            return SiteUnavailable(f"{where} could not launch a small job of ours; the reason is in Pulsar's own log.")
        if status.returncode == EXIT_NO_PYTHON:
            return SiteClosed(f"{where} has no python3 on the PATH of its jobs, and the runner needs one.")
        said = f": {words}" if (words := documents.words(status.stderr, 120)) else "."
        return SiteUnavailable(
            f"{where} ended a small job of ours without an answer (exit code {status.returncode}){said}"
        )

    # Tasks

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, SiteError | TimeoutError):
            log.error("the mail of %s failed", self._post.where, exc_info=error)

    async def _outcome_of(self, shared: asyncio.Future[T]) -> T:
        """What others may wait for, too: the one who gives up waiting does not end it."""
        try:
            return await asyncio.shield(shared)
        except asyncio.CancelledError:
            if shared.cancelled():
                raise SiteUnavailable(f"{self._post.where} is not in use any more.") from None
            raise


def _is_good(done: asyncio.Task[Status]) -> bool:
    return not done.cancelled() and done.exception() is None


async def _is_there(answer: asyncio.Future[Status], within: float) -> bool:
    await asyncio.wait((answer,), timeout=within)
    return answer.done()


def _read(letter: object) -> tuple[str, Status] | None:
    """A status of a job, or None. Whoever can write to us may have written anything."""
    job_id = letter.get("job_id") if isinstance(letter, dict) else None
    if not isinstance(job_id, str) or not messages.JOB_ID.fullmatch(job_id):
        return None
    status = messages.read_status(letter)
    return None if status is None else (job_id, status)


def _is_news(status: Status) -> bool:
    """Whether others should hear of it: of ends only. Anything else is an answer to a question of somebody's, and may
    be old by now."""
    return status.state in ENDED or status.result is not None


def _words(letter: object) -> str:
    return documents.words(reprlib.repr(letter), 100)


def _fail(wish: _Wish, error: SiteError) -> None:
    if not wish.outcome.done():
        wish.outcome.set_exception(error)
        wish.outcome.exception()  # that nobody may be waiting any more is no mistake


def _pass_on(done: asyncio.Future[bytes | None], wish: _Wish) -> None:
    if wish.outcome.done():
        return
    if done.cancelled():
        wish.outcome.cancel()
    elif isinstance(error := done.exception(), SiteError):
        _fail(wish, error)
    else:
        wish.outcome.set_result(done.result())
