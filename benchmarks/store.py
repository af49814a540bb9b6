"""What an operation of the store costs with few tasks in it and with many: p95 against p95, measured in turns.

Each store, small and large, belongs to a process of its own, which measures and tells how much memory it takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import multiprocessing
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bench
from pymongo import MongoClient
from store_records import SPEC, Mixture

from tesp_api.store import Once, Query, TaskStore
from tesp_api.store.mongo import MongoStore, record_of
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Task, new_task
from tesp_api.tes import TesState, TesView
from tests.mongod import ReplicaSet

LIMIT = 2.0
"""How much more an operation may cost in the large store."""

TURN = 5
"""Calls of one operation in one store before the other store has its turn."""

ALPHA, FIX, RUN = ("project", "alpha"), ("branch", "fix"), ("run", "run-7")
PAGES = {
    "first page": Query(),
    "name: 20 tasks": Query(name_prefix="HOTFIX_", limit=10),
    "name: most tasks": Query(name_prefix="NFCORE_"),
    "name: 1 in 100": Query(name_prefix="MULTIQC"),
    "name: the oldest tenth": Query(name_prefix="PILOT_"),
    "name: no task": Query(name_prefix="NOBODY"),
    "state: most tasks": Query(state=TesState.COMPLETE),
    "state: 3 in 100": Query(state=TesState.EXECUTOR_ERROR, limit=20),
    "tag: 1 in 3": Query(tags=(ALPHA,)),
    "tag: 50 tasks": Query(tags=(RUN,)),
    "tag: key alone": Query(tags=(("project", ""),)),
    "tags: 1 in 3, 50 tasks": Query(tags=(ALPHA, RUN), limit=10),
    "state, tag: many, many": Query(state=TesState.COMPLETE, tags=(ALPHA,)),
    "state, tag: few, many": Query(state=TesState.EXECUTOR_ERROR, tags=(ALPHA,), limit=5),
    "state, tag: many, few": Query(state=TesState.COMPLETE, tags=(FIX,), limit=20),
    "state, tag: many, 50": Query(state=TesState.COMPLETE, tags=(RUN,), limit=40),
    "owner, state": Query(owner="bob", state=TesState.COMPLETE, limit=50),
    "owner, state: no task": Query(owner="nobody", state=TesState.COMPLETE),
}
"""What is listed. Where a small store has fewer tasks than a page, the page is smaller, so that both find as many."""

Operation = Callable[[], Awaitable[Any]]


# The stores


def open_store(place: str) -> TaskStore:
    """The store at a path or a MongoDB address."""
    return MongoStore(place) if place.startswith("mongodb:") else SqliteStore(place)


def fill(place: str, total: int) -> None:
    """Put the mixture into a new store, in the same way as `add` does, only many at a time."""
    if place.startswith("mongodb:"):
        _fill_mongo(place, total)
    else:
        asyncio.run(_fill_sqlite(place, total))


def _chunks(total: int, size: int) -> Iterator[list[Task]]:
    tasks = Mixture(total).tasks()
    while chunk := list(islice(tasks, size)):
        yield chunk


async def _fill_sqlite(place: str, total: int) -> None:
    async with SqliteStore(place) as store:
        for chunk in _chunks(total, 2000):
            await asyncio.gather(*map(store.add, chunk))


def _fill_mongo(place: str, total: int) -> None:
    async def prepare() -> None:
        async with MongoStore(place) as store:
            await store.ping()

    asyncio.run(prepare())
    with MongoClient[Any](place, w=1) as client, ThreadPoolExecutor(2) as pool:
        database = client.get_default_database()

        def insert(chunk: list[Task]) -> None:
            both = [record_of(task) for task in chunk]
            database["task"].insert_many([record for record, _ in both], ordered=False)
            if pieces := [piece for _, part in both for piece in part.pieces]:
                database["text"].insert_many(pieces, ordered=False)

        for chunk in _chunks(total, 2000):
            running = [pool.submit(insert, part) for part in (chunk[:1000], chunk[1000:]) if part]
            for each in running:
                each.result()


@contextlib.contextmanager
def mongod(directory: Path, cache: str = "4G") -> Iterator[ReplicaSet]:
    """A replica set of one, with the memory of a real server."""
    with ReplicaSet(directory) as server:
        with MongoClient[Any](server.uri) as client:
            client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig=f"cache_size={cache}")
        yield server


# The process that measures one store


def serve(place: str, total: int, pipe: Connection) -> None:
    """Answer requests to measure until there are no more."""
    asyncio.run(_serve(place, total, pipe))


async def _serve(place: str, total: int, pipe: Connection) -> None:
    async with open_store(place) as store:
        ids = await _sample(store, total)
        operations = _operations(store, ids, await _token(store))
        pipe.send({name: await _found(store, query) for name, query in PAGES.items()})
        while request := pipe.recv():
            name, calls = request
            pipe.send((await _times(operations[name], calls), memory()))


async def _sample(store: TaskStore, total: int) -> list[str]:
    """Ids of tasks from everywhere, by way of the runs, each of which is 50 tasks."""
    runs = random.sample(range(total // 50), min(20, total // 50))
    pages = [await store.page(Query(tags=(("run", f"run-{run}"),))) for run in runs]
    return [task.id for page in pages for task in page.tasks]


async def _token(store: TaskStore) -> str | None:
    """Where page 100 begins, with five tasks on each."""
    after = None
    for _ in range(99):
        after = (await store.page(Query(limit=5, after=after))).tasks[-1].id
    return after


async def _found(store: TaskStore, query: Query) -> int:
    return len((await store.page(query)).tasks)


def _operations(store: TaskStore, ids: list[str], token: str | None) -> dict[str, Operation]:
    def get(view: TesView) -> Operation:
        return lambda: store.get(random.choice(ids), view)

    def page(query: Query, view: TesView = TesView.MINIMAL) -> Operation:
        return lambda: store.page(query, view)

    operations: dict[str, Operation] = {f"get {view}": get(view) for view in TesView}
    operations |= {f"first page, {view}": page(Query(), view) for view in (TesView.BASIC, TesView.FULL)}
    operations["page 100, 5 on each"] = page(Query(limit=5, after=token))
    operations |= {name: page(query) for name, query in PAGES.items()}
    operations["create"] = partial(_create, store)
    return operations


async def _create(store: TaskStore) -> None:
    """A create as the API does it; no list but those without filters, or by key alone, shows what was created here."""
    unique = secrets.token_hex(8)
    tags = {"project": "new", "branch": "new", "run": unique}
    task = new_task(SPEC.model_copy(update={"name": f"CREATED (S{unique})", "tags": tags}))
    body = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
    await store.add(task, Once(body=body, sender=str(os.getpid()), since=task.created - 60))


async def _times(operation: Operation, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        await operation()
        times.append(time.perf_counter() - start)
    return times


def memory() -> float:
    """MB that this process takes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# The turns


@dataclass
class Side:
    """One of the two stores that are compared, and what was measured of it: milliseconds by operation and round."""

    total: int
    found: dict[str, int]
    pipe: Connection
    p50: dict[str, list[float]]
    p95: dict[str, list[float]]
    memory: list[float]

    def take_turn(self, name: str) -> list[float]:
        """The times of some calls; a first one wakes the process up and does not count."""
        self.pipe.send((name, TURN + 1))
        times, memory = self.pipe.recv()
        self.memory.append(memory)
        return list(times[1:])

    def end_round(self, name: str, times: list[float]) -> None:
        """Note what the turns of a round come to."""
        cuts = statistics.quantiles(times, n=20)
        self.p50.setdefault(name, []).append(cuts[9] * 1e3)
        self.p95.setdefault(name, []).append(cuts[18] * 1e3)


@contextlib.contextmanager
def side(place: str, total: int) -> Iterator[Side]:
    """A process for the store of so many tasks."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(place, total, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Side(total, ours.recv(), ours, {}, {}, [])
        ours.send(None)
    finally:
        ours.close()
        process.join()


def compare(kind: str, places: dict[int, str], names: list[str], given: argparse.Namespace) -> None:
    """Measure one kind of store and print its table."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(side(place, total)) for total, place in places.items()]
        for _ in range(given.rounds):
            for name in names:
                _round(sides, name, given.calls)
    show(kind, *sides)


def _round(sides: list[Side], name: str, calls: int) -> None:
    """Short turns, so that what else the machine does hits both alike."""
    times: list[list[float]] = [[] for _ in sides]
    order = list(zip(sides, times, strict=True))
    for _ in range(-(-calls // TURN)):
        for each, its_times in order:
            its_times += each.take_turn(name)
        order.reverse()
    for each, its_times in order:
        each.end_round(name, its_times)


def show(kind: str, small: Side, large: Side) -> None:
    """The table, and what it comes to."""
    print(f"\n{kind}: {small.total:,} and {large.total:,} tasks, milliseconds")
    print(f"{'operation':26} {'found':>9} {'p50':>17} {'p95':>17} {'ratio':>6}")
    beyond = 0
    for name in small.p95:
        found = f"{small.found[name]}/{large.found[name]}" if name in PAGES else ""
        p50, p95 = ([statistics.median(each[name]) for each in pair] for pair in _pairs(small, large))
        ratio = p95[1] / p95[0]
        beyond += ratio > LIMIT
        verdict = "good" if ratio <= LIMIT else "BEYOND"
        print(f"{name:26} {found:>9} {p50[0]:8.2f} {p50[1]:8.2f} {p95[0]:8.2f} {p95[1]:8.2f} {ratio:6.2f} {verdict}")
    print(f"{len(small.p95) - beyond} of {len(small.p95)} operations within the limit {LIMIT} (p95 large to p95 small)")
    for each in (small, large):
        print(f"memory at {each.total:,}: {each.memory[0]:.0f} MB first, {each.memory[-1]:.0f} MB last")


def _pairs(small: Side, large: Side) -> tuple[tuple[dict[str, list[float]], ...], ...]:
    return (small.p50, large.p50), (small.p95, large.p95)


def arguments() -> argparse.Namespace:
    """What is to be measured."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--small", type=int, default=1000, help="tasks in the small store (500 or more)")
    options.add_argument("--large", type=int, default=1_000_000, help="tasks in the large store")
    options.add_argument("--stores", default="sqlite,mongo", help="which to measure")
    options.add_argument("--rounds", type=int, default=5, help="the median of their p95 counts")
    options.add_argument("--calls", type=int, default=60, help="calls in each round")
    options.add_argument("--only", default="", help="operations whose name has this in it")
    options.add_argument("--keep", type=Path, help="directory for SQLite files that later runs use again")
    options.add_argument("--mongo", default="", help="address of a running server, whose databases are used again")
    return options.parse_args()


def main() -> None:
    """Fill what is missing, measure, print."""
    given = arguments()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tesp-bench-")))
        print(bench.machine())
        for kind in given.stores.split(","):
            places = _places(kind, given, directory, stack)
            for total, place in places.items():
                _fill_once(place, total)
            names = [name for name in _operations(SqliteStore(":memory:"), [], None) if given.only in name]
            compare(kind, places, names, given)


def _places(kind: str, given: argparse.Namespace, directory: Path, stack: contextlib.ExitStack) -> dict[int, str]:
    totals = (given.small, given.large)
    if kind == "sqlite":
        return {total: str((given.keep or directory) / f"{total}.sqlite") for total in totals}
    base = given.mongo or stack.enter_context(mongod(directory / "mongod")).uri
    address, _, parameters = base.partition("?")
    return {total: f"{address.rstrip('/')}/tesp_{total}?{parameters}" for total in totals}


def _fill_once(place: str, total: int) -> None:
    if asyncio.run(_is_filled(place, total)):
        return
    start = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(place, total))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{total:,} tasks could not be stored")
    print(f"{total:,} tasks stored in {time.perf_counter() - start:.0f} s")


async def _is_filled(place: str, total: int) -> bool:
    """The last run is the last thing that is stored."""
    async with open_store(place) as store:
        return await _found(store, Query(tags=(("run", f"run-{(total - 1) // 50}"),))) > 0


if __name__ == "__main__":
    main()
