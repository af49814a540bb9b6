"""From a decision to the store: the way in which whoever learns something of a task writes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tesp_api.lifecycle import Change
from tesp_api.store import TaskStore
from tesp_api.task import ACTIVE, Observation, Task, tail_of
from tesp_api.tes import TesState, TesView

log = logging.getLogger(__name__)


async def record(
    store: TaskStore,
    task: Task,
    decide: Callable[[Task], Change | None],
    *,
    before: float | None = None,
    aside: bool = False,
) -> Task | None:
    """Apply what `decide` makes of the task; when somebody else was faster, read it again and decide anew.

    Returns the task as written, or None when there is nothing to do (any more). With `before`, RightLost once the
    store's time has come to it. `aside`: it takes `decide` so long that it is done in a thread.
    """
    current: Task | None = task
    while current is not None:
        change = await asyncio.to_thread(decide, current) if aside else decide(current)
        if change is None:
            return None
        written = await store.apply(task.id, change, before=before)
        if written is not None:
            _tell(written, change)
            return written
        current = await store.get(task.id, TesView.BASIC)
    return None


async def record_tail(store: TaskStore, task: Task, seen: Observation) -> None:
    """Keep what the task's job shows of its output, if it is that of the current attempt."""
    if task.state not in ACTIVE or task.attempt is None or task.attempt.job_id != seen.job_id:
        return
    if (tail := tail_of(seen.job_id, seen.progress)) is not None:
        await store.put_tail(task.id, tail)


def _tell(task: Task, change: Change) -> None:
    """One line for a task that has just ended, and one for an attempt that has failed and is followed by another."""
    if change.state is None:
        return
    site = task.attempt.site if task.attempt else "no site"
    reason = f": {change.system[0]}" if change.system else ""
    if task.final:
        log.info("Task %s is %s (%s)%s", task.id, task.state, site, reason)
    elif change.state is TesState.QUEUED and not (change.attempt is not None and change.attempt.withdrawn):
        log.info("Task %s is tried again after attempt %d (%s)%s", task.id, len(task.attempts), site, reason)
