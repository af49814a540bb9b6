"""What an operator should read in the log of how tasks end; of sites, see health."""

from __future__ import annotations

import logging

from tesp_api.lifecycle import Change
from tesp_api.task import Task
from tesp_api.tes import TesState

log = logging.getLogger("tesp_api.dispatch")


def told(task: Task, change: Change) -> None:
    """One line for a task that has just ended, and one for an attempt that has failed and is followed by another."""
    if change.state is None:
        return
    site = task.attempt.site if task.attempt else "no site"
    reason = f": {change.system[0]}" if change.system else ""
    if task.final:
        log.info("Task %s is %s (%s)%s", task.id, task.state, site, reason)
    elif change.state is TesState.QUEUED and not (change.attempt is not None and change.attempt.withdrawn):
        log.info("Task %s is tried again after attempt %d (%s)%s", task.id, len(task.attempts), site, reason)
