"""The embedded store: SQLite, one file, several processes of one machine at most.

One thread writes. It commits all the calls that are waiting as one transaction, so a burst of creates costs one flush
to disk and not one each; another thread reads. Calls that must survive a power cut (new tasks, state changes) are
flushed, moves of `due_at` alone are not: they only repeat a look.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tesp_api.errors import MailboxFull, RightLost, StoreUnavailable, StoreUnusable
from tesp_api.lifecycle import KEEP, Change
from tesp_api.parameters import lane
from tesp_api.store import (
    FEW,
    HEADS,
    LONGEST_RIGHT,
    SAMPLE,
    STALE,
    Bell,
    Load,
    Once,
    Page,
    Query,
    Repeat,
    Ring,
    beyond,
    ring_for,
)
from tesp_api.store.codec import (
    SYSTEM,
    asked,
    attempts_from_json,
    attempts_to_json,
    bodies_from_rows,
    content_rows,
    ended_at,
    stream_rows,
    tail_from_json,
    tail_to_json,
)
from tesp_api.store.mailbox import (
    BOX_BYTES,
    BOX_LETTERS,
    LETTER_BYTES,
    READ_LETTERS,
    Doorbell,
    Letter,
    last_of_read,
    next_letter_id,
)
from tesp_api.task import ACTIVE, FINAL, Bodies, Tail, Task, put_attempt
from tesp_api.tes import TesState, TesView

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")
_Add = tuple[Task, Once | None]

_ACTIVE = ", ".join(f"'{state}'" for state in sorted(ACTIVE))
_FINAL = ", ".join(f"'{state}'" for state in sorted(FINAL))

MIGRATIONS = (
    # 1: the first schema. The client's document has a table of its own: SQLite writes a changed row as a whole, and
    # `due_at` changes with every look.
    f"""
    CREATE TABLE task (
        id TEXT PRIMARY KEY NOT NULL,
        state TEXT NOT NULL,
        version INTEGER NOT NULL,
        due_at REAL,
        created REAL NOT NULL,
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        site TEXT,
        cpus REAL NOT NULL,
        ram_gb REAL NOT NULL,
        attempts TEXT NOT NULL
    );
    CREATE TABLE document (
        task_id TEXT PRIMARY KEY NOT NULL REFERENCES task (id) ON DELETE CASCADE,
        text TEXT NOT NULL
    );
    CREATE INDEX task_queued ON task (due_at) WHERE state = 'QUEUED' AND due_at IS NOT NULL;
    CREATE INDEX task_open ON task (due_at) WHERE state <> 'QUEUED' AND due_at IS NOT NULL;
    CREATE INDEX task_active ON task (site, cpus, ram_gb) WHERE state IN ({_ACTIVE});
    CREATE INDEX task_state ON task (state, id);
    CREATE INDEX task_name ON task (name, id);
    CREATE INDEX task_owner ON task (owner, id);
    CREATE TABLE tag (
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
        PRIMARY KEY (key, value, task_id)
    ) WITHOUT ROWID;
    CREATE INDEX tag_key ON tag (key, task_id);
    CREATE TABLE body (
        task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
        kind TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        position INTEGER NOT NULL,
        text TEXT NOT NULL,
        PRIMARY KEY (task_id, kind, attempt, position)
    );
    """,
    # 2: repeated creates, rights, the purge. Tags lose their reference to the task: to enforce it at a deletion SQLite
    # would read the whole table, or need one more index.
    f"""
    ALTER TABLE task ADD COLUMN ended REAL;
    ALTER TABLE task ADD COLUMN key TEXT;
    ALTER TABLE task ADD COLUMN body TEXT;
    UPDATE task SET ended = created WHERE state IN ({_FINAL});
    CREATE UNIQUE INDEX task_key ON task (key) WHERE key IS NOT NULL;
    CREATE INDEX task_ended ON task (ended) WHERE ended IS NOT NULL AND due_at IS NULL;
    CREATE TABLE unanswered (
        body TEXT NOT NULL,
        sender TEXT NOT NULL,
        task_id TEXT NOT NULL,
        created REAL NOT NULL,
        PRIMARY KEY (body, sender, task_id)
    ) WITHOUT ROWID;
    CREATE TABLE holding (
        name TEXT PRIMARY KEY NOT NULL,
        holder TEXT NOT NULL,
        until REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE tag_2 (
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        task_id TEXT NOT NULL,
        PRIMARY KEY (key, value, task_id)
    ) WITHOUT ROWID;
    INSERT INTO tag_2 SELECT key, value, task_id FROM tag;
    DROP TABLE tag;
    ALTER TABLE tag_2 RENAME TO tag;
    CREATE INDEX tag_key ON tag (key, task_id);
    """
    + "".join(f"CREATE INDEX task_head_{length} ON task (substr(name, 1, {length}), id, name);" for length in HEADS),
    # 3: letters. AUTOINCREMENT: the id of a letter that is gone must not come back.
    """
    CREATE TABLE letter (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        box TEXT NOT NULL,
        key TEXT NOT NULL,
        size INTEGER NOT NULL,
        written REAL NOT NULL,
        text TEXT NOT NULL
    );
    CREATE UNIQUE INDEX letter_key ON letter (box, key);
    CREATE INDEX letter_box ON letter (box, id, size);
    CREATE INDEX letter_written ON letter (written);
    """,
    # 4: what running tasks have said so far.
    """
    CREATE TABLE tail (
        task_id TEXT PRIMARY KEY NOT NULL REFERENCES task (id) ON DELETE CASCADE,
        text TEXT NOT NULL
    );
    """,
    # 5: lanes of the queue (tasks from before have none), and what is said of sites.
    """
    ALTER TABLE task ADD COLUMN lane TEXT;
    DROP INDEX task_queued;
    CREATE INDEX task_queued ON task (due_at, lane) WHERE state = 'QUEUED' AND due_at IS NOT NULL;
    CREATE TABLE site_report (
        site TEXT PRIMARY KEY NOT NULL,
        at REAL NOT NULL,
        text TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
)
"""SQL that leads from each schema version to the next; `PRAGMA user_version` says how many have been run."""

_MINIMAL = "task.id, task.state, task.version, task.due_at, task.created, task.owner"
_BASIC = _MINIMAL + ", task.attempts, (SELECT text FROM document WHERE document.task_id = task.id)"
_UNANSWERED = "SELECT task_id, created, sender FROM unanswered WHERE body = ?1 AND created > ?3 AND created <= ?4"
_ALL = "task AS lead WHERE 1"
# Two ranges of the primary key: a burst of equal creates at one process is passed over, however long it is.
_MARKED = "WITH asked (n, body, sender, since, until) AS (VALUES {}) SELECT n FROM asked WHERE " + " OR ".join(
    "EXISTS (SELECT 1 FROM unanswered AS mark WHERE mark.body = asked.body"
    f" AND mark.sender {sign} asked.sender AND created > since AND created <= until)"
    for sign in "<>"
)
_TASK = "task (id, state, version, due_at, created, owner, name, site, cpus, ram_gb, attempts, ended, key, body, lane)"
BATCH = 256
LOT = 16
"""Rows in one statement, at most."""
_OURS = (sqlite3.OperationalError, sqlite3.DatabaseError)
"""What the disk or another process did; anything else is the caller's."""


class SqliteStore:
    """The TaskStore on one SQLite file, or in memory with `path` ":memory:".

    `alone` keeps all other processes out; to open it is StoreUnavailable while one of them is in. `mail` keeps letters
    in the same file.
    """

    def __init__(self, path: Path | str, *, alone: bool = False) -> None:
        self.path = str(path)
        self.bell = Bell()
        self._writer = _Worker(self.path, writes=True, alone=alone)
        both = alone or self.path == ":memory:"
        self._reader = self._writer if both else _Worker(self.path, writes=False)
        self.mail = SqliteMailbox(self._writer, self._reader)

    async def __aenter__(self) -> Self:
        await self._writer.start(_migrate)
        try:
            if self._reader is not self._writer:
                await self._reader.start(None)
        except BaseException:
            await self._writer.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in {self._reader, self._writer}:
            await worker.stop()

    def clock(self) -> float:
        return time.time()

    async def add(self, task: Task, once: Once | None = None) -> Repeat | None:
        repeat = await self._writer.call_joined(_add_all, (task, once), durable=True)
        if repeat is None:
            self.bell.ring(Ring.QUEUED)
        return repeat

    async def answered(self, sender: str, creates: Mapping[str, str]) -> None:
        await self._writer.call(lambda db: _answered(db, sender, creates))

    async def get(self, task_id: str, view: TesView = TesView.MINIMAL, *, owner: str | None = None) -> Task | None:
        return await self._reader.call(lambda db: _get(db, task_id, view, owner))

    async def page(self, query: Query, view: TesView = TesView.MINIMAL) -> Page:
        return await self._reader.call(lambda db: _page(db, query, view))

    async def apply(self, task_id: str, change: Change, *, before: float | None = None) -> Task | None:
        durable = change.state is not None or bool(change.system)
        task = await self._writer.call(lambda db: _apply(db, task_id, change, before), durable=durable)
        if task is not None and (change.state is not None or change.due_at is not KEEP):
            self.bell.ring(ring_for(task))
        return task

    async def put_tail(self, task_id: str, tail: Tail) -> None:
        await self._writer.call(lambda db: _put_tail(db, task_id, tail))

    async def take_due(
        self, *, queued: bool, now: float, lease: float, limit: int, skip: Collection[str] = ()
    ) -> list[Task]:
        return await self._writer.call(lambda db: _take_due(db, queued, now, lease, limit, skip))

    async def next_due(self, *, queued: bool, skip: Collection[str] = ()) -> float | None:
        return await self._reader.call(lambda db: _next_due(db, queued, skip))

    async def bring_forward(self, later_than: float, now: float, limit: int) -> int:
        return await self._writer.call(
            lambda db: sum(_bring_forward(db, queued, later_than, now, limit) for queued in (True, False))
        )

    async def loads(self) -> Mapping[str, Load]:
        return await self._reader.call(_loads)

    async def report(self, site: str, at: float, text: str) -> None:
        await self._writer.call(lambda db: _report(db, site, at, text))

    async def reports(self) -> Mapping[str, tuple[float, str]]:
        return await self._reader.call(_reports)

    async def hold(self, right: str, holder: str, seconds: float) -> float | None:
        return await self._writer.call(lambda db: _hold(db, right, holder, seconds))

    async def purge(self, ended_before: float, limit: int) -> int:
        return await self._writer.call(lambda db: _purge(db, ended_before, limit))

    async def contents(self, task_id: str) -> Mapping[int, str]:
        return (await self._reader.call(lambda db: _bodies(db, [task_id])))[task_id].contents

    async def ping(self) -> None:
        await self._reader.call(lambda db: db.execute("SELECT 1 FROM sqlite_schema").fetchone())


class SqliteMailbox:
    """The Mailbox of a SqliteStore, open while that is."""

    def __init__(self, writer: _Worker, reader: _Worker) -> None:
        self.doorbell = Doorbell()
        self._writer, self._reader = writer, reader

    async def put(self, box: str, text: str, key: str, *, instead: bool = False) -> int:
        if (size := len(text.encode())) > LETTER_BYTES:
            raise ValueError(f"a letter of {size} bytes is too long")
        letter_id = await self._writer.call(lambda db: _put_letter(db, box, text, size, key, instead), durable=True)
        self.doorbell.ring(box)
        return letter_id

    async def read(self, box: str, after: int = 0) -> Sequence[Letter]:
        return await self._reader.call(lambda db: _read_letters(db, box, after))

    async def drop(self, box: str, up_to: int) -> None:
        await self._writer.call(lambda db: _drop_letters(db, box, up_to))

    async def expire(self, before: float) -> None:
        await self._writer.call(lambda db: _expire_letters(db, before))


# One thread, one connection


class _Worker:
    """Runs functions on one connection in one thread, as many as are waiting in one transaction."""

    def __init__(self, path: str, *, writes: bool, alone: bool = False) -> None:
        self._path = path
        self._writes = writes
        self._alone = alone
        self._durable: bool | None = None
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._open_for_calls = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._db: sqlite3.Connection | None = None

    async def start(self, prepare: Callable[[sqlite3.Connection], None] | None) -> None:
        self._loop = asyncio.get_running_loop()
        opened = self._loop.run_in_executor(None, self._open, prepare)
        self._db = await opened
        self._thread = threading.Thread(target=self._run, name="tesp-sqlite", daemon=True)
        self._thread.start()
        self._open_for_calls = True

    async def stop(self) -> None:
        if self._thread is None:
            return
        self._open_for_calls = False  # what is queued is still done; nothing may queue up behind the end
        self._calls.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._thread = None

    async def call(self, function: Callable[[sqlite3.Connection], T], *, durable: bool = False) -> T:
        return await self.call_joined(lambda db, _: [function(db)], None, durable=durable)

    async def call_joined(
        self, function: Callable[[sqlite3.Connection, list[A]], list[T]], argument: A, *, durable: bool = False
    ) -> T:
        """As `call`; but calls of one function that wait one behind the other are made as one, with their arguments in
        a list, for a list of results."""
        if not self._open_for_calls or self._loop is None:
            raise StoreUnavailable("The store is not open.")
        call = _Call(function, argument, durable, self._loop.create_future())
        self._calls.put(call)
        result: T = await call.future
        return result

    def _open(self, prepare: Callable[[sqlite3.Connection], None] | None) -> sqlite3.Connection:
        db = None
        try:
            if self._path != ":memory:":
                Path(self._path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                Path(self._path).touch(mode=0o600)  # tasks may hold secrets
            patience = 1 if self._alone else 30
            db = sqlite3.connect(
                self._path,
                isolation_level=None,
                check_same_thread=False,
                timeout=patience,
                cached_statements=256,  # those with many rows, in each length, and all others
            )
            if self._alone:
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA foreign_keys = ON")
            if prepare is not None:
                prepare(db)
        except (OSError, sqlite3.Error, StoreUnavailable) as error:
            if db is not None:
                db.close()
            if isinstance(error, StoreUnavailable):
                raise
            raise StoreUnavailable(f"The store {self._path} cannot be opened: {error}") from error
        return db

    def _run(self) -> None:
        assert self._db is not None
        assert self._loop is not None
        last = False
        while not last:
            batch, last = self._next_batch()
            if batch:
                self._commit(batch)
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    self._loop.call_soon_threadsafe(_answer, batch)
        self._db.close()

    def _next_batch(self) -> tuple[list[_Call], bool]:
        """Wait for a call, then take all that wait; and whether the worker is to stop after them."""
        batch: list[_Call] = []
        call = self._calls.get()
        while call is not None:
            batch.append(call)
            if len(batch) == BATCH or self._calls.empty():
                return batch, False
            call = self._calls.get()
        return batch, True

    def _commit(self, calls: list[_Call]) -> None:
        """Run the calls in one transaction. If one of them fails, all are undone and each is run in its own."""
        db = self._db
        assert db is not None
        try:
            self._flush_to_disk(db, any(call.durable for call in calls))
            db.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")
            if self._all_ran(db, calls):
                db.execute("COMMIT")
                return
        except Exception as error:  # the database as a whole: nothing of this was done, and trying singly is useless
            _roll_back(db)
            for call in calls:
                call.error = _known(error)
            return
        if len(calls) > 1:
            for call in calls:
                self._commit([call])

    def _all_ran(self, db: sqlite3.Connection, calls: list[_Call]) -> bool:
        """Run the calls; False if one failed, which holds the error then, and nothing of the transaction is left."""
        for function, each in groupby(calls, key=attrgetter("function")):
            joined = list(each)
            try:
                results = function(db, [call.argument for call in joined])
            except Exception as error:
                for call in joined:
                    call.error = _known(error)
                _roll_back(db)
                return False
            for call, result in zip(joined, results, strict=True):
                call.result, call.error = result, None
        return True

    def _flush_to_disk(self, db: sqlite3.Connection, durable: bool) -> None:
        if self._writes and durable != self._durable:
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")


def _known(error: Exception) -> Exception:
    return StoreUnavailable(f"The store could not be used: {error}") if isinstance(error, _OURS) else error


class _Call:
    def __init__(
        self,
        function: Callable[[sqlite3.Connection, list[Any]], list[Any]],
        argument: Any,
        durable: bool,
        future: asyncio.Future[Any],
    ) -> None:
        self.function = function
        self.argument = argument
        self.durable = durable
        self.future = future
        self.result: Any = None
        self.error: Exception | None = None


def _answer(batch: list[_Call]) -> None:
    for call in batch:
        if call.future.done():  # the caller went away; what it asked for is done all the same
            continue
        if call.error is not None:
            call.future.set_exception(call.error)
        else:
            call.future.set_result(call.result)


def _migrate(db: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    db.execute("BEGIN EXCLUSIVE")  # two processes that start together must not both migrate
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        db.execute("ROLLBACK")
        raise StoreUnusable(
            f"The store was written by a newer release (schema {version}, this one knows {len(migrations)})."
        )
    for script in migrations[version:]:
        for statement in script.split(";"):
            if statement.strip():
                db.execute(statement)
    db.execute(f"PRAGMA user_version = {len(migrations)}")
    db.execute("COMMIT")


# The statements


def _add_all(db: sqlite3.Connection, adds: Sequence[_Add]) -> list[Repeat | None]:
    """Keep tasks, with the same outcome as one after the other; for each what it repeats."""
    repeats: list[Repeat | None] = []
    while len(repeats) < len(adds):
        some = list(_unlike(adds[len(repeats) :]))
        found = _repeats(db, [once for _, once in some])
        _insert_all(db, [add for add, repeat in zip(some, found, strict=True) if repeat is None])
        repeats += found
    return repeats


def _unlike(adds: Sequence[_Add]) -> Iterator[_Add]:
    """The first of them, up to one that may repeat another one of them."""
    senders: dict[str, str] = {}
    for task, once in adds:
        if once is not None:
            mark = once.key or once.body
            if mark in senders and (once.key or senders[mark] != once.sender):
                return
            senders.setdefault(mark, once.sender)
        yield task, once


def _insert_all(db: sqlite3.Connection, adds: Sequence[_Add]) -> None:
    _insert(db, _TASK, [_task_row(task, once) for task, once in adds])
    marks = [
        (once.body, once.sender, task.id, task.created) for task, once in adds if once is not None and not once.key
    ]
    _insert(db, "unanswered", marks)
    _insert(db, "document (task_id, text)", [(task.id, task.document) for task, _ in adds])
    tags = [(key, value, task.id) for task, _ in adds for key, value in (task.spec.tags or {}).items()]
    _insert(db, "tag (key, value, task_id)", tags)
    for task, _ in adds:
        if task.bodies is not None:
            _put_bodies(db, task.id, [*content_rows(task.bodies), *stream_rows(task.bodies.streams)])
            for number, lines in task.bodies.system.items():
                _add_lines(db, task.id, number, lines)


def _task_row(task: Task, once: Once | None) -> tuple[Any, ...]:
    cpus, ram_gb = asked(task)
    key, body = (once.key, once.body) if once is not None and once.key else (None, None)
    return (
        task.id,
        task.state,
        task.version,
        task.due_at,
        task.created,
        task.owner,
        task.spec.name or "",
        task.attempt.site if task.attempt else None,
        cpus,
        ram_gb,
        attempts_to_json(task.attempts),
        ended_at(task),
        key,
        body,
        lane(task.spec),
    )


def _repeats(db: sqlite3.Connection, onces: Sequence[Once | None]) -> list[Repeat | None]:
    marked: set[int] = set()
    asked_for = [(n, *_mark_of(once)) for n, once in enumerate(onces) if once is not None and not once.key]
    for rows in _some(asked_for):
        if len(rows) == 1:
            marked.add(rows[0][0])  # perhaps; one alone is looked for at once
            continue
        marked.update(n for (n,) in db.execute(_MARKED.format(_values(5, len(rows))), [*chain(*rows)]))
    return [
        _repeat(db, once) if once is not None and (once.key or n in marked) else None for n, once in enumerate(onces)
    ]


def _repeat(db: sqlite3.Connection, once: Once) -> Repeat | None:
    if once.key:
        row = db.execute("SELECT id, created, body FROM task WHERE key = ?", (once.key,)).fetchone()
        return Repeat(row[0], row[1], row[2], by_key=True) if row else None
    row = db.execute(
        f"{_UNANSWERED} AND sender < ?2 UNION ALL {_UNANSWERED} AND sender > ?2 LIMIT 1", _mark_of(once)
    ).fetchone()
    return Repeat(row[0], row[1], once.body, by_key=False, sender=row[2]) if row else None


def _mark_of(once: Once) -> tuple[str, str, float, float]:
    return once.body, once.sender, once.since, once.until


def _answered(db: sqlite3.Connection, sender: str, creates: Mapping[str, str]) -> None:
    for rows in _some([(body, sender, task_id) for task_id, body in creates.items()]):
        given = f"SELECT * FROM (VALUES {_values(3, len(rows))})"  # without SELECT, SQLite would read the whole table
        db.execute(f"DELETE FROM unanswered WHERE (body, sender, task_id) IN ({given})", [*chain(*rows)])


def _put_bodies(db: sqlite3.Connection, task_id: str, rows: Sequence[tuple[str, int, int, str]]) -> None:
    if rows:
        db.executemany(
            "INSERT OR REPLACE INTO body (task_id, kind, attempt, position, text) VALUES (?, ?, ?, ?, ?)",
            [(task_id, *row) for row in rows],
        )


# Many rows in one statement: at each step of a statement Python lets go of the interpreter, and while the event loop is
# busy this thread would have to wait for it, once for every row.


def _insert(db: sqlite3.Connection, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    for some in _some(rows):
        db.execute(f"INSERT INTO {into} VALUES {_values(len(some[0]), len(some))}", [*chain(*some)])


def _some(rows: Sequence[R]) -> Iterator[Sequence[R]]:
    """The rows in lots: their statements are of few different lengths, and are prepared once."""
    for at in range(0, len(rows), LOT):
        yield rows[at : at + LOT]


@cache
def _values(columns: int, rows: int) -> str:
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


def _add_lines(db: sqlite3.Connection, task_id: str, number: int, lines: Sequence[str]) -> None:
    if not lines:
        return
    (start,) = db.execute(
        "SELECT coalesce(max(position), -1) + 1 FROM body WHERE task_id = ? AND kind = ? AND attempt = ?",
        (task_id, SYSTEM, number),
    ).fetchone()
    _put_bodies(db, task_id, [(SYSTEM, number, start + at, line) for at, line in enumerate(lines)])


def _get(db: sqlite3.Connection, task_id: str, view: TesView, owner: str | None) -> Task | None:
    columns = _MINIMAL if view is TesView.MINIMAL else _BASIC
    row = db.execute(f"SELECT {columns} FROM task WHERE id = ?", (task_id,)).fetchone()
    if row is None:
        return None
    task = _task(row)
    if owner is not None and task.owner != owner:
        return None
    return _with_bodies(db, [task])[0] if view is TesView.FULL else task


def _with_bodies(db: sqlite3.Connection, tasks: list[Task]) -> list[Task]:
    bodies = _bodies(db, [task.id for task in tasks])
    tails = _tails(db, [task.id for task in tasks if task.state in ACTIVE])
    return [replace(task, bodies=replace(bodies[task.id], tail=tails.get(task.id))) for task in tasks]


def _task(row: tuple[Any, ...]) -> Task:
    task_id, state, version, due_at, created, owner, *rest = row
    attempts, document = rest or ("[]", "")
    return Task(
        id=task_id,
        state=TesState(state),
        version=version,
        due_at=due_at,
        created=created,
        owner=owner,
        attempts=attempts_from_json(attempts),
        document=document,
    )


def _bodies(db: sqlite3.Connection, task_ids: list[str]) -> dict[str, Bodies]:
    rows: dict[str, list[tuple[str, int, int, str]]] = {task_id: [] for task_id in task_ids}
    found = db.execute(
        "SELECT task_id, kind, attempt, position, text FROM body"
        " WHERE task_id IN (SELECT value FROM json_each(?)) ORDER BY task_id, kind, attempt, position",
        (json.dumps(task_ids),),
    )
    for task_id, *row in found:
        rows[task_id].append((row[0], row[1], row[2], row[3]))
    return {task_id: bodies_from_rows(each) for task_id, each in rows.items()}


def _tails(db: sqlite3.Connection, task_ids: list[str]) -> dict[str, Tail]:
    if not task_ids:
        return {}
    query = "SELECT task_id, text FROM tail WHERE task_id IN (SELECT value FROM json_each(?))"
    return {task_id: tail_from_json(text) for task_id, text in db.execute(query, (json.dumps(task_ids),))}


def _put_tail(db: sqlite3.Connection, task_id: str, tail: Tail) -> None:
    db.execute(
        f"INSERT INTO tail SELECT id, ?2 FROM task WHERE id = ?1 AND state IN ({_ACTIVE})"
        " ON CONFLICT (task_id) DO UPDATE SET text = ?2 WHERE text <> ?2",
        (task_id, tail_to_json(tail)),
    )


def _page(db: sqlite3.Connection, query: Query, view: TesView) -> Page:
    columns = _MINIMAL if view is TesView.MINIMAL else _BASIC
    found, values = _find(db, query)
    rows = db.execute(
        f"SELECT {columns} FROM ({found}) AS found CROSS JOIN task ON task.id = found.id", values
    ).fetchall()
    rows.sort(reverse=True)
    tasks = [_task(row) for row in rows[: query.limit]]
    if view is TesView.FULL:
        tasks = _with_bodies(db, tasks)
    return Page(tuple(tasks), more=len(rows) > query.limit)


@dataclass(frozen=True)
class _Condition:
    """One condition of a query, and the index that lists the ids of the tasks that fulfil it.

    `{0}` in `terms` is the table. Ids are listed in their order; where they are not, `in_order` says the same by an
    index that has them in order.
    """

    table: str
    index: str
    terms: tuple[str, ...]
    values: tuple[Any, ...]
    in_order: _Condition | None = None

    @property
    def id(self) -> str:
        """The column of ids."""
        return "task_id" if self.table == "tag" else "id"

    @property
    def rows(self) -> str:
        """FROM and WHERE for all of them."""
        return self._rows("lead")

    def holds(self, task_id: str) -> str:
        """The condition for one task."""
        return f"EXISTS (SELECT 1 FROM {self._rows('other')} AND other.{self.id} = {task_id})"

    def _rows(self, alias: str) -> str:
        using = f" INDEXED BY {self.index}" if self.index else ""
        return f"{self.table} AS {alias}{using} WHERE {' AND '.join(self.terms).format(alias)}"


def _conditions(query: Query) -> list[_Condition]:
    found = []
    for key, value in query.tags:
        if value:
            found.append(_Condition("tag", "", ("{0}.key = ?", "{0}.value = ?"), (key, value)))
        else:
            found.append(_Condition("tag", "tag_key", ("{0}.key = ?",), (key,)))
    if query.owner is not None:
        found.append(_Condition("task", "task_owner", ("{0}.owner = ?",), (query.owner,)))
    if query.state is not None:
        states = (query.state, query.or_state) if query.or_state else (query.state,)
        found.append(_Condition("task", "task_state", (f"{{0}}.state IN ({', '.join('?' * len(states))})",), states))
    if query.name_prefix:
        found.append(_named(query.name_prefix))
    return found


def _named(prefix: str) -> _Condition:
    end = beyond(prefix)
    terms, values = (("{0}.name >= ?", "{0}.name < ?"), (prefix, end)) if end else (("{0}.name >= ?",), (prefix,))
    length = max(each for each in HEADS if each <= len(prefix))
    same_head = f"substr({{0}}.name, 1, {length}) = ?"
    in_order = _Condition("task", f"task_head_{length}", (same_head, *terms), (prefix[:length], *values))
    return _Condition("task", "task_name", terms, values, in_order)


def _find(db: sqlite3.Connection, query: Query) -> tuple[str, list[Any]]:
    """What selects the ids on a page: it goes along the index of one condition and looks into those of the others.

    It reads no records, which lie far apart: one costs as much as many entries of an index.
    """
    lead, others = _lead(db, _conditions(query))
    task_id, rows, values = (f"lead.{lead.id}", lead.rows, [*lead.values]) if lead else ("lead.id", _ALL, [])
    for each in others:
        rows += f" AND {each.holds(task_id)}"
        values += each.values
    if query.after is not None:
        rows += f" AND {task_id} < ?"
        values.append(query.after)
    return f"SELECT {task_id} AS id FROM {rows} ORDER BY {task_id} DESC LIMIT ?", [*values, query.limit + 1]


def _lead(db: sqlite3.Connection, conditions: list[_Condition]) -> tuple[_Condition | None, list[_Condition]]:
    """The condition that leads, and the others. The rarest leads; what is not rare is judged by its newest tasks."""
    if not conditions:
        return None, []
    in_order = [each.in_order or each for each in conditions]
    if in_order == conditions[:1]:
        return conditions[0], []
    for bound in (SAMPLE, FEW):
        counts = [_count(db, each, bound) for each in conditions]
        if min(counts) < bound:
            break
    at = counts.index(min(counts))
    lead = conditions[at]  # if it has to be sorted, that is soon done
    if counts[at] == FEW:
        marks = [_mark(db, each) for each in in_order] if len(in_order) > 1 else [""]
        at = marks.index(min(marks))
        lead = in_order[at]
    return lead, in_order[:at] + in_order[at + 1 :]


def _count(db: sqlite3.Connection, condition: _Condition, bound: int) -> int:
    """How many tasks fulfil it, at most `bound`."""
    sql = f"SELECT count(*) FROM (SELECT 1 FROM {condition.rows} LIMIT ?)"
    count: int = db.execute(sql, (*condition.values, bound)).fetchone()[0]
    return count


def _mark(db: sqlite3.Connection, condition: _Condition) -> str:
    """The id of the SAMPLEth newest task that fulfils it: the rarer they are, the older is that one."""
    task_id = f"lead.{condition.id}"
    sql = f"SELECT {task_id} FROM {condition.rows} ORDER BY {task_id} DESC LIMIT 1 OFFSET {SAMPLE - 1}"
    row = db.execute(sql, condition.values).fetchone()
    return row[0] if row else ""


def _apply(db: sqlite3.Connection, task_id: str, change: Change, before: float | None = None) -> Task | None:
    task = _get(db, task_id, TesView.BASIC, None)
    if task is None or task.version != change.version:
        return None
    now = time.time()
    if before is not None and not before - LONGEST_RIGHT <= now < before:
        raise RightLost("The right ran out before the change was written.")
    attempts = put_attempt(task.attempts, change.attempt) if change.attempt else task.attempts
    task = replace(
        task,
        version=task.version + 1,
        state=change.state or task.state,
        due_at=task.due_at if change.due_at is KEEP else change.due_at,
        attempts=attempts,
    )
    db.execute(
        "UPDATE task SET state = ?, version = ?, due_at = ?, site = ?, attempts = ?, ended = coalesce(ended, ?)"
        " WHERE id = ?",
        (
            task.state,
            task.version,
            task.due_at,
            attempts[-1].site if attempts else None,
            attempts_to_json(attempts),
            now if task.final else None,
            task_id,
        ),
    )
    if task.state not in ACTIVE:
        db.execute("DELETE FROM tail WHERE task_id = ?", (task_id,))
    _put_bodies(db, task_id, stream_rows(change.streams))
    _add_lines(db, task_id, change.system_of, change.system)
    return task


def _due(queued: bool, skip: Collection[str]) -> tuple[str, list[str]]:
    """Where to find what is due. Left alone, SQLite would take the index of states and sort the whole queue."""
    index, sign = ("task_queued", "=") if queued else ("task_open", "<>")
    found = f"task INDEXED BY {index} WHERE state {sign} 'QUEUED' AND due_at IS NOT NULL"
    if not (queued and skip):
        return found, []
    return f"{found} AND coalesce(lane, '') NOT IN ({', '.join('?' * len(skip))})", list(skip)


def _take_due(
    db: sqlite3.Connection, queued: bool, now: float, lease: float, limit: int, skip: Collection[str] = ()
) -> list[Task]:
    due, lanes = _due(queued, skip)
    rows = db.execute(
        f"SELECT {_BASIC} FROM {due} AND due_at <= ? ORDER BY due_at LIMIT ?", (*lanes, now, limit)
    ).fetchall()
    tasks = [replace(task, due_at=now + lease, version=task.version + 1) for task in map(_task, rows)]
    db.executemany(
        "UPDATE task SET due_at = ?, version = ? WHERE id = ?", [(task.due_at, task.version, task.id) for task in tasks]
    )
    return tasks


def _next_due(db: sqlite3.Connection, queued: bool, skip: Collection[str] = ()) -> float | None:
    due, lanes = _due(queued, skip)
    row = db.execute(f"SELECT min(due_at) FROM {due}", lanes).fetchone()
    due_at: float | None = row[0]
    return due_at


def _bring_forward(db: sqlite3.Connection, queued: bool, later_than: float, now: float, limit: int) -> int:
    due, _ = _due(queued, ())
    found = f"SELECT id FROM {due} AND due_at > ? ORDER BY due_at LIMIT ?"
    return db.execute(f"UPDATE task SET due_at = ? WHERE id IN ({found})", (now, later_than, limit)).rowcount


def _loads(db: sqlite3.Connection) -> dict[str, Load]:
    rows = db.execute(
        "SELECT site, count(*), sum(cpus), sum(ram_gb) FROM task INDEXED BY task_active"
        f" WHERE state IN ({_ACTIVE}) GROUP BY site"
    )
    return {site: Load(jobs, cpus, ram_gb) for site, jobs, cpus, ram_gb in rows}


def _report(db: sqlite3.Connection, site: str, at: float, text: str) -> None:
    db.execute("INSERT OR REPLACE INTO site_report VALUES (?, ?, ?)", (site, at, text))


def _reports(db: sqlite3.Connection) -> dict[str, tuple[float, str]]:
    return {site: (at, text) for site, at, text in db.execute("SELECT site, at, text FROM site_report")}


def _hold(db: sqlite3.Connection, right: str, holder: str, seconds: float) -> float | None:
    now = time.time()
    done = db.execute(
        "INSERT INTO holding VALUES (?1, ?2, ?3) ON CONFLICT (name) DO UPDATE SET holder = ?2, until = ?3"
        " WHERE holder = ?2 OR until <= ?4 OR until > ?5",
        (right, holder, now + seconds, now, now + LONGEST_RIGHT),
    )
    return now + seconds if done.rowcount else None


def _purge(db: sqlite3.Connection, ended_before: float, limit: int) -> int:
    rows = db.execute(
        "SELECT id, document.text FROM task INDEXED BY task_ended JOIN document ON document.task_id = task.id"
        " WHERE ended IS NOT NULL AND due_at IS NULL AND ended < ? ORDER BY ended LIMIT ?",
        (ended_before, limit),
    ).fetchall()
    for task_id, text in rows:
        tags = (json.loads(text).get("tags") or {}).items()
        db.executemany(
            "DELETE FROM tag WHERE key = ? AND value = ? AND task_id = ?", [(k, v, task_id) for k, v in tags]
        )
    db.executemany("DELETE FROM task WHERE id = ?", [(task_id,) for task_id, _ in rows])  # the rest goes with it
    db.execute("DELETE FROM unanswered WHERE created < ?", (time.time() - STALE,))
    return len(rows)


def _put_letter(db: sqlite3.Connection, box: str, text: str, size: int, key: str, instead: bool) -> int:
    found = db.execute("SELECT id FROM letter WHERE box = ? AND key = ?", (box, key)).fetchone()
    if found is not None and not instead:
        there: int = found[0]
        return there
    count, total = db.execute("SELECT count(*), total(size) FROM letter WHERE box = ?", (box,)).fetchone()
    if count >= BOX_LETTERS or total + size > BOX_BYTES:
        raise MailboxFull(f"The box {box!r} is full: {count} letters wait in it.")
    db.execute("DELETE FROM letter WHERE box = ? AND key = ?", (box, key))
    written = time.time()
    last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'letter'").fetchone()
    letter_id = next_letter_id(last[0] if last else 0, written)
    row = letter_id, box, key, size, written, text
    db.execute("INSERT INTO letter (id, box, key, size, written, text) VALUES (?, ?, ?, ?, ?, ?)", row)
    return letter_id


def _read_letters(db: sqlite3.Connection, box: str, after: int) -> list[Letter]:
    sizes = db.execute(
        "SELECT id, size FROM letter WHERE box = ? AND id > ? ORDER BY id LIMIT ?", (box, after, READ_LETTERS)
    ).fetchall()
    last = last_of_read(sizes)
    found = "SELECT id, text FROM letter WHERE box = ? AND id > ? AND id <= ? ORDER BY id"
    return [Letter(*row) for row in db.execute(found, (box, after, last))]


def _drop_letters(db: sqlite3.Connection, box: str, up_to: int) -> None:
    db.execute("DELETE FROM letter WHERE box = ? AND id <= ?", (box, up_to))


def _expire_letters(db: sqlite3.Connection, before: float) -> None:
    db.execute("DELETE FROM letter WHERE written < ?", (before,))
