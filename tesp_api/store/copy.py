"""Tasks from one store into another."""

from __future__ import annotations

import asyncio

from tesp_api.store import Query, TaskStore
from tesp_api.task import Task
from tesp_api.tes import TesView

AT_ONCE = 50


async def copy(source: TaskStore, target: TaskStore) -> tuple[int, int]:
    """Add every task of `source`, as it is, to `target`; how many were added, and how many were there already.

    Nobody else may use `source` meanwhile. Idempotency keys and letters are not taken along.
    """
    added = there = 0
    after: str | None = None
    more = True
    while more:
        page = await source.page(Query(after=after, limit=AT_ONCE), TesView.FULL)
        for new in await asyncio.gather(*(_copy_one(target, task) for task in page.tasks)):
            added, there = added + new, there + (not new)
        more = page.more
        after = page.tasks[-1].id if page.tasks else None
    return added, there


async def _copy_one(target: TaskStore, task: Task) -> bool:
    if await target.get(task.id) is not None:
        return False
    await target.add(task)
    return True


__all__ = ["copy"]
