"""The errors of the service, one family.

TespError
├── InvalidRequest        the caller must change the request (HTTP 400)
├── TaskNotFound          no such task, or not the caller's (HTTP 404)
├── SettingsError         the operator must change the settings; the start stops
├── PlanError             the task cannot be carried out at this site; never retried
├── StoreUnavailable      the store does not answer (HTTP 503), try again
│   └── StoreUnusable         and will not, however long one waits: the operator must change something
├── MailboxFull           too many letters wait in a box; nothing was changed
├── RightLost             another process decides this now; nothing was changed
└── SiteError             what went wrong between us and a site
    ├── SiteUnavailable   no usable answer: it may or may not have heard us; try again
    └── SiteRefused       a clear no, in the site's own words; trying again is useless
        └── SiteClosed        the no is meant for all of us, not for this job: the operator must change something
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TespError(Exception):
    """Base of all errors that this service raises on purpose; `str()` is one sentence for a reader."""


@dataclass(frozen=True)
class Detail:
    """One thing wrong with a request: `field` such as `executors[0].image`, and what is wrong with it."""

    field: str
    message: str


class InvalidRequest(TespError):
    """The request breaks a rule; `details` names each field at fault."""

    def __init__(self, message: str, details: Sequence[Detail] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class TaskNotFound(TespError):
    """There is no task with this id that the caller may see."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"There is no task {task_id!r}.")
        self.task_id = task_id


class SettingsError(TespError):
    """A setting is unknown or wrong; the message names it."""


class PlanError(TespError):
    """The task asks for something that the site cannot do; the message names the field."""


class StoreUnavailable(TespError):
    """The store gave no answer. A write that was under way may or may not have been done."""


class StoreUnusable(StoreUnavailable):
    """The store does not let us in, or was written by a newer release; waiting does not help."""


class MailboxFull(TespError):
    """A box of letters holds as much as it may; the letter was not taken."""


class RightLost(TespError):
    """The right to decide has run out before the write; whoever holds it now goes on."""


class SiteError(TespError):
    """Something went wrong between the service and a site."""


class SiteUnavailable(SiteError):
    """The site gave no usable answer; whether it acted is unknown, so the call may be repeated.

    `unsent`: the site has surely not heard of the call.
    """

    def __init__(self, message: str, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.unsent = unsent


class SiteRefused(SiteError):
    """The site understood and said no; repeating the call would not help."""


class SiteClosed(SiteRefused):
    """The site takes nothing from us at all: a wrong token, no Pulsar at the address. The job is not to blame."""
