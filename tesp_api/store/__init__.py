"""The seam to the place that remembers. Only the store remembers: API and dispatch meet here and nowhere else.

Every write is conditional (a `Change` names the version that it was made from), and losing that race is a normal
answer. `due_at` makes the store the queue as well: `take_due` hands out what is due and moves it ahead by a lease, so
that what a dead process held comes back by itself and two processes never hold the same task. Where one process at a
time must decide, it holds a right, which the store gives for a while.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Flag, auto
from types import TracebackType
from typing import Protocol, Self

from tesp_api.lifecycle import Change
from tesp_api.task import Tail, Task
from tesp_api.tes import TesState, TesView


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to list: all conditions hold together. `or_state` widens `state`; `name_prefix` is literal text.

    `tags`: pairs of key and value, an empty value meaning any. `after`: the id of the last task of the page before.
    """

    state: TesState | None = None
    or_state: TesState | None = None
    name_prefix: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    owner: str | None = None
    after: str | None = None
    limit: int = 256


@dataclass(frozen=True)
class Page:
    """Tasks, newest first, and whether there are more behind them."""

    tasks: tuple[Task, ...]
    more: bool


@dataclass(frozen=True)
class Load:
    """What the active tasks of one site ask for together."""

    jobs: int = 0
    cpus: float = 0.0
    ram_gb: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Once:
    """What tells a repeated create from a new one.

    `body` is a digest of who sent what, `key` one of who sent which Idempotency-Key (empty: none). `sender` is the
    process that takes the create, new at each start. Repeats of a body count only if it was created after `since` and
    not after `until`.
    """

    body: str
    sender: str
    key: str = ""
    since: float = 0.0
    until: float = math.inf


@dataclass(frozen=True)
class Repeat:
    """An earlier create that a new one may repeat, with the digest of its body.

    `by_key`: they share the Idempotency-Key. If not, they share the body, another process took the earlier one (its
    `sender`), and it is not known (yet) whether its answer has arrived.
    """

    task_id: str
    created: float
    body: str
    by_key: bool
    sender: str = ""


class Ring(Flag):
    """What may be worth a look."""

    QUEUED = auto()  # a task waits for a site
    ROOM = auto()  # a task has ended, so a site may have room
    OPEN = auto()  # a task that is not QUEUED has a new `due_at`


ANY = Ring.QUEUED | Ring.ROOM | Ring.OPEN


class Bell:
    """Wakes this process's loops when something may have become due. A hint: nothing is lost if nobody listens."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    def ring(self, what: Ring = ANY) -> None:
        """Wake those who wait for any of this. Call it on the event loop's thread."""
        for listener in self._listeners:
            listener.hear(what)

    def listen(self) -> Listener:
        """A new listener; it hears every ring from now on."""
        listener = Listener()
        self._listeners.add(listener)
        return listener


class Listener:
    """One loop's ear on a Bell."""

    def __init__(self) -> None:
        self._heard = 0  # as plain numbers: each create rings, and flags are slow
        self._awaited = ANY.value
        self._event = asyncio.Event()

    def hear(self, what: Ring) -> None:
        """The bell rang."""
        self._heard |= what.value
        if self._heard & self._awaited:
            self._event.set()

    async def wait(self, timeout: float, what: Ring = ANY) -> None:
        """Return after a ring for `what`, at once if it rang since the last call, or after `timeout` seconds."""
        self._awaited = what.value
        if self._heard & self._awaited:
            self._event.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._event.wait()
        self._event.clear()
        self._heard = 0


class TaskStore(Protocol):
    """Keeps tasks. An async context: enter before use. Every call may raise StoreUnavailable; whether a write was
    done is unknown then.

    `view` says how much of a task is loaded: MINIMAL its state only (`document` is empty, no attempts), BASIC all but
    the bodies, FULL everything.
    """

    bell: Bell

    def clock(self) -> float:
        """The store's time, which all its processes share: seconds since the epoch."""

    async def add(self, task: Task, once: Once | None = None) -> Repeat | None:
        """Keep a new task, durably: once this returns, no crash loses it.

        With `once` the task is not kept if it may repeat an earlier create, which is returned then. A key belongs to
        its task for as long as that is stored; a body is watched until `answered`.
        """

    async def answered(self, sender: str, creates: Mapping[str, str]) -> None:
        """The answers to these creates (task id -> digest of the body) of `sender` have arrived, so a later create
        with the same body is a new one."""

    async def get(self, task_id: str, view: TesView = TesView.MINIMAL, *, owner: str | None = None) -> Task | None:
        """The task, or None if there is none (of this owner, when one is given)."""

    async def page(self, query: Query, view: TesView = TesView.MINIMAL) -> Page:
        """Tasks that match, newest first (descending id)."""

    async def apply(self, task_id: str, change: Change, *, before: float | None = None) -> Task | None:
        """Write the change and return the new task without bodies; None if the task is at another version.

        With `before` only while the store's time is before it, but by no more than LONGEST_RIGHT; else RightLost: what
        `hold` gave is over.
        """

    async def put_tail(self, task_id: str, tail: Tail) -> None:
        """Keep what an active task has said so far in place of what was kept before. It changes no version.

        It need not survive a crash, and is gone when the task leaves the active states; of one that is not in them (any
        more) nothing is kept.
        """

    async def take_due(
        self, *, queued: bool, now: float, lease: float, limit: int, skip: Collection[str] = ()
    ) -> list[Task]:
        """Take at most `limit` tasks whose `due_at` is not after `now`, the longest due first, bodies not loaded.

        `queued` takes those in QUEUED, else all others. Their `due_at` becomes `now + lease` and their version grows,
        so that no other process takes them meanwhile. Those QUEUED in one of the lanes `skip` are passed over.
        """

    async def next_due(self, *, queued: bool, skip: Collection[str] = ()) -> float | None:
        """The earliest `due_at` of those that `take_due` would look at, or None."""

    async def bring_forward(self, later_than: float, now: float, limit: int) -> int:
        """Make tasks due `now` whose `due_at` is after `later_than`, the earliest first; how many there were. At most
        `limit` of those QUEUED, and of the others."""

    async def loads(self) -> Mapping[str, Load]:
        """What the active tasks ask for, by site; sites without any are left out."""

    async def report(self, site: str, at: float, text: str) -> None:
        """Keep what a process has to say of a site at that time, instead of what was said before."""

    async def reports(self) -> Mapping[str, tuple[float, str]]:
        """What was reported last of each site, and when."""

    async def hold(self, right: str, holder: str, seconds: float) -> float | None:
        """Take a right, or keep it, for `seconds` from now: until when, by the store's time. None: another has it.

        With no seconds it is given back. One that would last longer than LONGEST_RIGHT was given before the store's
        time was set back; it is worth nothing any more, here and in `apply`.
        """

    async def purge(self, ended_before: float, limit: int) -> int:
        """Delete at most `limit` tasks, with all that belongs to them, that ended before that time and are cleaned up
        at their sites, the oldest first; how many there were."""

    async def contents(self, task_id: str) -> Mapping[int, str]:
        """The literal contents of a task's inputs, by input index."""

    async def ping(self) -> None:
        """StoreUnavailable unless the store can be read."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


FEW = 1000
"""Up to here the tasks are counted that fulfil one of several conditions; the rarest leads a query."""

SAMPLE = 50
"""Of conditions that many tasks fulfil, so many of the newest tell which is the rarest."""

HEADS = (1, 6, 12, 24)
"""Tasks whose names have a head in common, so many characters, are also listed in the order of their ids.

Of a name prefix with many matches the newest are found there: the head that is nearest to it has few others.
"""

LONGEST_RIGHT = 600.0
"""Most seconds for which a right is given."""

STALE = 3600.0
"""Seconds after which nobody repeats a create any more; its mark may go."""


def beyond(prefix: str) -> str | None:
    """The first text after all that begin with `prefix`, in the order of code points; None if there is none."""
    while prefix:
        code = ord(prefix[-1]) + 1
        if code <= 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if 0xD800 <= code < 0xE000 else code)
        prefix = prefix[:-1]
    return None


def ring_for(task: Task) -> Ring:
    """What a store rings after it has changed a task."""
    if task.final:
        return Ring.ROOM | Ring.OPEN
    return Ring.QUEUED | Ring.ROOM if task.state is TesState.QUEUED else Ring.OPEN
