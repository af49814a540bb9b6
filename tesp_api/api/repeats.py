"""A create happens once, also when its sender repeats it.

Clients that get no answer send a create again: to the other base path, to another replica, after a restart. With an
`Idempotency-Key` the store tells a repeated create by that. Without one, a create leaves a mark in the store until its
answer has arrived, as far as this side can know; whoever sends the same body while there is a mark most likely repeats
that create. Senders of equal tasks get their answers and so never meet a mark, however many there are.

Marks of other processes come from the store. Our own creates are remembered here: those that are slow, whose sender
left, or whose write may or may not have been done.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

from starlette.requests import Request

from tesp_api.errors import Detail, StoreUnavailable, TespError
from tesp_api.store import Once, Repeat, TaskStore
from tesp_api.task import Task
from tesp_api.tes import refusal

log = logging.getLogger(__name__)

HEADER: Final = "Idempotency-Key"
MAX_KEY: Final = 255

COLLECT: Final = 0.05
"""Seconds for which marks to remove are collected."""
BATCH: Final = 500
"""How many marks are removed at once."""
PATIENCE: Final = 5.0
"""Seconds between two tries while the store is away, at most; and what the last try may take when the service stops."""
CROWD: Final = 20
"""At how many equal creates under way a new one looks, the oldest first."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a create counts as repeated. All are seconds but `many`.

    A body may be repeated within `window`. An answer after `slow` may come too late (clients wait for 10 and more), and
    after `glance` it is worth a look whether the sender is still there. In `settled` the mark of an answered create is
    gone, so one that stays for longer is meant; it is looked at each `step`. The clocks of two processes may differ by
    `skew`. This process remembers `many` creates, and as many marks to remove; what falls out lasts for `window`.
    """

    window: float = 60.0
    slow: float = 5.0
    glance: float = 1.0
    settled: float = 2.0
    step: float = 0.1
    skew: float = 0.1
    many: int = 10_000


def body_digest(owner: str, body: bytes) -> str:
    """Who sent what."""
    return _digest("body", owner, body)


def read_key(request: Request) -> str:
    """The Idempotency-Key, empty if there is none; InvalidRequest names it if it is wrong."""
    values = [value for name, value in request.scope["headers"] if name == b"idempotency-key"]
    if not values:
        return ""
    key: str = values[0].decode("latin-1")
    if len(values) > 1:
        raise refusal([Detail(HEADER, "must not be given more than once")])
    if not (key.isascii() and key.isprintable() and 1 <= len(key) <= MAX_KEY):
        raise refusal([Detail(HEADER, f"must be 1 to {MAX_KEY} printable ASCII characters")])
    return key


def _digest(kind: str, owner: str, data: bytes) -> str:
    found = hashlib.sha256(f"{kind}\0{owner}\0".encode("utf-8", "surrogatepass"))
    found.update(data)
    return found.hexdigest()


@dataclass(eq=False, slots=True)
class _Create:
    """One create that this process has taken.

    `task_id`, `created` and `sender` are of the task that it made, or that it turned out to repeat. `arrived` is when
    the request did, `left` when it ended without an answer in time, both by the monotonic clock.
    """

    body: str
    task_id: str
    created: float
    sender: str
    arrived: float
    request: Request | None
    left: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def took(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived

    async def deserted(self) -> bool:
        """Whether its sender has gone."""
        return self.request is None or await self.request.is_disconnected()


class _Register:
    """Creates by their body, in the order in which they came."""

    def __init__(self) -> None:
        self._creates: dict[str, dict[_Create, None]] = {}

    def add(self, create: _Create) -> None:
        """Enter it."""
        self._creates.setdefault(create.body, {})[create] = None

    def first(self, body: str, limit: int) -> list[_Create]:
        """The oldest creates with this body."""
        return list(islice(self._creates.get(body, ()), limit))

    def take(self, create: _Create) -> bool:
        """Take it out; False if it is not there (any more)."""
        equal = self._creates.get(create.body, {})
        if create not in equal:
            return False
        del equal[create]
        if not equal:
            del self._creates[create.body]
        return True


class Creates:
    """Keeps new tasks, each once. `noting` must run for marks to be removed; without it they only grow old."""

    def __init__(self, store: TaskStore, limits: Limits | None = None) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._sender = secrets.token_hex(8)
        self._under_way = _Register()
        self._left = _Register()
        self._in_order: deque[_Create] = deque()
        self._arrived: dict[str, tuple[str, str]] = {}
        self._wake = asyncio.Event()

    async def keep_keyed(self, task: Task, body: str, key: str) -> str:
        """Keep the task unless there is one with this key; the id of the one that is kept. InvalidRequest if the key
        belongs to another body."""
        once = Once(body=body, sender=self._sender, key=_digest("key", task.owner, key.encode()))
        repeat = await self._store.add(task, once)
        if repeat is None:
            return task.id
        if repeat.body != body:
            raise refusal([Detail(HEADER, "has been used for another request; use a new one for each task")])
        return repeat.task_id

    async def keep(self, task: Task, body: str, request: Request, arrived: float) -> str:
        """Keep the task unless it repeats one; the id of the one that is kept. `arrived`: when by the monotonic clock
        the request did."""
        earlier = await self._take_up(body)
        create = _Create(body, task.id, task.created, self._sender, arrived, request)
        if earlier is not None:
            create.task_id, create.created, create.sender = earlier.task_id, earlier.created, earlier.sender
        self._under_way.add(create)
        in_time = False
        try:
            if earlier is None:
                await self._add(task, create)
            else:
                await self._go_on(task, create, earlier)
            in_time = await self._in_time(create)
        finally:  # whatever went wrong, the task may have been kept
            self._end(create, in_time)
        return create.task_id

    async def _in_time(self, create: _Create) -> bool:
        """Whether an answer given now will arrive, as far as one can know."""
        took = create.took
        return took <= self._limits.slow and (took <= self._limits.glance or not await create.deserted())

    # Creates of other processes

    async def _add(self, task: Task, create: _Create) -> None:
        """Keep the task, unless there is a mark that stays."""
        now, limits = self._store.clock(), self._limits
        once = Once(body=create.body, sender=self._sender, since=now - limits.window, until=now + limits.skew)
        seen: dict[str, float] = {}
        while (repeat := await self._store.add(task, once)) is not None:
            since = seen.setdefault(repeat.task_id, time.monotonic())
            if self._stays(repeat, since, create):
                create.task_id, create.created, create.sender = repeat.task_id, repeat.created, repeat.sender
                return
            await asyncio.sleep(limits.step)

    def _stays(self, repeat: Repeat, since: float, create: _Create) -> bool:
        """Whether a mark that has been seen `since` then is old enough. Its age alone does not tell as long as the
        answer may be on its way. And when time runs out for ours as well, then both wait for the same store."""
        limits = self._limits
        old = self._store.clock() - repeat.created >= limits.slow + limits.settled
        return old or time.monotonic() - since >= limits.settled or create.took > limits.slow

    # Creates of this process

    async def _take_up(self, body: str) -> _Create | None:
        """The oldest create of this body whose sender may have given it up; nobody else gets it then."""
        self._forget_old()
        if left := self._left.first(body, 1):
            self._left.take(left[0])
            return left[0]
        for each in self._under_way.first(body, CROWD):
            if each.took <= self._limits.glance:
                break  # as are all that came later
            if not await self._in_time(each) and (self._under_way.take(each) or self._left.take(each)):
                return each
        return None

    async def _go_on(self, task: Task, create: _Create, earlier: _Create) -> None:
        """Finish an earlier create. Where its write has not been done (yet), do it under its id: the store takes an id
        once, however late the first try gets through."""
        await earlier.over.wait()
        create.task_id, create.created, create.sender = earlier.task_id, earlier.created, earlier.sender
        if await self._store.get(create.task_id) is not None:
            return
        try:
            await self._add(replace(task, id=create.task_id, created=create.created), create)
        except StoreUnavailable:  # also said of an id that is taken
            if await self._store.get(create.task_id) is None:
                raise

    def _end(self, create: _Create, in_time: bool) -> None:
        mine = self._under_way.take(create)  # or somebody has taken it up
        if in_time:
            self._note(create)
        elif mine:
            create.left = time.monotonic()
            self._left.add(create)
            self._in_order.append(create)
        create.request = None
        create.over.set()

    def _forget_old(self) -> None:
        old = time.monotonic() - self._limits.window
        while self._in_order and (self._in_order[0].left < old or len(self._in_order) > self._limits.many):
            self._left.take(self._in_order.popleft())

    # Marks

    @asynccontextmanager
    async def noting(self) -> AsyncIterator[None]:
        """Remove the marks of answered creates from the store, as long as this context is open."""
        work = asyncio.create_task(self._note_for_ever(), name="answered creates")
        try:
            yield
        finally:
            work.cancel()
            await asyncio.wait([work])
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._note_all()
            except (TespError, TimeoutError) as error:
                log.warning("%d marks of answered creates are left: %s", len(self._arrived), error or "no answer")

    def _note(self, create: _Create) -> None:
        if len(self._arrived) >= self._limits.many:
            del self._arrived[next(iter(self._arrived))]
        self._arrived[create.task_id] = (create.sender, create.body)
        self._wake.set()

    async def _note_for_ever(self) -> None:
        pause = COLLECT
        while True:
            await self._wake.wait()
            await asyncio.sleep(pause)
            try:
                await self._note_all()
                pause = COLLECT
            except StoreUnavailable:
                pause = min(2 * pause, PATIENCE)
            except Exception:
                log.exception("Marks of answered creates could not be removed.")
                pause = PATIENCE

    async def _note_all(self) -> None:
        """Those that are there now; later ones are collected again."""
        self._wake.clear()
        todo, self._arrived = self._arrived, {}
        try:
            while todo:
                batch = dict(islice(todo.items(), BATCH))
                for sender in {sender for sender, _ in batch.values()}:
                    await self._store.answered(sender, {i: body for i, (who, body) in batch.items() if who == sender})
                for task_id in batch:
                    del todo[task_id]
        finally:
            if todo:
                self._arrived = todo | self._arrived
                self._wake.set()


__all__ = ["Creates", "Limits", "body_digest", "read_key"]
