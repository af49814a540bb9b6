"""What other processes do to a store in tests: `python -m tests.store_work <file> <function> ...`. Imports little."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from dataclasses import replace

from tesp_api.errors import StoreUnavailable
from tesp_api.lifecycle import Change
from tesp_api.store import Query
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Task, new_task
from tesp_api.tes import TesTask

NOW = 1_750_000_000.0


def task(content: str = "") -> Task:
    """A small task, with a content when one is given."""
    spec = {"executors": [{"image": "busybox", "command": ["true"]}]}
    if content:
        spec["inputs"] = [{"path": "/x", "content": content}]  # type: ignore[list-item]
    return new_task(TesTask.model_validate(spec), now=NOW)


async def just_open(store: SqliteStore) -> None:
    """Add one."""
    await store.add(task())


async def add_for_ever(store: SqliteStore) -> None:
    """Add tasks and print the ids of those that are acknowledged."""
    while True:
        tasks = [task("x" * 1000) for _ in range(5)]
        await asyncio.gather(*(store.add(each) for each in tasks))
        print("\n".join(each.id for each in tasks), flush=True)


async def take_all(store: SqliteStore) -> None:
    """Take and change what is due until nothing is; after the first of it, wait for a word."""
    print("ready", flush=True)
    sys.stdin.readline()
    first = True
    while taken := await store.take_due(queued=True, now=NOW, lease=1000, limit=7):
        for each in taken:
            assert await store.apply(each.id, Change(version=each.version, system=("mine",))) is not None
        print("\n".join(each.id for each in taken), flush=True)
        if first:
            sys.stdin.readline()
        first = False


async def fill_the_disk(store: SqliteStore) -> None:
    """Add until the disk (here: a limit on the size of files) is full, then go on once there is room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = replace(task(), id="before")
    await store.add(before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
    kept, refused = [before.id], []
    for _ in range(10):
        both = (task(), task("x" * (1 << 20)))
        for each, answer in zip(both, await asyncio.gather(*map(store.add, both), return_exceptions=True), strict=True):
            if answer is None:
                kept.append(each.id)
            else:
                assert isinstance(answer, StoreUnavailable), repr(answer)
                refused.append(each.id)
    assert refused
    assert await store.get(before.id) is not None, "reading goes on"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = task()
    await store.add(after)
    assert sorted([*kept, after.id]) == sorted(each.id for each in (await store.page(Query())).tasks)
    print("good")


async def main() -> None:
    """Do what the arguments say."""
    async with SqliteStore(sys.argv[1]) as store:
        await globals()[sys.argv[2]](store)


if __name__ == "__main__":
    asyncio.run(main())
