"""Pulsar's words turned into ours, over a carrier that only remembers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import pytest

from tesp_api.errors import SiteUnavailable
from tesp_api.runner import job
from tesp_api.runner.bundle import Bundle
from tesp_api.sites import SiteFacts, documents
from tesp_api.sites.pulsar.messages import Launch, Status
from tesp_api.sites.pulsar.site import BELIEVED, LOOKS, STILL, PulsarSite
from tesp_api.task import Observation, Phase
from tests import standin

NOW = "2026-01-31T12:00:00.000000Z"
ID = "t-1"
RESULT = job.Result(job_id=ID, state="COMPLETE", start_time=NOW, end_time=NOW, started=True)
WAITING = job.Progress(job_id=ID)
BEGUN = job.Progress(job_id=ID, phase="running", beat=4, started=NOW)
DONE = job.Progress(job_id=ID, phase="done", beat=9, started=NOW)
HERE = frozenset({"progress.json", "result.json"})


class Memory:
    """A carrier to one job of which everything is given."""

    by_mail = False
    file_pause = 0.0

    def __init__(self, status: Status | None, **files: object) -> None:
        self.answer, self.calls, self.questions = status, list[str](), 0
        self.files = {f"{name}.json": documents.dump(value) for name, value in files.items() if value is not None}

    async def deliver(self, runner: Bundle, *, again: bool) -> None:
        self.calls.append("deliver again" if again else "deliver")

    async def launch(self, launch: Launch) -> None:
        self.calls.append("launch")

    async def status(self, job_id: str) -> Status | None:
        self.questions += 1
        return self.answer

    async def fetch(self, job_id: str, name: str, limit: int) -> bytes | None:
        self.calls.append(name)
        return self.files.get(name)

    async def put(self, job_id: str, name: str, kind: str, data: bytes) -> None:
        self.calls.append(f"put {name}")

    async def kill(self, job_id: str) -> None:
        self.calls.append("kill")

    async def clean(self, job_id: str) -> None:
        self.calls.append("clean")

    async def check(self) -> str:
        return "0.15.16"

    async def updates(self) -> AsyncIterator[tuple[str, Status]]:
        if self.answer is not None:
            yield ID, self.answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def site(carrier: Memory, *, batch: bool = False) -> PulsarSite:
    return PulsarSite(SiteFacts(name="x", batch=batch), carrier, standin.bundle())


def look(carrier: Memory) -> Observation:
    (seen,) = asyncio.run(site(carrier).observe([ID]))
    return seen


RESULT_TEXT = documents.dump(RESULT).decode()


@pytest.mark.parametrize(
    ("status", "files", "phase", "has_result", "exit_code"),
    [
        (Status("preprocessing"), {}, Phase.WAITING, False, None),
        (Status("queued"), {"progress": WAITING}, Phase.WAITING, False, None),
        (Status("queued"), {"progress": BEGUN}, Phase.RUNNING, False, None),
        (Status("running"), {"progress": WAITING}, Phase.RUNNING, False, None),
        (Status("running"), {"progress": BEGUN}, Phase.RUNNING, False, None),
        (Status("running"), {"progress": DONE, "result": RESULT}, Phase.ENDED, True, None),
        (Status("running"), {"progress": DONE}, Phase.RUNNING, False, None),
        (Status("postprocessing"), {"progress": DONE, "result": RESULT}, Phase.ENDED, True, None),
        (Status("complete", 0, HERE, RESULT_TEXT), {}, Phase.ENDED, True, 0),
        (Status("complete", 0, HERE), {"result": RESULT}, Phase.ENDED, True, 0),
        (Status("complete", None, HERE), {"progress": BEGUN}, Phase.RUNNING, False, None),
        (Status("complete", 2, HERE), {"progress": WAITING}, Phase.ENDED, False, 2),
        (Status("complete", 2, HERE), {"progress": BEGUN}, Phase.ENDED, False, None),
        (Status("complete", 79, HERE), {"progress": BEGUN}, Phase.RUNNING, False, 79),
        (Status("complete", 79, HERE), {"progress": DONE, "result": RESULT}, Phase.ENDED, True, 79),
        (Status("cancelled", None, HERE), {"progress": BEGUN}, Phase.ENDED, False, None),
        (Status("cancelled", None, HERE), {"result": RESULT}, Phase.ENDED, True, None),
        (Status("failed", 1), {"progress": WAITING}, Phase.ENDED, False, None),
        (Status("lost", None, HERE), {"progress": BEGUN}, Phase.RUNNING, False, None),
        (Status("lost", None, HERE), {"result": RESULT}, Phase.ENDED, True, None),
        (Status("lost"), {"result": RESULT}, Phase.ENDED, True, None),
        (Status("lost", None, frozenset()), {}, Phase.UNKNOWN, False, None),
        (None, {"progress": DONE, "result": RESULT}, Phase.ENDED, True, None),
        (None, {"progress": BEGUN}, Phase.RUNNING, False, None),
        (None, {}, Phase.RUNNING, False, None),
        (Status("something new"), {}, Phase.RUNNING, False, None),
    ],
)
def test_what_an_observation_says(
    status: Status | None, files: dict[str, object], phase: Phase, has_result: bool, exit_code: int | None
) -> None:
    seen = look(Memory(status, **files))
    assert (seen.phase, seen.result is not None, seen.exit_code) == (phase, has_result, exit_code)


def test_a_job_that_pulsar_has_just_called_active_is_asked_for_its_pulse_alone() -> None:
    """But not for long: of a runner that was killed only Pulsar knows."""

    async def go() -> None:
        carrier = Memory(Status("running"), progress=BEGUN)
        there = site(carrier)
        began = time.monotonic()
        for _ in range(5):
            (seen,) = await there.observe([ID])
            assert (seen.phase, seen.progress) == (Phase.RUNNING, BEGUN)
        assert carrier.questions == 1 or time.monotonic() - began > BELIEVED
        carrier.answer = Status("complete", 137, HERE)
        async with asyncio.timeout(60):
            while seen.phase is not Phase.ENDED:
                (seen,) = await there.observe([ID])
                await asyncio.sleep(0.01)

    asyncio.run(go())


class Busy(Memory):
    """Does not answer questions about `ID` yet."""

    def __init__(self) -> None:
        super().__init__(Status("complete", 0))
        self.full, self.free = asyncio.Event(), asyncio.Event()

    async def status(self, job_id: str) -> Status | None:
        status = await super().status(job_id)
        if job_id == ID:
            if self.questions == LOOKS:
                self.full.set()
            await self.free.wait()
        return status


def test_a_cancel_does_not_wait_behind_hundreds_of_looks() -> None:
    async def go() -> None:
        carrier = Busy()
        there = site(carrier)
        looks = asyncio.create_task(there.observe([ID] * 200))
        async with asyncio.timeout(60):
            await carrier.full.wait()
            await there.cancel("t-2")
        assert carrier.questions == LOOKS + 1
        carrier.free.set()
        assert len(await looks) == 200

    asyncio.run(go())


def test_the_pulse_tells_the_end_before_pulsar_does() -> None:
    async def go() -> None:
        carrier = Memory(Status("running"), progress=BEGUN)
        there = site(carrier)
        await there.observe([ID])
        carrier.files |= {"progress.json": documents.dump(DONE), "result.json": documents.dump(RESULT)}
        (seen,) = await there.observe([ID])
        assert (seen.phase, seen.result) == (Phase.ENDED, RESULT)

    asyncio.run(go())


def test_where_looking_is_dear_there_is_a_fresh_look_for_one_who_looks() -> None:
    async def go() -> None:
        carrier = Memory(Status("running"), progress=BEGUN)
        carrier.file_pause = 3600.0
        there = site(carrier)
        for _ in range(2):
            await there.observe([ID])
        assert carrier.calls == ["progress.json"]
        there.freshen([ID, "unheard-of-1"])
        for _ in range(2):
            await there.observe([ID])
        assert carrier.calls == ["progress.json"] * 2

    asyncio.run(go())


def test_an_exit_code_is_judged_by_a_progress_of_now() -> None:
    """A job that had not begun at the last look, and crashed before the next one, must not run once more."""

    async def go() -> None:
        carrier = Memory(Status("running"), progress=WAITING)
        carrier.file_pause = 3600.0
        there = site(carrier)
        await there.observe([ID])
        carrier.answer = Status("complete", 1, HERE)
        carrier.files["progress.json"] = documents.dump(BEGUN)
        (seen,) = await there.observe([ID])
        assert (seen.phase, seen.exit_code) == (Phase.ENDED, None)

    asyncio.run(go())


def test_a_set_up_without_an_end_is_no_sign_of_life() -> None:
    """A Pulsar that was killed while it set the job up says so ever after; patience must come to its end."""
    found = site(Memory(Status("preprocessing")))
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.WAITING
    found._waiting_since[ID] -= STILL + 1
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.RUNNING


@pytest.mark.parametrize("batch", [False, True])
def test_a_launch_without_an_end_is_no_sign_of_life(batch: bool) -> None:
    """A Pulsar that was killed while it launched the job calls it queued ever after. A batch system's queue is long."""
    found = site(Memory(Status("queued"), progress=WAITING), batch=batch)
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.WAITING
    found._pulses[ID].since -= STILL + 1
    assert asyncio.run(found.observe([ID]))[0].phase is (Phase.WAITING if batch else Phase.RUNNING)


def test_a_job_that_was_launched_all_the_same_is_seen() -> None:
    found = site(Memory(Status("preprocessing"), progress=DONE, result=RESULT))
    asyncio.run(found.observe([ID]))
    found._waiting_since[ID] -= STILL + 1
    assert asyncio.run(found.observe([ID]))[0].result is not None


@pytest.mark.parametrize("progress", [WAITING, BEGUN])
def test_an_end_without_a_code_is_believed_of_a_job_without_a_pulse(progress: job.Progress) -> None:
    """Pulsar takes a batch system that does not answer for the end of all its jobs."""
    carrier = Memory(Status("complete", None, HERE), progress=progress)
    found = site(carrier)
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.RUNNING
    carrier.files["progress.json"] = documents.dump(BEGUN._replace(beat=5))
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.RUNNING
    asyncio.run(found.cancel(ID))
    assert "put answer.json" in carrier.calls
    found._pulses[ID].since -= STILL + 1
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.ENDED


def test_behind_a_batch_system_cancelled_is_an_order_and_not_yet_a_deed() -> None:
    carrier = Memory(Status("cancelled", None, HERE), progress=BEGUN)
    found = site(carrier, batch=True)
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.RUNNING
    found._pulses[ID].since -= STILL + 1
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.ENDED
    carrier.files["progress.json"] = documents.dump(WAITING)
    assert asyncio.run(found.observe([ID]))[0].phase is Phase.ENDED


@pytest.mark.parametrize(("batch", "kills"), [(True, 1), (False, 0)])
def test_a_job_in_a_batch_queue_is_killed_at_the_first_cancel(batch: bool, kills: int) -> None:
    """Nobody there could read an answer, and the queue may be long."""
    carrier = Memory(Status("queued"), progress=WAITING)
    asyncio.run(site(carrier, batch=batch).cancel(ID))
    assert carrier.calls.count("kill") == kills


def test_the_launch_of_a_job_for_a_batch_queue_is_not_cut_off() -> None:
    """Pulsar would say `preprocessing` for ever, or never tell the batch system."""
    carrier = Memory(Status("preprocessing"), progress=WAITING)
    asyncio.run(site(carrier, batch=True).cancel(ID, force=True))
    assert "put answer.json" in carrier.calls
    assert "kill" not in carrier.calls


def test_nothing_is_fetched_from_an_ended_job_that_is_not_there() -> None:
    carrier = Memory(Status("lost", None, frozenset()))
    look(carrier)
    assert carrier.calls == []


def test_a_reason_is_told_only_when_the_runner_had_not_begun() -> None:
    words = "python3: can't open file"
    assert look(Memory(Status("complete", 2, HERE, None, words), progress=WAITING)).detail == words
    assert words not in look(Memory(Status("complete", 2, HERE, None, words), progress=BEGUN)).detail


@pytest.mark.parametrize(
    ("state", "calls"),
    [("lost", ["deliver", "launch"]), ("preprocessing", ["deliver", "launch"]), ("running", ["deliver"])],
)
def test_a_submit_is_repeated_only_where_it_was_not_accepted(state: str, calls: list[str]) -> None:
    carrier = Memory(Status(state))
    asyncio.run(site(carrier).submit(job.Plan(job_id=ID, task_id="t", executors=[])))
    assert carrier.calls == calls


def test_by_mail_no_answer_about_a_job_does_not_mean_that_it_was_accepted() -> None:
    carrier = Memory(None)
    carrier.by_mail = True
    with pytest.raises(SiteUnavailable, match="whether it has the job") as caught:
        asyncio.run(site(carrier).submit(job.Plan(job_id=ID, task_id="t", executors=[])))
    assert not caught.value.unsent
    assert carrier.calls == ["deliver"]


def test_a_missing_runner_is_delivered_again_once() -> None:
    async def main() -> None:
        carrier = Memory(Status("lost"), progress=WAITING)
        here = site(carrier)
        plan = job.Plan(job_id=ID, task_id="t", executors=[])
        await here.submit(plan)
        carrier.answer = Status("complete", 2, HERE)
        await here.observe([ID, ID])
        carrier.answer = Status("lost")
        await here.submit(plan._replace(job_id="t-2"))
        carrier.answer = Status("complete", 2, HERE)
        await here.observe([ID])  # launched before the second delivery
        carrier.answer = Status("lost")
        await here.submit(plan._replace(job_id="t-3"))
        deliveries = [each for each in carrier.calls if each.startswith("deliver")]
        assert deliveries == ["deliver", "deliver again"]

    asyncio.run(main())


def test_a_job_that_is_done_is_not_killed_when_pulsar_says_it_runs() -> None:
    carrier = Memory(Status("running"), progress=DONE)
    here = site(carrier)
    asyncio.run(here.cancel(ID, force=True))
    assert asyncio.run(here.forget(ID)) is False
    assert asyncio.run(here.forget(ID, force=True)) is True
    assert "kill" not in carrier.calls
    assert carrier.calls[-1] == "clean"


def test_pushed_statuses_become_observations() -> None:
    async def main() -> None:
        (seen,) = [each async for each in site(Memory(Status("complete", 0, HERE, RESULT_TEXT))).updates()]
        assert seen.result == RESULT

    asyncio.run(main())
