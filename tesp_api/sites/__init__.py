"""The seam to the places that run jobs.

A site is told to run a job, asked how it is, told to stop it and to forget it. It knows nothing of tasks and their
states. Every call may be repeated: a crash between a call and the note of it is normal.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from tesp_api.runner.job import FileRoot, Plan, Runtime
from tesp_api.task import Observation


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """What the dispatcher must know of a site to choose it and to plan for it.

    `carrier` says how it is reached, for readers only. `cpus` and `ram_gb` limit what our tasks ask for together,
    `disk_gb` what one of them does. `preemptible`: its jobs may be taken off at any time. `batch`: it honours a time
    limit and a queue, which must be one of `queues` where there are any. Keys of `labels` are in lower case.
    `draining`: it gets no more jobs, those that it has are followed to their end.
    `max_jobs` is how many of our jobs it may hold at once (Pulsar itself does not limit that); None is no limit.
    `patience` is how long, in seconds, a job or the whole site may be silent before it is given up; `poll_interval`
    is the longest pause, in seconds, between two looks at a job, `first_look` the shortest one; a site that tells by
    itself how its jobs are need not be asked often. `report_url` is our address for reports of its jobs; empty if they
    need not, or cannot, send any.
    """

    name: str
    carrier: str = "local"
    max_jobs: int | None = None
    cpus: float | None = None
    ram_gb: float | None = None
    disk_gb: float | None = None
    zones: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    preemptible: bool = False
    draining: bool = False
    batch: bool = False
    queues: tuple[str, ...] = ()
    file_roots: tuple[FileRoot, ...] = ()
    runtime: Runtime = field(default_factory=Runtime)
    log_bytes: int = 131072
    patience: float = 300.0
    poll_interval: float = 5.0
    first_look: float = 0.1
    cancel_grace: float = 10.0
    report_url: str = ""


class Site(Protocol):
    """A place that runs jobs: one Pulsar manager, or the local machine. An async context: enter before use."""

    facts: SiteFacts

    async def submit(self, plan: Plan) -> None:
        """Make the site run `plan` once, however often this is called for its `job_id`, also at the same time.

        SiteUnavailable: it may or may not have begun; call again. SiteRefused: it has not and will not; SiteClosed:
        nor will any other job.
        """

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        """How each of these jobs is, in any order; SiteUnavailable when it could be learned of none of them.

        It takes as long as the slowest answer does: whoever wants none to wait for another asks about each by itself.
        """

    def freshen(self, job_ids: Sequence[str]) -> None:
        """Somebody wants to see what these jobs do, so their next observation should be as fresh as can be had."""

    def updates(self) -> AsyncIterator[Observation]:
        """Observations that the site sends by itself. The last one counts as taken when the next is asked for."""

    async def cancel(self, job_id: str, *, force: bool = False) -> None:
        """Ask the job to stop and to leave a result; with `force` have it killed. Unknown jobs are no error."""

    async def forget(self, job_id: str, *, force: bool = False) -> bool:
        """Remove what the site keeps of an ended job. False: its process has not left yet, ask again later.

        With `force` it is removed all the same; False says that something of it came back. Unknown jobs are no error.
        """

    async def check(self) -> str:
        """Ask whether it is there and lets us in; its version, empty where it does not tell. Raises SiteError."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
