"""The shared store: MongoDB 5 or newer, for any number of service processes on any number of machines.

Seven collections. `task` has one small record for each task. `text` has what is long (input contents, streams, system
lines, and documents or logs beyond INLINE), in pieces that are far below MongoDB's 16 MB. `right` has what `hold`
gives, `site` what is reported of sites. `tail` has what running tasks have said so far. `box` and `letter` belong to
the mailbox.

MongoDB changes one record at a time, and a plain server has no transactions. So a change that brings texts writes
these first, as a *part* under a name of its own; the one conditional update of the record then adds that name to
`parts`. Texts whose part is not named there belong to a change that lost its race, or never came to its end: nobody
sees them.

Motor is imported here alone, and only what PyMongo's own async client also offers is used of it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import ASCENDING, DESCENDING, IndexModel, ReadPreference, ReturnDocument, WriteConcern
from pymongo.errors import (
    ConfigurationError,
    DuplicateKeyError,
    InvalidName,
    InvalidURI,
    OperationFailure,
    PyMongoError,
)
from pymongo.read_concern import ReadConcern
from pymongo.uri_parser import parse_uri

from tesp_api.errors import MailboxFull, RightLost, SettingsError, StoreUnavailable, StoreUnusable
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
    attempt_from_json,
    attempt_to_json,
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
from tesp_api.task import ACTIVE, FINAL, MANY, Attempt, Bodies, Tail, Task
from tesp_api.tes import TesState, TesView

log = logging.getLogger(__name__)

T = TypeVar("T")
Record = dict[str, Any]
Row = tuple[str, int, int, str]
"""(kind, attempt number, position, text), as in codec."""

DATABASE: Final = "tesp"
"""Used when the URI names no database."""

INLINE: Final = 64 << 10
"""Characters up to which an attempt, and sixteen times that for the client's document, lie in the record itself."""

PIECE: Final = 4 << 20
"""Bytes of text in one piece."""

DEFAULTS: Final[Mapping[str, Any]] = {
    "appname": "tesp-api",
    "serverselectiontimeoutms": 4000,  # a client that creates should hear of an outage before it gives up
    "connecttimeoutms": 4000,
    "timeoutms": 8000,
    "retrywrites": True,
    "maxpoolsize": 50,
}
"""Options that hold unless the URI says otherwise."""

SPREAD: Final = 16
"""A taker that has met another takes at random the first, second, ... or sixteenth of as many due tasks as it wants."""

CROWD: Final = 64
"""How often it does so before it begins at the front again."""

CLOCK_EVERY: Final = 60.0
"""Seconds after which the server's clock is read anew: neither it nor our counting is perfect."""

SCHEMA: Final = 1
"""Version of the records, kept in `right`; a store of a newer release is refused."""

DOCUMENT, ATTEMPT = "document", "attempt"
"""Kinds of text besides those of codec: what is too long for the record."""

INDEXES: Final = (
    IndexModel(
        [("queued", ASCENDING), ("due_at", ASCENDING), ("lane", ASCENDING), ("_id", ASCENDING)],
        name="due",
        partialFilterExpression={"due_at": {"$exists": True}},
    ),
    IndexModel(
        [("active", ASCENDING), ("site", ASCENDING), ("cpus", ASCENDING), ("ram_gb", ASCENDING)],
        name="active",
        partialFilterExpression={"active": True},
    ),
    IndexModel([("state", ASCENDING), ("_id", DESCENDING)], name="state"),
    IndexModel([("name", ASCENDING), ("_id", DESCENDING)], name="name"),
    IndexModel([("owner", ASCENDING), ("_id", DESCENDING)], name="owner"),
    IndexModel([("heads", ASCENDING), ("_id", DESCENDING), ("name", ASCENDING)], name="head"),
    IndexModel([("tags", ASCENDING), ("_id", DESCENDING)], name="tag"),
    IndexModel([("tags.k", ASCENDING), ("_id", DESCENDING)], name="tag_key"),
    IndexModel([("key", ASCENDING)], name="key", unique=True, partialFilterExpression={"key": {"$exists": True}}),
    IndexModel(
        [("unanswered", ASCENDING), ("created", ASCENDING)],
        name="unanswered",
        partialFilterExpression={"unanswered": {"$exists": True}},
    ),
    IndexModel([("ended", ASCENDING)], name="ended", partialFilterExpression={"ended": {"$exists": True}}),
)
"""The indexes of `task`; each query names the one that it uses."""

TEXT_INDEX: Final = IndexModel([("task", ASCENDING), ("_id", ASCENDING)], name="task")

LETTER_INDEX: Final = IndexModel([("written", ASCENDING)], name="written")

_MINIMAL = dict.fromkeys(("state", "version", "due_at", "created", "owner"), 1)
_BASIC = _MINIMAL | dict.fromkeys(("document", "attempts", "parts"), 1)
_REFUSED = frozenset({13, 18, 8000})
"""Codes of a server that does not let us in: no wait will change that."""
_OTHERWISE = frozenset({85, 86})
"""Codes for an index that is there with other keys or options."""


def uptime() -> float:
    """Seconds that nobody sets. They go on while the machine sleeps, where it can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def check_uri(uri: str) -> None:
    """Raises SettingsError, without a word of the URI, which may hold a password, unless it can be used."""
    try:
        parsed = parse_uri(uri, validate=True, warn=False) if "+srv://" not in uri else {"database": None}
    except (InvalidURI, ConfigurationError, InvalidName, ValueError, OSError) as error:
        reason = "it cannot be read" if "@" in uri else " ".join(str(error).split())
        raise SettingsError(f"settings: db.mongodb_uri is no MongoDB address: {reason}") from None
    if uri.partition("?")[0].rpartition("/")[2] and parsed.get("collection"):
        raise SettingsError("settings: db.mongodb_uri must name a database only, not a collection")


class MongoStore:
    """The TaskStore on MongoDB. `uri` as in the MongoDB manual: users, TLS and replica sets are named there.

    `mail` keeps letters in the same database. `uptime`: what the time is counted by from one look at the server's clock
    to the next, so that it matters to nobody when the clock of this machine is set.
    """

    def __init__(
        self, uri: str, *, client: Callable[..., Any] = AsyncIOMotorClient, uptime: Callable[[], float] = uptime
    ) -> None:
        check_uri(uri)
        self.bell = Bell()
        self._uri = uri
        self._make_client = client
        self._client: Any = None
        self._uptime = uptime
        self._began = time.time() - uptime()  # when that was 0, by the server's clock as soon as that is known
        self._read_clock_at = 0.0
        self._replicated = False
        self._crowd = 0
        self._prepared = False
        self._preparing: asyncio.Task[None] | None = None
        self._open: set[asyncio.Task[Any]] = set()
        self.mail = MongoMailbox(self)

    async def __aenter__(self) -> Self:
        options = {name: value for name, value in DEFAULTS.items() if name not in self._uri.lower()}
        self._client = self._make_client(self._uri, **options)
        try:
            await self._prepare()
        except StoreUnusable:
            await self.__aexit__(None, None, None)
            raise
        except StoreUnavailable as error:
            log.warning("%s It is tried again until it answers.", error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            await asyncio.wait(self._open)
        if self._preparing is not None:
            await asyncio.wait([self._preparing])
        client, self._client = self._client, None
        if client is not None and inspect.isawaitable(closing := client.close()):
            await closing

    # The operations

    def clock(self) -> float:
        return self._began + self._uptime()

    async def add(self, task: Task, once: Once | None = None) -> Repeat | None:
        repeat = await self.call(lambda: self._add(task, once))
        if repeat is None:
            self.bell.ring(Ring.QUEUED)
        return repeat

    async def answered(self, sender: str, creates: Mapping[str, str]) -> None:
        ids = list(creates)
        await self.call(
            lambda: self._tasks.update_many({"_id": {"$in": ids}}, {"$unset": {"unanswered": 1, "sender": 1}})
        )

    async def get(self, task_id: str, view: TesView = TesView.MINIMAL, *, owner: str | None = None) -> Task | None:
        return await self.call(lambda: self._get(task_id, view, owner))

    async def page(self, query: Query, view: TesView = TesView.MINIMAL) -> Page:
        return await self.call(lambda: self._page(query, view))

    async def apply(self, task_id: str, change: Change, *, before: float | None = None) -> Task | None:
        task = await self.call(lambda: self._apply(task_id, change, before))
        if task is not None and (change.state is not None or change.due_at is not KEEP):
            self.bell.ring(ring_for(task))
        return task

    async def put_tail(self, task_id: str, tail: Tail) -> None:
        async def put() -> None:
            done = await self._tails.replace_one({"_id": task_id}, {"text": tail_to_json(tail)}, upsert=True)
            # One that was there is still to be deleted by whoever ends the task; a new one may have come after that.
            if done.upserted_id is None:
                return
            if await self._local.find_one({"_id": task_id, "active": True}, {"_id": 1}) is None:
                await self._tails.delete_one({"_id": task_id})

        await self.call(put)

    async def take_due(
        self, *, queued: bool, now: float, lease: float, limit: int, skip: Collection[str] = ()
    ) -> list[Task]:
        return await self.call(lambda: self._take_due(queued, now, lease, limit, skip)) if limit else []

    async def next_due(self, *, queued: bool, skip: Collection[str] = ()) -> float | None:
        async def find() -> float | None:
            condition = {"queued": queued, "due_at": {"$exists": True}, **_outside(skip)}
            record = await self._tasks.find_one(
                condition, {"due_at": 1, "_id": 0}, sort=[("due_at", ASCENDING)], hint="due"
            )
            return record["due_at"] if record else None

        return await self.call(find)

    async def bring_forward(self, later_than: float, now: float, limit: int) -> int:
        return await self.call(lambda: self._bring_forward(later_than, now, limit)) if limit else 0

    async def loads(self) -> Mapping[str, Load]:
        return await self.call(self._loads)

    async def report(self, site: str, at: float, text: str) -> None:
        await self.call(lambda: self._sites.update_one({"_id": site}, {"$set": {"at": at, "text": text}}, upsert=True))

    async def reports(self) -> Mapping[str, tuple[float, str]]:
        async def find() -> Mapping[str, tuple[float, str]]:
            records = await self._sites.find({"_id": {"$gt": ""}}).hint("_id_").to_list(None)
            return {record["_id"]: (record["at"], record["text"]) for record in records}

        return await self.call(find)

    async def hold(self, right: str, holder: str, seconds: float) -> float | None:
        return await self.call(lambda: self._hold(right, holder, seconds))

    async def purge(self, ended_before: float, limit: int) -> int:
        return await self.call(lambda: self._purge(ended_before, limit)) if limit else 0

    async def contents(self, task_id: str) -> Mapping[int, str]:
        async def find() -> Mapping[int, str]:
            record = await self._record(task_id, {"parts": 1})
            return (await self._bodies([record]))[task_id].contents if record else {}

        return await self.call(find)

    async def ping(self) -> None:
        async def ask() -> None:
            await self._read_clock()
            await self._tasks.find_one({"_id": ""}, {"_id": 1})

        await self.call(ask)

    # How each of them is carried out

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run it to its end, even if the caller leaves: half a write helps nobody. All errors become ours."""
        if self._client is None:
            raise StoreUnavailable("The store is not open.")
        work = asyncio.ensure_future(self._run(function))
        self._open.add(work)
        work.add_done_callback(self._open.discard)
        return await asyncio.shield(work)

    async def _run(self, function: Callable[[], Awaitable[T]]) -> T:
        try:
            if not self._prepared:
                await self._prepare()
            if self._uptime() - self._read_clock_at > CLOCK_EVERY:
                await self._read_clock()
            return await function()
        except PyMongoError as error:
            raise _unavailable(error) from error

    async def _prepare(self) -> None:
        """Make the indexes and read the clock, once; StoreUnavailable as long as that cannot be done.

        All who wait share one try: one after the other they would wait for ever.
        """
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._try_to_prepare())
        await asyncio.shield(self._preparing)

    async def _try_to_prepare(self) -> None:
        try:
            await self._read_clock()
            await self._check_schema()
            await self._make_indexes()
        except PyMongoError as error:
            raise _unavailable(error) from error
        self._prepared = True

    async def _check_schema(self) -> None:
        found = await self._rights.find_one_and_update(
            {"_id": "schema"}, {"$setOnInsert": {"version": SCHEMA}}, upsert=True, return_document=ReturnDocument.AFTER
        )
        if found["version"] > SCHEMA:
            raise StoreUnusable(
                f"The store was written by a newer release (schema {found['version']}, this one knows {SCHEMA})."
            )

    async def _make_indexes(self) -> None:
        """On a large old collection this may take longer than any other call is allowed to."""
        patient = self._make_client(self._uri, **{**DEFAULTS, "timeoutms": 0})
        try:
            database = self._database_of(patient)
            for name, index in [*(("task", each) for each in INDEXES), ("text", TEXT_INDEX), ("letter", LETTER_INDEX)]:
                await _make_index(database[name], index)
        finally:
            if inspect.isawaitable(closing := patient.close()):
                await closing

    async def _read_clock(self) -> None:
        """Set our time by the server's. All processes must agree on what is due."""
        asked_at = self._read_clock_at = self._uptime()  # at once: all other calls need not wait for this one
        answer = await self._client.admin.command("hello")
        answered_at = self._uptime()
        self._replicated = "setName" in answer
        self._began = answer["localTime"].replace(tzinfo=UTC).timestamp() - (asked_at + answered_at) / 2

    def _database_of(self, client: Any) -> Any:
        # Journaled by most of the nodes before it counts; and nothing is read that a failover could take back.
        return client.get_default_database(DATABASE).with_options(
            write_concern=WriteConcern("majority", j=True),
            read_concern=ReadConcern("majority"),
            read_preference=ReadPreference.PRIMARY,
        )

    def collection(self, name: str) -> Any:
        """A collection of the open store."""
        return self._database_of(self._client)[name]

    @property
    def _tasks(self) -> Any:
        return self.collection("task")

    @property
    def _texts(self) -> Any:
        return self.collection("text")

    @property
    def _tails(self) -> Any:
        """No harm is done when one is lost."""
        return self.collection("tail").with_options(write_concern=WriteConcern(1), read_concern=ReadConcern("local"))

    @property
    def _sites(self) -> Any:
        """A report that is lost is made again soon."""
        return self.collection("site").with_options(read_concern=ReadConcern("local"), write_concern=WriteConcern(1))

    @property
    def _rights(self) -> Any:
        return self.collection("right").with_options(read_concern=ReadConcern("local"))

    # Create

    async def _add(self, task: Task, once: Once | None) -> Repeat | None:
        if once is not None and (repeat := await self._repeat(once)) is not None:
            return repeat
        record, part = record_of(task, once)
        await self._write_texts(part)
        try:
            await self._tasks.insert_one(record)
        except DuplicateKeyError:
            await self._drop_texts(part)
            if once is not None and once.key and (repeat := await self._repeat(once)) is not None:
                return repeat
            raise
        return None

    async def _repeat(self, once: Once) -> Repeat | None:
        repeat = await self._find_repeat(once)
        return repeat if repeat is not None and await self._stays(repeat.task_id) else None

    async def _stays(self, task_id: str) -> bool:
        """Whether a task that the primary knows is there for good: only then may anyone be told that it is kept.

        A write that changes nothing waits, like any other, until most of the nodes have all that the primary had.
        """
        if await self._tasks.find_one({"_id": task_id}, {"_id": 1}) is not None:
            return True
        return bool((await self._tasks.update_one({"_id": task_id}, {"$set": {"_id": task_id}})).matched_count)

    async def _find_repeat(self, once: Once) -> Repeat | None:
        wanted = {"created": 1, "body": 1, "sender": 1}
        if once.key:
            found = await self._local.find_one({"key": once.key}, wanted, hint="key")
            return Repeat(found["_id"], found["created"], found["body"], by_key=True) if found else None
        between = {"$gt": once.since, "$lte": once.until}
        condition = {"unanswered": once.body, "created": between, "sender": {"$ne": once.sender}}
        found = await self._local.find_one(condition, wanted, hint="unanswered")
        if found is None:
            return None
        return Repeat(found["_id"], found["created"], once.body, by_key=False, sender=found["sender"])

    @property
    def _local(self) -> Any:
        """Tasks as the primary knows them now: what may still be undone counts as well."""
        return self._tasks.with_options(read_concern=ReadConcern("local"))

    # Read

    async def _get(self, task_id: str, view: TesView, owner: str | None) -> Task | None:
        record = await self._record(task_id, _MINIMAL if view is TesView.MINIMAL else _BASIC)
        if record is None or (owner is not None and record["owner"] != owner):
            return None
        return (await self._load([record], view))[0]

    async def _record(self, task_id: str, fields: Record) -> Record | None:
        """One record. A primary that was paused does not know yet that there is another one, nor what came meanwhile:
        it has to ask the others before it may say no."""
        record: Record | None = await self._tasks.find_one({"_id": task_id}, fields)
        if record is None and self._replicated:
            sure = self._tasks.with_options(read_concern=ReadConcern("linearizable"))
            record = await sure.find_one({"_id": task_id}, fields)
        return record

    async def _page(self, query: Query, view: TesView) -> Page:
        condition, hint = await self._condition(query)
        cursor = self._tasks.find(condition, _MINIMAL if view is TesView.MINIMAL else _BASIC)
        records = await cursor.sort("_id", DESCENDING).limit(query.limit + 1).hint(hint).to_list(query.limit + 1)
        tasks = await self._load(records[: query.limit], view)
        return Page(tuple(tasks), more=len(records) > query.limit)

    async def _condition(self, query: Query) -> tuple[Record, str]:
        """What to look for, and in the order of which index: that of the rarest condition.

        What is not rare is judged by its newest tasks. The other conditions are looked up in the records.
        """
        conditions = _conditions(query)
        hint = conditions[0][1] if conditions else "_id_"
        if len(conditions) > 1 or hint == "name":
            counts = await asyncio.gather(*(self._count(*each) for each in conditions))
            hint = conditions[counts.index(min(counts))][1]  # if it has to be sorted, that is soon done
            if min(counts) == FEW:
                conditions = [_in_order(*each) for each in conditions]
                marks = await asyncio.gather(*(self._mark(*each) for each in conditions[1:] and conditions))
                hint = conditions[marks.index(min(marks)) if marks else 0][1]
        every = [condition for condition, _ in conditions]
        if query.after is not None:
            every.append({"_id": {"$lt": query.after}})
        return ({"$and": every} if every else {}), hint

    async def _count(self, condition: Record, hint: str) -> int:
        """How many tasks fulfil it, at most FEW. (This command alone counts in the index, without the records.)"""
        answer = await self._database_of(self._client).command(
            "count", "task", query=condition, hint=hint, limit=FEW, readConcern={"level": "local"}
        )
        count: int = answer["n"]
        return count

    async def _mark(self, condition: Record, hint: str) -> str:
        """The id of the SAMPLEth newest task that fulfils it: the rarer they are, the older is that one."""
        cursor = self._local.find(condition, {"_id": 1}).sort("_id", DESCENDING).skip(SAMPLE - 1).limit(1).hint(hint)
        records = await cursor.to_list(1)
        return records[0]["_id"] if records else ""

    async def _load(self, records: Sequence[Record], view: TesView) -> list[Task]:
        if view is TesView.MINIMAL:
            return [_task(record, {}) for record in records]
        long = await self._long(records)
        tasks = await asyncio.to_thread(_tasks, records, long) if long else _tasks(records, long)
        if view is TesView.FULL:
            bodies = await self._bodies(records)
            tails = await self._said([task.id for task in tasks if task.state in ACTIVE])
            tasks = [replace(task, bodies=replace(bodies[task.id], tail=tails.get(task.id))) for task in tasks]
        return tasks

    async def _long(self, records: Sequence[Record]) -> Mapping[tuple[str, str, int], str]:
        """Documents and attempts that did not fit into their records: (part, kind, number) -> text."""
        parts = [
            part
            for record in records
            for each in (record["document"], *record["attempts"])
            if isinstance(each, dict)
            for part in (each["part"],)
        ]
        if not parts:
            return {}
        found: dict[tuple[str, str, int], bytes] = {}
        ids = [record["_id"] for record in records]
        async for piece in self._pieces({"task": {"$in": ids}, "part": {"$in": parts}, "long": True}):
            for kind, number, _, data in piece["items"]:
                place = (piece["part"], kind, number)
                found[place] = found.get(place, b"") + data
        return {place: data.decode() for place, data in found.items()}

    async def _bodies(self, records: Sequence[Record]) -> dict[str, Bodies]:
        parts = {record["_id"]: frozenset(record["parts"]) for record in records}
        rows: dict[str, dict[tuple[str, str, int, int], bytes]] = {task_id: {} for task_id in parts}
        wanted = [task_id for task_id, named in parts.items() if named]
        if wanted:
            async for piece in self._pieces({"task": {"$in": wanted}, "long": False}):
                if piece["part"] in parts[piece["task"]]:
                    mine = rows[piece["task"]]
                    for kind, number, position, data in piece["items"]:
                        place = (piece["part"], kind, number, position)
                        mine[place] = mine.get(place, b"") + data
        return {
            task_id: bodies_from_rows((kind, number, at, data.decode()) for (_, kind, number, at), data in each.items())
            for task_id, each in rows.items()
        }

    async def _said(self, task_ids: list[str]) -> dict[str, Tail]:
        if not task_ids:
            return {}
        return {
            each["_id"]: tail_from_json(each["text"]) async for each in self._tails.find({"_id": {"$in": task_ids}})
        }

    def _pieces(self, condition: Record) -> Any:
        return self._texts.find(condition).sort([("task", ASCENDING), ("_id", ASCENDING)]).hint("task")

    # Change

    async def _apply(self, task_id: str, change: Change, before: float | None) -> Task | None:
        part = _Part(task_id, change.version + 1)
        new: Record = _marks(change.state) if change.state is not None else {}
        gone: Record = {}
        if change.state in FINAL:
            new["ended"] = self.clock()
        if change.state is not None and change.state not in ACTIVE:
            gone["active"] = 1
        if change.due_at is None:
            gone["due_at"] = 1
        elif change.due_at is not KEEP:
            new["due_at"] = change.due_at
        condition: Record = {"_id": task_id, "version": change.version}
        if change.attempt is not None:
            at = change.attempt.number - 1
            many = len(change.attempt.log.outputs) > MANY
            text = await asyncio.to_thread(_attempt, change.attempt, part) if many else _attempt(change.attempt, part)
            new |= {f"attempts.{at}": text, "site": change.attempt.site}
            if at > 0:
                condition[f"attempts.{at - 1}"] = {"$exists": True}
        if before is not None:
            until = {"$literal": datetime.fromtimestamp(before, UTC)}
            condition["$expr"] = {"$and": [{"$lt": ["$$NOW", until]}, {"$not": _outlasts(until)}]}
        part.put(stream_rows(change.streams))
        part.put(_line_rows(change.system_of, change.system))
        update = {
            "$inc": {"version": 1},
            "$set": new,
            "$unset": gone,
            "$push": {"parts": part.name} if part.pieces else {},
        }
        await self._write_texts(part)
        record = await self._tasks.find_one_and_update(
            condition,
            {name: value for name, value in update.items() if value},
            _BASIC,
            return_document=ReturnDocument.AFTER,
        )
        if record is None:
            await self._drop_texts(part)
            await self._explain(task_id, change, before)
            return None
        if change.state is not None and change.state not in ACTIVE:
            with suppress(PyMongoError):  # nobody sees it
                await self._tails.delete_one({"_id": task_id})
        return (await self._load([record], TesView.BASIC))[0]

    async def _explain(self, task_id: str, change: Change, before: float | None) -> None:
        """Nothing was changed. That is no lost race if the version is still the one that was read."""
        found = await self._local.find_one({"_id": task_id, "version": change.version}, {"attempts": 1})
        if found is None:
            return
        if change.attempt is not None and change.attempt.number - 1 > len(found["attempts"]):
            raise ValueError(f"attempt {change.attempt.number} after {len(found['attempts'])}")
        if before is not None:
            raise RightLost("The right ran out before the change was written.")

    # The queue

    async def _take_due(self, queued: bool, now: float, lease: float, limit: int, skip: Collection[str]) -> list[Task]:
        """The longest due ones; where others take at the same time, any of the longest due ones that are left."""
        due = {"queued": queued, "due_at": {"$lte": now}, **(_outside(skip) if queued else {})}
        taken: list[tuple[float, Record]] = []
        places = SPREAD if self._crowd else 1
        self._crowd = max(0, self._crowd - 1)
        while len(taken) < limit:
            place = secrets.randbelow(places) * limit
            cursor = self._local.find(due, {"due_at": 1}).sort("due_at", ASCENDING).skip(place).hint("due")
            records = await cursor.limit(limit - len(taken)).to_list(limit)
            found = {record["_id"]: record["due_at"] for record in records}
            if found:
                won = await self._take(list(found), due, now + lease)
                taken += [(found[record["_id"]], record) for record in won]
                if len(won) < len(found):  # others are at the same ones: keep out of their way from now on
                    places, self._crowd = SPREAD, CROWD
            elif place == 0:
                break
            else:  # there are not so many
                places = 1
        taken.sort(key=lambda each: each[0])
        return await self._load([record for _, record in taken], TesView.BASIC)

    async def _take(self, ids: list[str], due: Record, until: float) -> list[Record]:
        """Those of `ids` that we got: a record is taken only if it is still due when its turn comes."""
        mark = secrets.token_hex(8)
        mine: Record = {"_id": {"$in": ids}}
        await self._tasks.update_many(
            {**mine, **due}, {"$set": {"due_at": until, "taker": mark}, "$inc": {"version": 1}}, hint="_id_"
        )
        records: list[Record] = await self._local.find({**mine, "taker": mark}, _BASIC).hint("_id_").to_list(len(ids))
        return records

    async def _bring_forward(self, later_than: float, now: float, limit: int) -> int:
        late: list[str] = []
        for queued in (True, False):
            condition = {"queued": queued, "due_at": {"$gt": later_than}}
            cursor = self._local.find(condition, {"_id": 1}).sort("due_at", ASCENDING).limit(limit).hint("due")
            late += [record["_id"] for record in await cursor.to_list(limit)]
        if late:
            still = {"_id": {"$in": late}, "due_at": {"$gt": later_than}}
            await self._tasks.update_many(still, {"$set": {"due_at": now}}, hint="_id_")
        return len(late)

    async def _loads(self) -> dict[str, Load]:
        total = {"jobs": {"$sum": 1}, "cpus": {"$sum": "$cpus"}, "ram_gb": {"$sum": "$ram_gb"}}
        answer = await self._database_of(self._client).command(
            "aggregate",
            "task",
            pipeline=[{"$match": {"active": True}}, {"$group": {"_id": "$site", **total}}],
            cursor={"batchSize": 100_000},
            hint="active",
            readConcern={"level": "local"},
        )
        rows = answer["cursor"]["firstBatch"]
        return {row["_id"]: Load(row["jobs"], row["cpus"], row["ram_gb"]) for row in rows if row["_id"] is not None}

    async def _hold(self, right: str, holder: str, seconds: float) -> float | None:
        """By the server's clock, so that no other counts. Its expiry is what `before` is compared with."""
        until = {"$add": ["$$NOW", math.floor(seconds * 1000)]}
        update = [{"$set": {"holder": {"$literal": holder}, "until": until}}]
        over = {"$or": [{"$lte": ["$until", "$$NOW"]}, _outlasts("$until")]}
        free = {"$or": [{"holder": holder}, {"$expr": over}]}
        after = ReturnDocument.AFTER
        found = await self._rights.find_one_and_update({"_id": right, **free}, update, return_document=after)
        if found is None:  # another has it, or nobody ever had
            mine = {"_id": right, "holder": holder}
            try:
                found = await self._rights.find_one_and_update(mine, update, upsert=True, return_document=after)
            except DuplicateKeyError:
                return None
        held: datetime = found["until"]
        return held.replace(tzinfo=UTC).timestamp()

    async def _purge(self, ended_before: float, limit: int) -> int:
        condition = {"ended": {"$lt": ended_before}, "due_at": {"$exists": False}}
        cursor = self._tasks.find(condition, {"_id": 1}).sort("ended", ASCENDING).limit(limit).hint("ended")
        ids = [record["_id"] for record in await cursor.to_list(limit)]
        if ids:
            # The record last: if this is cut off, the next round finds the task again.
            await self._texts.delete_many({"task": {"$in": ids}})
            await self._tails.delete_many({"_id": {"$in": ids}})
            await self._tasks.delete_many({"_id": {"$in": ids}})
        stale = {"unanswered": {"$exists": True}, "created": {"$lt": self.clock() - STALE}}
        await self._tasks.update_many(stale, {"$unset": {"unanswered": 1, "sender": 1}}, hint="unanswered")
        return len(ids)

    # Texts

    async def _write_texts(self, part: _Part) -> None:
        if part.pieces:
            await self._texts.insert_many(part.pieces)

    async def _drop_texts(self, part: _Part) -> None:
        if part.pieces:
            with suppress(PyMongoError):  # nobody sees them
                await self._texts.delete_many({"_id": {"$in": [piece["_id"] for piece in part.pieces]}})


class MongoMailbox:
    """The Mailbox of a MongoStore, open while that is.

    The record of a box lists its letters: one change of that record puts a letter, so all see the same order, and the
    limits hold. The texts are written before that, in pieces in `letter`, and are deleted after the box names them no
    more; those that a crash left over go when they expire.
    """

    def __init__(self, store: MongoStore) -> None:
        self.doorbell = Doorbell()
        self._store = store
        self._made: set[str] = set()

    async def put(self, box: str, text: str, key: str, *, instead: bool = False) -> int:
        data = text.encode()
        if len(data) > LETTER_BYTES:
            raise ValueError(f"a letter of {len(data)} bytes is too long")
        letter_id = await self._store.call(lambda: self._put(box, data, key, instead))
        self.doorbell.ring(box)
        return letter_id

    async def read(self, box: str, after: int = 0) -> Sequence[Letter]:
        return await self._store.call(lambda: self._read(box, after))

    async def drop(self, box: str, up_to: int) -> None:
        async def drop() -> None:
            gone = {"$pull": {"letters": {"id": {"$lte": up_to}}}}
            before = await self._boxes.find_one_and_update({"_id": box}, gone, _those({"$lte": ["$$this.id", up_to]}))
            await self._delete(before["letters"] if before else [])

        await self._store.call(drop)

    async def expire(self, before: float) -> None:
        async def expire() -> None:
            await self._boxes.update_many({}, {"$pull": {"letters": {"written": {"$lt": before}}}})
            await self._texts.delete_many({"written": {"$lt": before}})

        await self._store.call(expire)

    @property
    def _boxes(self) -> Any:
        return self._store.collection("box")

    @property
    def _texts(self) -> Any:
        return self._store.collection("letter")

    async def _put(self, box: str, data: bytes, key: str, instead: bool) -> int:
        await self._make(box)
        if not instead and (there := await self._find(box, key)):
            return there
        letter: Record = {"name": secrets.token_hex(8), "key": key, "size": len(data), "written": self._store.clock()}
        await self._write(letter, data)
        same = _those({"$eq": ["$$this.key", {"$literal": key}]})
        before = await self._boxes.find_one_and_update(*_one_more(box, letter, instead), same)
        if before is None:
            await self._delete([letter])
            if not instead and (there := await self._find(box, key)):
                return there
            raise MailboxFull(f"The box {box!r} is full.")
        await self._delete(before["letters"])
        return next_letter_id(before["last"], letter["written"])

    async def _make(self, box: str) -> None:
        if box not in self._made:
            new = {"$setOnInsert": {"last": 0, "letters": []}}
            with suppress(DuplicateKeyError):  # another process was quicker
                await self._boxes.update_one({"_id": box}, new, upsert=True)
            self._made.add(box)

    async def _find(self, box: str, key: str) -> int:
        """The id of the letter with this key, or 0."""
        found = await self._boxes.find_one({"_id": box, "letters.key": key}, {"letters.$": 1})
        number: int = found["letters"][0]["id"] if found else 0
        return number

    async def _read(self, box: str, after: int) -> list[Letter]:
        later = _those({"$gt": ["$$this.id", after]})["letters"]
        found = await self._boxes.find_one({"_id": box}, {"letters": {"$slice": [later, READ_LETTERS]}})
        letters = found["letters"] if found else []
        last = last_of_read((each["id"], each["size"]) for each in letters)
        letters = [each for each in letters if each["id"] <= last]
        names = [name for each in letters for name in _pieces_of(each)]
        texts = {piece["_id"]: piece["data"] async for piece in self._texts.find({"_id": {"$in": names}})}
        return [
            Letter(each["id"], b"".join(texts[name] for name in _pieces_of(each)).decode())
            for each in letters
            if all(name in texts for name in _pieces_of(each))  # else it was dropped meanwhile
        ]

    async def _write(self, letter: Record, data: bytes) -> None:
        pieces = [
            {"_id": name, "written": letter["written"], "data": data[at * PIECE : (at + 1) * PIECE]}
            for at, name in enumerate(_pieces_of(letter))
        ]
        await self._texts.insert_many(pieces)

    async def _delete(self, letters: Sequence[Record]) -> None:
        if names := [name for each in letters for name in _pieces_of(each)]:
            with suppress(PyMongoError):  # nobody sees them
                await self._texts.delete_many({"_id": {"$in": names}})


def _pieces_of(letter: Record) -> list[str]:
    return [f"{letter['name']}/{at:03}" for at in range(max(1, math.ceil(letter["size"] / PIECE)))]


def _those(condition: Record) -> Record:
    """What to load of a box: its last id, and the letters that fulfil the condition."""
    return {"last": 1, "letters": {"$filter": {"input": "$letters", "cond": condition}}}


def _one_more(box: str, letter: Record, instead: bool) -> tuple[Record, list[Record]]:
    """When a letter may be put, and the change that does it."""
    room = [
        {"$lt": [{"$size": "$letters"}, BOX_LETTERS]},
        {"$lte": [{"$sum": "$letters.size"}, BOX_BYTES - letter["size"]]},
    ]
    condition: Record = {"_id": box, "$expr": {"$and": room}}
    kept: Any = "$letters"
    if instead:
        kept = _those({"$ne": ["$$this.key", {"$literal": letter["key"]}]})["letters"]
    else:
        condition["letters.key"] = {"$ne": letter["key"]}
    entry = {"id": "$last", **{name: {"$literal": value} for name, value in letter.items()}}
    number = {"$max": [{"$add": ["$last", 1]}, next_letter_id(0, letter["written"])]}
    change = [{"$set": {"last": number}}, {"$set": {"letters": {"$concatArrays": [kept, [entry]]}}}]
    return condition, change


class _Part:
    """The texts of one change, cut into pieces. Pieces sort in the order of changes, and within one as they came."""

    def __init__(self, task_id: str, version: int) -> None:
        self.name = secrets.token_hex(6)
        self.pieces: list[Record] = []
        self._task_id = task_id
        self._version = version
        self._room = 0

    def put(self, rows: Iterable[Row], *, long: bool = False) -> None:
        """Add texts; ValueError for text that UTF-8 cannot hold, and nothing is written then."""
        for kind, number, position, text in rows:
            data = text.encode()
            for start in range(0, max(len(data), 1), PIECE):
                self._add([kind, number, position, data[start : start + PIECE]], long)

    def or_inline(self, text: str, kind: str, number: int, limit: int) -> str | Record:
        """The text itself if it is short, else where it is."""
        if len(text) <= limit:
            text.encode()
            return text
        self.put([(kind, number, 0, text)], long=True)
        return {"part": self.name}

    def _add(self, item: list[Any], long: bool) -> None:
        size = len(item[3]) + 64
        if size > self._room or self.pieces[-1]["long"] != long:
            place = f"{self._task_id}/{self._version:010}/{self.name}/{len(self.pieces):06}"
            self.pieces.append({"_id": place, "task": self._task_id, "part": self.name, "long": long, "items": []})
            self._room = PIECE + 64
        self.pieces[-1]["items"].append(item)
        self._room -= size


def record_of(task: Task, once: Once | None = None) -> tuple[Record, _Part]:
    """What `add` keeps of a new task: its record, and its texts."""
    name = task.spec.name or ""
    cpus, ram_gb = asked(task)
    part = _Part(task.id, task.version)
    record: Record = {
        "_id": task.id,
        "version": task.version,
        "created": task.created,
        "owner": task.owner,
        "name": name,
        "cpus": cpus,
        "ram_gb": ram_gb,
        "lane": lane(task.spec),
        "heads": list(dict.fromkeys(name[:length] for length in HEADS)),
        "tags": [{"k": key, "v": value} for key, value in (task.spec.tags or {}).items()],
        "document": part.or_inline(task.document, DOCUMENT, 0, 16 * INLINE),
        "attempts": [_attempt(each, part) for each in task.attempts],
        **_marks(task.state),
    }
    if task.attempt is not None:
        record["site"] = task.attempt.site
    if task.due_at is not None:
        record["due_at"] = task.due_at
    if task.final:
        record["ended"] = ended_at(task)
    if once is not None:
        record |= {"key": once.key, "body": once.body} if once.key else {"unanswered": once.body, "sender": once.sender}
    if task.bodies is not None:
        part.put(content_rows(task.bodies))
        part.put(stream_rows(task.bodies.streams))
        for number, lines in task.bodies.system.items():
            part.put(_line_rows(number, lines))
    record["parts"] = [part.name] if part.pieces else []
    return record, part


def _conditions(query: Query) -> list[tuple[Record, str]]:
    """The conditions of a query, each with the index that lists what fulfils it; all but names in the order of ids."""
    found: list[tuple[Record, str]] = []
    for key, value in query.tags:
        found.append(({"tags": {"k": key, "v": value}}, "tag") if value else ({"tags.k": key}, "tag_key"))
    if query.owner is not None:
        found.append(({"owner": query.owner}, "owner"))
    if query.state is not None:
        states = [query.state.value, *([query.or_state.value] if query.or_state else [])]
        found.append(({"state": {"$in": states} if query.or_state else states[0]}, "state"))
    if query.name_prefix:
        end = beyond(query.name_prefix)
        found.append(({"name": {"$gte": query.name_prefix, **({"$lt": end} if end else {})}}, "name"))
    return found


def _in_order(condition: Record, hint: str) -> tuple[Record, str]:
    """The same with an index that has ids in their order: a prefix is looked for among the names with its head."""
    if hint != "name":
        return condition, hint
    prefix = condition["name"]["$gte"]
    length = max(each for each in HEADS if each <= len(prefix))
    return {"heads": prefix[:length], **condition}, "head"


def _outside(lanes: Collection[str]) -> Record:
    return {"lane": {"$nin": list(lanes)}} if lanes else {}


def _outlasts(until: Any) -> Record:
    """Whether a right is of a time before the server's clock was set back."""
    return {"$gt": [until, {"$add": ["$$NOW", math.floor(LONGEST_RIGHT * 1000)]}]}


def _attempt(attempt: Attempt, part: _Part) -> str | Record:
    return part.or_inline(attempt_to_json(attempt), ATTEMPT, attempt.number, INLINE)


def _line_rows(number: int, lines: Sequence[str]) -> list[Row]:
    return [(SYSTEM, number, at, line) for at, line in enumerate(lines)]


def _marks(state: TesState) -> Record:
    """The state, and what indexes need to know of it."""
    marks: Record = {"state": state.value, "queued": state is TesState.QUEUED}
    return {**marks, "active": True} if state in ACTIVE else marks


def _tasks(records: Sequence[Record], long: Mapping[tuple[str, str, int], str]) -> list[Task]:
    return [_task(record, long) for record in records]


def _task(record: Record, long: Mapping[tuple[str, str, int], str]) -> Task:
    document = record.get("document", "")
    if isinstance(document, dict):
        document = long[document["part"], DOCUMENT, 0]
    attempts = [
        each if isinstance(each, str) else long[each["part"], ATTEMPT, number]
        for number, each in enumerate(record.get("attempts", ()), 1)
    ]
    return Task(
        id=record["_id"],
        state=TesState(record["state"]),
        version=record["version"],
        due_at=record.get("due_at"),
        created=record["created"],
        owner=record["owner"],
        attempts=tuple(map(attempt_from_json, attempts)),
        document=document,
    )


async def _make_index(collection: Any, index: IndexModel) -> None:
    """Make it if it is not there; one that an older release made otherwise under that name gives way."""
    try:
        await collection.create_indexes([index])
    except OperationFailure as error:
        if error.code not in _OTHERWISE:
            raise
        await collection.drop_index(index.document["name"])
        await collection.create_indexes([index])


def _unavailable(error: PyMongoError) -> StoreUnavailable:
    """What went wrong, in the driver's words but without its lists of servers."""
    words = " ".join(str(error).partition(", full error")[0].partition(", Timeout:")[0].split())
    refused = isinstance(error, OperationFailure) and error.code in _REFUSED
    return (StoreUnusable if refused else StoreUnavailable)(
        f"MongoDB could not be used: {words[:300]}.".replace("..", ".")
    )


__all__ = ["INDEXES", "MongoStore", "check_uri"]
