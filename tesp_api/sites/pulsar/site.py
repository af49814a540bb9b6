"""A Pulsar as a site: Pulsar's words turned into ours. How Pulsar is reached is the carrier's business.

What Pulsar says of a job is a hint; the truth is in the documents that the runner leaves. So a job has ended as soon
as its progress says so, a job that Pulsar has lost is still looked for, and an exit code counts only without a result.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Protocol, Self

from tesp_api.errors import SiteClosed, SiteError, SiteUnavailable
from tesp_api.runner import job
from tesp_api.runner.bundle import Bundle, command
from tesp_api.sites import SiteFacts, documents
from tesp_api.sites.pulsar import messages
from tesp_api.sites.pulsar.lately import Lately
from tesp_api.sites.pulsar.messages import ANSWER, ENDED, JOBDIR, LOST, PROGRESS, RESULT, RUNNING, WAITING, Status
from tesp_api.task import Observation, Phase

log = logging.getLogger(__name__)

BELIEVED: Final = 1.0
"""Seconds for which what Pulsar said of an active job is believed; it knows of a killed runner, the files do not."""

STILL: Final = 15.0
"""Seconds without a beat after which the result is looked for even though Pulsar says that the job runs, and a set-up
counts as no sign of life any more."""

LEAVING: Final = (0.0, 0.01, 0.03, 0.06)
"""Pauses in seconds between looks at a job that is to be forgotten: the end of its process may be a moment away."""

AGAIN: Final = (0.05, 0.2, 0.5, 1.0)
"""Pauses in seconds after which it is seen whether a removed directory has stayed away."""

SOON: Final = 3.0
"""Seconds that a look at many jobs waits for the progress of one, where that takes an errand."""

ARRIVING: Final = 1.5
"""Seconds within which a letter arrives where nothing is wrong."""

LOOKS: Final = 8
"""Looks for whose sake Pulsar is asked at once, so that a submit or a cancel need not wait behind hundreds of them."""

GONE_WITHIN: Final = 2.0
"""Seconds that a killed job has to clean up before its directory is taken away."""


class Carrier(Protocol):
    """A way to reach one Pulsar manager. An async context; errors are SiteUnavailable and SiteRefused.

    `by_mail`: it speaks by letters, which wait where Pulsar is slow or away. What is launched may be unknown for a
    while, ends are told unasked, and files are dear. `file_pause`: seconds from one look at the progress of a running
    job to the next, 0 where looking is cheap.
    """

    @property
    def by_mail(self) -> bool: ...

    @property
    def file_pause(self) -> float: ...

    async def deliver(self, runner: Bundle, *, again: bool) -> None:
        """See to it that the runner lies at the site. `again`: it was found missing or damaged, so send it anew."""

    async def launch(self, launch: messages.Launch) -> None:
        """Have the job set up and started. May be repeated for the same job."""

    async def status(self, job_id: str) -> Status | None:
        """What Pulsar says of the job; None if it answers, but cannot tell."""

    async def fetch(self, job_id: str, name: str, limit: int) -> bytes | None:
        """A file of the job's metadata directory; None if it is not there, cannot be had, or is longer than `limit`."""

    async def put(self, job_id: str, name: str, kind: str, data: bytes) -> None:
        """Write a file into the directory of a job that exists."""

    async def kill(self, job_id: str) -> None:
        """Have the job's processes killed. Pulsar drops this silently unless the job is launched."""

    async def clean(self, job_id: str) -> None:
        """Remove the job's directory, whatever goes on in it."""

    def updates(self) -> AsyncIterator[tuple[str, Status]]:
        """What Pulsar sends by itself."""

    async def check(self) -> str:
        """Ask something harmless, to see that Pulsar is there and lets us in; its version, empty if it is not told."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass
class _Pulse:
    """The latest beat of a job and since when it is the latest."""

    beat: int
    since: float


@dataclass
class _Seen:
    """The latest progress of a job where looking is dear, when it was fetched, and when the first one was."""

    progress: job.Progress | None
    at: float
    first: float


class PulsarSite:
    """One Pulsar manager. `runner` is delivered before the first job, and again when it is found missing."""

    def __init__(self, facts: SiteFacts, carrier: Carrier, runner: Bundle) -> None:
        self.facts = facts
        self._carrier = carrier
        self._runner = runner
        self._command_line = command(runner.sha256)
        self._turns = _Turns()
        self._room = asyncio.Semaphore(LOOKS)
        self._delivery: asyncio.Task[None] | None = None
        self._delivered = False
        self._deliveries = 0
        self._launched_with = Lately[int]()  # number of deliveries before the launch
        self._pulses = Lately[_Pulse]()
        self._waiting_since = Lately[float]()  # when Pulsar first said that the job has not begun
        self._seen = Lately[_Seen]()
        self._active_at = Lately[float]()  # when Pulsar last said so of a job that has begun
        self._looking: dict[str, asyncio.Task[job.Progress | None]] = {}
        self._on_the_way = Lately[None]()  # launched by mail, and not known to Pulsar yet

    async def __aenter__(self) -> Self:
        await self._carrier.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        under_way = [*self._looking.values(), *([self._delivery] if self._delivery is not None else [])]
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._carrier.__aexit__(kind, error, trace)

    # Submit

    async def submit(self, plan: job.Plan) -> None:
        """See Site. A repeated submit asks first: only a job that is unknown or still being set up is sent again."""
        launch = messages.launch(plan, self._command_line, batched=self.facts.batch)
        async with self._turns.turn(plan.job_id):
            try:
                await self._deliver()
                status = await self._status(plan.job_id)
            except SiteUnavailable as error:
                raise SiteUnavailable(str(error), unsent=plan.job_id not in self._launched_with) from error
            if status is None and self._carrier.by_mail:  # its answer may have been lost with a broker
                raise SiteUnavailable("Pulsar answers, but does not tell whether it has the job.")
            if status is None or status.state not in (LOST, "preprocessing"):
                return
            self._launched_with[plan.job_id] = self._deliveries
            await self._carrier.launch(launch)
            if self._carrier.by_mail and status.state == LOST:
                self._on_the_way[plan.job_id] = None

    async def _deliver(self) -> None:
        """One delivery for all who need it; one who gives up waiting does not break it off."""
        if self._delivered:
            return
        if self._delivery is None:
            self._delivery = asyncio.create_task(self._deliver_once())
            self._delivery.add_done_callback(_heard)
        await asyncio.shield(self._delivery)

    async def _deliver_once(self) -> None:
        try:
            await self._carrier.deliver(self._runner, again=self._deliveries > 0)
            self._delivered = True
            self._deliveries += 1
        finally:
            self._delivery = None

    async def _status(self, job_id: str) -> Status | None:
        status = await self._carrier.status(job_id)
        self._hear(job_id, status)
        return status

    def _hear(self, job_id: str, status: Status | None) -> None:
        if status is not None and status.state != LOST:
            self._on_the_way.pop(job_id, None)

    def _suspect_runner(self, job_id: str) -> None:
        """A job could not start the runner: deliver it anew, unless that was done since the job's launch."""
        if self._launched_with.get(job_id, self._deliveries) < self._deliveries:
            return
        log.warning("The runner is missing or damaged at site %s; it will be sent again.", self.facts.name)
        self._delivered = False
        self._deliveries = max(self._deliveries, 1)

    # Observe

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        """See Site. A job about which nothing could be learned is RUNNING without a sign of life."""
        looks = [self._try(each) for each in job_ids]
        seen = [await looks[0]] if len(looks) == 1 else await asyncio.gather(*looks)  # most come one by one
        observations: list[Observation] = []
        errors: list[SiteError] = []
        for job_id, each in zip(job_ids, seen, strict=True):
            if isinstance(each, SiteError):
                errors.append(each)
                observations.append(Observation(job_id=job_id, phase=Phase.RUNNING, detail=str(each)))
            else:
                observations.append(each)
        if errors and len(errors) == len(job_ids):
            if isinstance(errors[0], SiteClosed):
                raise errors[0]
            raise SiteUnavailable(str(errors[0])) from errors[0]
        return observations

    def freshen(self, job_ids: Sequence[str]) -> None:
        """See Site. Where looking is dear, one is due now."""
        for job_id in job_ids:
            if (seen := self._seen.get(job_id)) is not None:
                self._seen[job_id] = replace(seen, at=-math.inf)

    async def _try(self, job_id: str) -> Observation | SiteError:
        try:
            return await self._look(job_id)
        except SiteError as error:
            return error

    async def _look(self, job_id: str) -> Observation:
        if not messages.JOB_ID.fullmatch(job_id):
            return Observation(job_id=job_id, phase=Phase.UNKNOWN, detail="No Pulsar can have a job of this name.")
        if (seen := await self._by_pulse(job_id)) is not None:
            return seen
        async with nullcontext() if self._carrier.by_mail else self._room:  # letters wait at Pulsar, one like another
            status = await self._status(job_id)
        return await self._observation(job_id, status)

    async def _by_pulse(self, job_id: str) -> Observation | None:
        """What the job's files say, if Pulsar has just called it active: they tell its end sooner than Pulsar does, and
        to ask both each time would double what a look costs."""
        if time.monotonic() - self._active_at.get(job_id, -math.inf) > BELIEVED:
            return None
        progress = await self._progress(job_id)
        if progress is None or not documents.begun(progress):
            return None
        if progress.phase != "done":
            return Observation(job_id=job_id, phase=Phase.RUNNING, progress=progress)
        result = await self._result(job_id)
        if result is None:
            return None
        return self._end(Observation(job_id=job_id, phase=Phase.ENDED, progress=progress, result=result))

    async def _observation(self, job_id: str, status: Status | None) -> Observation:
        """What follows from Pulsar's words and the files in the job directory."""
        if status is None:
            return await self._by_files(job_id, "Pulsar fails to tell the status of this job.")
        if status.state == "preprocessing":
            # The set-up takes a moment, as Pulsar moves no files for us. One killed in the middle says this for ever.
            # It may have been launched all the same, just before.
            if self._waits_long(job_id):
                return await self._by_files(job_id, "Pulsar sets the job up.")
            return Observation(job_id=job_id, phase=Phase.WAITING, detail="Pulsar sets the job up.")
        if status.state in WAITING or status.state in RUNNING:
            return await self._active(job_id, status)
        if status.state in ENDED:
            return await self._ended(job_id, status)
        if status.state == LOST:
            return await self._lost(job_id, status)
        return Observation(
            job_id=job_id, phase=Phase.RUNNING, detail=f"Pulsar says {documents.words(status.state, 40)!r}."
        )

    async def _active(self, job_id: str, status: Status) -> Observation:
        if self._carrier.by_mail and status.state in WAITING and not self._waits_long(job_id):
            return Observation(job_id=job_id, phase=Phase.WAITING)
        progress = await (self._latest(job_id) if self._carrier.by_mail else self._progress(job_id))
        # A Pulsar that could not take a job up again may call it queued for ever; what has begun has a pulse.
        begun = documents.surely_begun(progress)
        queued = status.state in WAITING and not begun
        still = self._is_still(job_id, progress)
        if queued and self.facts.batch:
            self._waiting_since.pop(job_id, None)  # its queue may be long: look again after a while, not each time
            return Observation(job_id=job_id, phase=Phase.WAITING, progress=progress)
        # By mail the end is about to be told, with the result.
        done = progress is not None and progress.phase == "done" and not self._carrier.by_mail
        result = await self._result(job_id) if done or still else None
        if result is not None:
            return self._end(Observation(job_id=job_id, phase=Phase.ENDED, progress=progress, result=result))
        if begun and not self._carrier.by_mail:
            self._active_at[job_id] = time.monotonic()
        # One in whose launch Pulsar was killed is called queued for ever, too.
        phase = Phase.WAITING if queued and not still else Phase.RUNNING
        return Observation(job_id=job_id, phase=phase, progress=progress)

    async def _ended(self, job_id: str, status: Status) -> Observation:
        code = status.returncode if status.state == "complete" else None
        result = await _sent_result(job_id, status)
        if result is None and _listed(status, RESULT):
            result = await self._result(job_id)
        if result is not None:
            return self._end(Observation(job_id=job_id, phase=Phase.ENDED, result=result, exit_code=code))
        # A remembered progress may say "waiting" of a job that has begun since, and then its code would be believed.
        progress = await self._progress(job_id, fresh=True) if _listed(status, PROGRESS) else None
        if code == job.EXIT_DUPLICATE and not (self._carrier.by_mail and _is_fresh(progress)):
            # The second of two launches stood back; Pulsar takes its end for the end of both.
            return Observation(job_id=job_id, phase=Phase.RUNNING, progress=progress, exit_code=code)
        if self._is_alive(job_id, status, progress):
            detail = f"Pulsar says {status.state}, but the job may go on."
            return Observation(job_id=job_id, phase=Phase.RUNNING, progress=progress, detail=detail)
        believed = documents.exit_code(code if code != job.EXIT_DUPLICATE else None, progress)
        if not documents.begun(progress) and believed in (1, job.EXIT_NO_RUNNER, job.EXIT_DAMAGED_RUNNER):
            self._suspect_runner(job_id)
        return Observation(
            job_id=job_id,
            phase=Phase.ENDED,
            progress=progress,
            exit_code=believed,
            detail=_why(status, code, progress),
        )

    def _is_alive(self, job_id: str, status: Status, progress: job.Progress | None) -> bool:
        """Whether the end that Pulsar claims is doubtful, and the job's pulse is not yet known to have stopped.

        Pulsar takes a batch system that fails to answer for the end of a job, and its order to cancel for the deed.
        """
        doubtful = _is_vague(status) or (self.facts.batch and status.state == "cancelled")
        if not doubtful or progress is None or progress.phase == "done":
            return False
        if status.state == "cancelled" and not documents.begun(progress):
            return False
        return not self._is_still(job_id, progress)

    async def _lost(self, job_id: str, status: Status) -> Observation:
        result = await _sent_result(job_id, status)
        if result is None and _listed(status, RESULT):
            result = await self._result(job_id)
        if result is not None:
            return self._end(Observation(job_id=job_id, phase=Phase.ENDED, result=result))
        progress = await self._progress(job_id) if _listed(status, PROGRESS) else None
        if progress is not None:
            return Observation(
                job_id=job_id, phase=Phase.RUNNING, progress=progress, detail="Pulsar has lost sight of this job."
            )
        if job_id in self._on_the_way:  # its launch is kept until Pulsar takes it; how long, patience decides
            return Observation(job_id=job_id, phase=Phase.RUNNING, detail="Pulsar has not taken the job yet.")
        return Observation(job_id=job_id, phase=Phase.UNKNOWN)

    async def _by_files(self, job_id: str, detail: str) -> Observation:
        progress = await self._progress(job_id)
        result = await self._result(job_id)
        if result is not None:
            return self._end(Observation(job_id=job_id, phase=Phase.ENDED, progress=progress, result=result))
        return Observation(job_id=job_id, phase=Phase.RUNNING, progress=progress, detail=detail)

    async def _progress(self, job_id: str, *, fresh: bool = False) -> job.Progress | None:
        """The job's progress; where looking is dear, that of the last look unless a new one is due or must be."""
        seen = self._seen.get(job_id)
        if seen is not None and not fresh and not self._is_due(seen):
            return seen.progress
        progress = documents.progress(await self._carrier.fetch(job_id, PROGRESS, documents.PROGRESS_BYTES), job_id)
        if self._carrier.file_pause:
            now = time.monotonic()
            self._seen[job_id] = _Seen(progress, now, seen.first if seen is not None else now)
        return progress

    async def _latest(self, job_id: str) -> job.Progress | None:
        """The job's progress as far as known soon: an errand can be long on its way when there are many launches."""
        look = self._looking.get(job_id)
        if look is None:
            look = self._looking[job_id] = asyncio.create_task(self._progress(job_id))
            look.add_done_callback(lambda done: self._looked(job_id, done))
        await asyncio.wait((look,), timeout=SOON)
        seen = self._seen.get(job_id)
        return seen.progress if seen is not None else None

    def _looked(self, job_id: str, done: asyncio.Task[job.Progress | None]) -> None:
        self._looking.pop(job_id, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.debug("the progress of %s: %s", job_id, error)

    def _is_due(self, seen: _Seen) -> bool:
        """Whether to look again: early until the job has started, so that this is seen soon."""
        now, pause = time.monotonic(), self._carrier.file_pause
        if seen.progress is None or seen.progress.started is None:
            pause = min(pause, max(0.5, 0.2 * (now - seen.first)))
        return now - seen.at >= pause

    async def _result(self, job_id: str) -> job.Result | None:
        data = await self._carrier.fetch(job_id, RESULT, job.RESULT_BYTES)
        return await documents.aside(documents.result, data, job_id)

    def _waits_long(self, job_id: str) -> bool:
        """Whether the job's files are worth a look, though Pulsar says that it has not begun."""
        now = time.monotonic()
        if job_id not in self._waiting_since:
            self._waiting_since[job_id] = now
        return now - self._waiting_since[job_id] > self._long()

    def _is_still(self, job_id: str, progress: job.Progress | None) -> bool:
        beat, now = (progress.beat if progress is not None else -1), time.monotonic()
        pulse = self._pulses.get(job_id)
        if pulse is None or pulse.beat != beat:
            self._pulses[job_id] = _Pulse(beat, now)
            return False
        return now - pulse.since > self._long()

    def _long(self) -> float:
        return STILL + 2 * self._carrier.file_pause

    def _end(self, seen: Observation) -> Observation:
        self._drop_looks(seen.job_id)
        return seen

    def _drop_looks(self, job_id: str) -> None:
        for each in (self._pulses, self._waiting_since, self._seen, self._active_at):
            each.pop(job_id, None)

    async def updates(self) -> AsyncIterator[Observation]:
        """See Site."""
        looks: asyncio.Queue[tuple[Observation, asyncio.Event]] = asyncio.Queue()
        listening = asyncio.create_task(self._listen(looks))
        try:
            while (update := await _next(looks, listening)) is not None:
                seen, taken = update
                yield seen
                taken.set()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, looks: asyncio.Queue[tuple[Observation, asyncio.Event]]) -> None:
        """Put what Pulsar tells into the queue, each until it is taken. What must be looked up first, which may take
        another letter of Pulsar's, is looked up beside that; if the service dies meanwhile, polling finds it too."""
        async with asyncio.TaskGroup() as beside:
            async for job_id, status in self._carrier.updates():
                self._hear(job_id, status)
                seen = await _told(job_id, status)
                if seen is None:
                    beside.create_task(self._look_up(job_id, status, looks))
                    continue
                taken = asyncio.Event()
                looks.put_nowait((self._end(seen), taken))
                await taken.wait()

    async def _look_up(
        self, job_id: str, status: Status, looks: asyncio.Queue[tuple[Observation, asyncio.Event]]
    ) -> None:
        try:
            looks.put_nowait((await self._observation(job_id, status), asyncio.Event()))
        except SiteError as error:
            log.debug("%s: %s", job_id, error)
        except Exception:
            log.exception("looking at %s failed", job_id)

    async def check(self) -> str:
        """See Site."""
        return await self._carrier.check()

    # Cancel and forget

    async def cancel(self, job_id: str, *, force: bool = False) -> None:
        """See Site. The answer reaches also a job that Pulsar cannot kill yet: its runner starts nothing then."""
        messages.check_id(job_id)
        async with self._turns.turn(job_id):  # a submit under way must not slip past its cancel
            status = await self._settled(job_id, await self._status(job_id))
            if status is not None and status.state in ENDED and not _is_vague(status):
                return
            force = self._must_kill(status, force)
            if status is not None and status.state == LOST and not await self._may_run(job_id, status):
                return
            done, told = await asyncio.gather(
                self._is_done(job_id, status) if force else _no(), self._stop(job_id), return_exceptions=True
            )
            wrong = [each for each in (told, done) if isinstance(each, BaseException)]
            if force and done is not True and (self._carrier.by_mail or not wrong):
                await self._carrier.kill(job_id)  # by mail in any case: the node may be too full for an errand
            if wrong:
                raise wrong[0]

    def _must_kill(self, status: Status | None, force: bool) -> bool:
        """Whether to have the job killed; behind a batch system, not only and not always by `force`.

        In its queue nobody could read the answer, and that may be long. But a kill during the launch prevents it, or
        comes too early for the batch system to hear of it, and of neither would anybody learn.
        """
        if self.facts.batch and status is not None and status.state in WAITING:
            return status.state == "queued"
        return force

    async def _settled(self, job_id: str, status: Status | None) -> Status | None:
        """By mail, the status of a job that Pulsar does not know, once what another process sent just now has arrived.

        A job that is removed while Pulsar sets it up is called running for ever.
        """
        if not self._carrier.by_mail or status is None or status.state != LOST:
            return status
        if status.left or job_id in self._on_the_way:
            return status
        await asyncio.sleep(ARRIVING)
        return await self._status(job_id)

    async def _may_run(self, job_id: str, status: Status) -> bool:
        """Whether a job that Pulsar does not know may run all the same: it is on the way, or outlived Pulsar's death.

        What an earlier process launched may be on the way, too; after a clean it runs nothing.
        """
        if not self._carrier.by_mail:
            return False
        if status.left or job_id in self._on_the_way:
            return True
        await self._carrier.clean(job_id)
        return False

    async def _stop(self, job_id: str) -> None:
        await self._carrier.put(job_id, ANSWER, JOBDIR, documents.dump(job.Answer(cancel=True)))

    async def forget(self, job_id: str, *, force: bool = False) -> bool:
        """See Site."""
        messages.check_id(job_id)
        async with self._turns.turn(job_id):
            status = await self._until_left(job_id)
            if _is_active(status):
                if not force:
                    return False
                await self._kill_before_clean(job_id, status)
                if not await self._clean_twice(job_id):
                    return False
            else:
                await self._carrier.clean(job_id)
        self._drop_looks(job_id)
        self._on_the_way.pop(job_id, None)
        self._launched_with.pop(job_id, None)
        return True

    async def _clean_twice(self, job_id: str) -> bool:
        """What was killed just now, and Pulsar's own thread, may still write while the directory is being removed.

        Whether nothing is left.
        """
        for pause in AGAIN:
            await self._carrier.clean(job_id)
            await asyncio.sleep(pause)
            status = await self._status(job_id)
            if status is None or not status.left:
                return True
        return False

    async def _until_left(self, job_id: str) -> Status | None:
        status = None
        for pause in LEAVING:
            if pause:
                await asyncio.sleep(pause)
            status = await self._status(job_id)
            # Only a job about to leave is worth a wait, and each question moves Pulsar's post-processing on.
            if not _is_active(status) or (status is not None and status.state in WAITING):
                break
        return status

    async def _kill_before_clean(self, job_id: str, status: Status | None) -> None:
        """Without a kill the directory would go and the process stay; and the dead runner's reaper still needs it."""
        if status is None or await self._is_done(job_id, status):
            return  # a restarted Pulsar says `running` for ever, and a kill would hit an old process id
        await self._stop(job_id)
        await self._carrier.kill(job_id)
        if status.state not in RUNNING:
            return
        deadline = time.monotonic() + GONE_WITHIN
        while time.monotonic() < deadline:
            progress = await self._progress(job_id, fresh=True)
            if not documents.begun(progress) or (progress is not None and progress.phase == "done"):
                return
            seen = await self._status(job_id)
            if seen is not None and seen.metadata is not None and RESULT in seen.metadata:
                return
            await asyncio.sleep(0.1)

    async def _is_done(self, job_id: str, status: Status | None) -> bool:
        """Whether the runner has left its result, whatever Pulsar says."""
        if status is None or status.state == "preprocessing":
            return False
        progress = await self._progress(job_id, fresh=True)
        return progress is not None and progress.phase == "done"


async def _no() -> bool:
    return False


def _heard(delivery: asyncio.Task[None]) -> None:
    """Whoever waited for it may have given up; then the next submit finds out the same."""
    if not delivery.cancelled():
        delivery.exception()


async def _next(
    looks: asyncio.Queue[tuple[Observation, asyncio.Event]], listening: asyncio.Task[None]
) -> tuple[Observation, asyncio.Event] | None:
    """The next update; None once there are no more. The listener's error, if it has one."""
    waiting = asyncio.create_task(looks.get())
    try:
        await asyncio.wait((waiting, listening), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        await listening
        return None if looks.empty() else looks.get_nowait()
    finally:
        waiting.cancel()


async def _told(job_id: str, status: Status) -> Observation | None:
    """What follows from Pulsar's words alone, or None if more must be looked up."""
    result = await _sent_result(job_id, status)
    if result is None:
        return None
    code = status.returncode if status.state == "complete" else None
    return Observation(job_id=job_id, phase=Phase.ENDED, result=result, exit_code=code)


async def _sent_result(job_id: str, status: Status) -> job.Result | None:
    """The result that Pulsar has sent along with its status."""
    return await documents.aside(documents.result, _bytes(status.result), job_id)


def _is_fresh(progress: job.Progress | None) -> bool:
    """Whether no runner has touched the job's directory: a late launch of a job that was removed before it came."""
    return not documents.begun(progress)


def _is_active(status: Status | None) -> bool:
    return status is not None and (status.state in WAITING or status.state in RUNNING)


def _is_vague(status: Status) -> bool:
    """Whether Pulsar says that the job's script has ended, but not how: it may not have."""
    return status.state == "complete" and status.returncode is None


def _listed(status: Status, name: str) -> bool:
    return status.metadata is None or name in status.metadata


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "replace")


def _why(status: Status, code: int | None, progress: job.Progress | None) -> str:
    if status.state == "failed":
        return "Pulsar could not set the job up or launch it; the reason is in its own log and in stderr of the job."
    if status.state == "cancelled":
        return "The job was killed."
    if documents.begun(progress):
        # What a begun runner writes may hold the task's own words; those are for its result alone.
        return f"The runner stopped half-way (exit code {code})."
    return documents.words(status.stderr)


class _Turns:
    """One at a time for each job id."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def turn(self, job_id: str) -> AsyncIterator[None]:
        lock, waiting = self._locks.get(job_id, (asyncio.Lock(), 0))
        self._locks[job_id] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._locks.pop(job_id)
            if waiting > 1:
                self._locks[job_id] = (lock, waiting - 1)
