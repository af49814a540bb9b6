"""A site whose jobs the test moves: honest about the protocol, and as troublesome as the test asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tesp_api.errors import SiteError, SiteUnavailable
from tesp_api.runner import job
from tesp_api.sites import SiteFacts
from tesp_api.task import Observation, Phase


@dataclass
class Job:
    """One job at the site."""

    plan: job.Plan
    phase: Phase = Phase.WAITING
    beat: int = 0
    started: bool = False
    result: job.Result | None = None
    exit_code: int | None = None
    asked_to_stop: bool = False
    killed: bool = False
    runs: int = 1

    def run(self) -> None:
        """The first executor starts."""
        self.phase, self.started, self.beat = Phase.RUNNING, True, self.beat + 1

    def end(self, state: str = "COMPLETE", **fields: Any) -> None:
        """The runner leaves its result."""
        self.phase = Phase.ENDED
        self.result = job.Result(self.plan.job_id, state, "2026-01-31T12:00:00.0Z", "2026-01-31T12:00:01.0Z", **fields)

    def exit(self, code: int) -> None:
        """The process ends without a result."""
        self.phase, self.exit_code = Phase.ENDED, code

    def seen(self) -> Observation:
        progress = None
        if self.beat:
            progress = job.Progress(self.plan.job_id, "running", started="t" if self.started else None, beat=self.beat)
        return Observation(
            job_id=self.plan.job_id,
            phase=self.phase,
            progress=progress,
            result=self.result,
            exit_code=self.exit_code,
        )


class SiteDouble:
    """See Site. `trouble(call, job_id)` may return an error, raised before acting; `lose_answers`: act, then fail."""

    def __init__(self, facts: SiteFacts) -> None:
        self.facts = facts
        self.jobs: dict[str, Job] = {}
        self.submits: Counter[str] = Counter()
        self.forgotten: list[str] = []
        self.calls: list[tuple[str, str]] = []
        self.trouble: Callable[[str, str], BaseException | None] = lambda call, job_id: None
        self.lose_answers = False
        self.lost: set[str] = set()
        self.gate: asyncio.Event | None = None
        self.checks = 0
        self.most = 0
        self.most_cpus = 0.0

    def job(self, number: int = 0) -> Job:
        """A job, in the order of arrival."""
        return list(self.jobs.values())[number]

    @property
    def active(self) -> list[Job]:
        return [each for each in self.jobs.values() if each.phase in (Phase.WAITING, Phase.RUNNING)]

    async def _call(self, call: str, job_id: str) -> None:
        self.calls.append((call, job_id))
        if self.gate is not None and call == "submit":
            await self.gate.wait()
        if (error := self.trouble(call, job_id)) is not None:
            raise error

    async def submit(self, plan: job.Plan) -> None:
        self.submits[plan.job_id] += 1
        await self._call("submit", plan.job_id)
        self.jobs.setdefault(plan.job_id, Job(plan))
        self.most = max(self.most, len(self.active))
        self.most_cpus = max(self.most_cpus, sum(each.plan.cpus or 0 for each in self.active))
        if self.lose_answers:
            raise SiteUnavailable("The answer was lost.")

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        for job_id in job_ids:
            await self._call("observe", job_id)
        return [self.jobs[each].seen() for each in job_ids if each in self.jobs and each not in self.lost]

    async def updates(self) -> AsyncIterator[Observation]:
        for each in ():
            yield each

    async def cancel(self, job_id: str, *, force: bool = False) -> None:
        await self._call("kill" if force else "cancel", job_id)
        if job_id in self.jobs:
            self.jobs[job_id].asked_to_stop = True
            if force and self.jobs[job_id].phase is not Phase.ENDED:
                self.jobs[job_id].killed = True
                self.jobs[job_id].exit(137)

    async def forget(self, job_id: str, *, force: bool = False) -> bool:
        await self._call("forget", job_id)
        if job_id in self.jobs and self.jobs[job_id] in self.active and not force:
            return False
        self.jobs.pop(job_id, None)
        self.forgotten.append(job_id)
        return True

    async def check(self) -> str:
        self.checks += 1
        if (error := self.trouble("check", "")) is not None:
            raise error
        return "1.0"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def down(call: str, job_id: str) -> SiteError:
    """Trouble: no answer to anything."""
    return SiteUnavailable("connection refused")
