"""From a decision to the store: the only way in which dispatch writes."""

from __future__ import annotations

from collections.abc import Callable

from tesp_api.dispatch.news import told
from tesp_api.lifecycle import Change
from tesp_api.store import TaskStore
from tesp_api.task import Task
from tesp_api.tes import TesView


async def record(
    store: TaskStore, task: Task, decide: Callable[[Task], Change | None], *, before: float | None = None
) -> Task | None:
    """Apply what `decide` makes of the task; when somebody else was faster, read it again and decide anew.

    Returns the task as written, or None when there is nothing to do (any more). With `before`, RightLost once the
    store's time has come to it.
    """
    current: Task | None = task
    while current is not None:
        change = decide(current)
        if change is None:
            return None
        written = await store.apply(task.id, change, before=before)
        if written is not None:
            told(written, change)
            return written
        current = await store.get(task.id, TesView.BASIC)
    return None
