"""What an operator should read in the log: sites that stop answering and come back, and how tasks end."""

from __future__ import annotations

import logging

from tesp_api.lifecycle import Change
from tesp_api.task import Task
from tesp_api.tes import TesState

log = logging.getLogger("tesp_api.dispatch")


class SiteNews:
    """Tells once that a site does not answer, and once that it does again."""

    def __init__(self) -> None:
        self._silent: set[str] = set()

    def silent(self, site: str, reason: str) -> None:
        """It gave no usable answer."""
        if site not in self._silent:
            self._silent.add(site)
            log.warning("The site %r does not answer; its tasks wait: %s", site, reason)

    def answers(self, site: str) -> None:
        """It answered."""
        if site in self._silent:
            self._silent.discard(site)
            log.info("The site %r answers again.", site)


def told(task: Task, change: Change) -> None:
    """One line for a task that has just ended, and one for an attempt that has failed and is followed by another."""
    if change.state is None:
        return
    site = task.attempt.site if task.attempt else "no site"
    reason = f": {change.system[0]}" if change.system else ""
    if task.final:
        log.info("Task %s is %s (%s)%s", task.id, task.state, site, reason)
    elif change.state is TesState.QUEUED:
        log.info("Task %s is tried again after attempt %d (%s)%s", task.id, len(task.attempts), site, reason)
