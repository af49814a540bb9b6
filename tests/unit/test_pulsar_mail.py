"""The mail carrier over a post that is a small Pulsar itself: it sets jobs up, runs errands and answers questions."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tesp_api.errors import SiteClosed, SiteUnavailable
from tesp_api.runner import job, messenger
from tesp_api.sites import SiteFacts, documents
from tesp_api.sites.pulsar import mail
from tesp_api.sites.pulsar.errand import is_errand
from tesp_api.sites.pulsar.mail import MailCarrier
from tesp_api.sites.pulsar.messages import ANSWER, JOBDIR, Launch
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.task import Phase
from tests import standin

NOW = "2026-01-31T12:00:00.000000Z"


class Odd(dict[str, object]):
    """A letter about which we make a mistake."""

    def get(self, *_: object) -> object:
        raise RuntimeError("what we did not think of")


def _good(letter: object) -> object:
    """The letter, unless it stands for a mistake in fetching it."""
    if isinstance(letter, Exception):
        raise letter
    return letter


class SmallPulsar:
    """See Post. Jobs other than errands are only known once they were set up; what is `deaf` is passed over;
    the way to it is `broken` for those who ask about another job than these.

    `gate` holds errands back; `ends` says how an errand ends instead of well; `alone`: letters are all there is.
    """

    where, doubt = "a small Pulsar", "is it there"

    def __init__(self, staging: Path, *, alone: bool = False) -> None:
        self.staging, self.alone = staging, alone
        self.sent: list[tuple[str, str]] = []
        self.errands = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.ends: dict[str, Any] | None = None
        self.deaf: set[str] = set()
        self.broken: set[str] = set()
        self.silent = False
        self.room = messenger.ROOM
        self.states: dict[str, str] = {}
        self.given = 0
        self.letters_: asyncio.Queue[object] = asyncio.Queue()
        self.copies_: asyncio.Queue[object] = asyncio.Queue()
        self._running: set[asyncio.Task[None]] = set()

    async def send(self, box: str, letter: Mapping[str, object]) -> None:
        job_id = str(letter["job_id"])
        self.sent.append((box, job_id))
        if self.broken and job_id not in self.broken:
            raise SiteUnavailable("The way is broken.", unsent=True)
        if self.silent:
            return
        if box == "setup" and is_errand(job_id):
            task = asyncio.create_task(self._run(job_id, letter))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        elif box == "setup":
            self.states[job_id] = "running"
        elif box == "status" and job_id not in self.deaf and not (is_errand(job_id) and job_id in self.states):
            self.say({"job_id": job_id, "status": self.states.get(job_id, "lost")})

    def say(self, document: object) -> None:
        self.letters_.put_nowait(document)
        self.copies_.put_nowait(document)

    async def _run(self, job_id: str, letter: Mapping[str, Any]) -> None:
        self.errands += 1
        self.states[job_id] = "running"
        await self.gate.wait()
        orders = json.loads(letter["remote_staging"]["setup"][1]["action"]["contents"])
        answer = json.dumps(messenger.Messenger(str(self.staging), self.room).run(orders))
        document = {
            "job_id": job_id,
            "status": "complete",
            "returncode": 0,
            "realized_dynamic_file_sources": [{"path": "result.json", "contents": answer}],
        }
        self.say({**document, **(self.ends or {})})

    async def letters(self) -> AsyncIterator[object]:
        while True:
            yield _good(await self.letters_.get())
            self.given += 1

    def copies(self) -> AsyncIterator[object] | None:
        return None if self.alone else self._copies()

    async def version(self) -> str:
        return "0.16.0"

    async def _copies(self) -> AsyncIterator[object]:
        while True:
            yield _good(await self.copies_.get())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def with_pulsar(
    test: Callable[[SmallPulsar, MailCarrier], Awaitable[None]], staging: Path, *, alone: bool = False, **options: Any
) -> None:
    async def main() -> None:
        post = SmallPulsar(staging, alone=alone)
        async with MailCarrier(post, **{"timeout": 60.0, "file_pause": 60.0, **options}) as carrier:
            await test(post, carrier)

    asyncio.run(main())


def progress_of(staging: Path, job_id: str, **fields: Any) -> bytes:
    (staging / job_id / "metadata").mkdir(parents=True, exist_ok=True)
    data = documents.dump(job.Progress(job_id=job_id, **fields))
    (staging / job_id / "metadata" / "progress.json").write_bytes(data)
    return data


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("alone", [False, True])
def test_all_who_ask_at_the_same_time_share_a_question(tmp_path: Path, alone: bool) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        answers = await asyncio.gather(*(carrier.status(f"t-{number % 3}") for number in range(30)))
        assert {each.state for each in answers if each is not None} == {"lost"}
        assert sorted(post.sent) == [("status", "t-0"), ("status", "t-1"), ("status", "t-2")]
        await carrier.status("t-0")
        assert len(post.sent) == 4

    with_pulsar(test, tmp_path, alone=alone)


def test_one_who_gives_up_asking_does_not_take_the_answer_from_the_others(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.silent = True
        first, second = asyncio.create_task(carrier.status("t-1")), asyncio.create_task(carrier.status("t-1"))
        await settled()
        first.cancel()
        await settled()
        post.say({"job_id": "t-1", "status": "queued"})
        answer = await second
        assert answer is not None
        assert answer.state == "queued"

    with_pulsar(test, tmp_path)


def test_an_answer_that_comes_twice_does_not_answer_the_next_question(tmp_path: Path) -> None:
    """The letter that all services share may be behind its copy by more than a launch."""

    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.silent = True
        question = asyncio.create_task(carrier.status("t-1"))
        await settled()
        post.copies_.put_nowait({"job_id": "t-1", "status": "lost"})
        assert (await question) is not None
        question = asyncio.create_task(carrier.status("t-1"))
        await settled()
        post.letters_.put_nowait({"job_id": "t-1", "status": "lost"})
        await settled()
        assert not question.done()
        post.copies_.put_nowait({"job_id": "t-1", "status": "running"})
        answer = await question
        assert answer is not None
        assert answer.state == "running"

    with_pulsar(test, tmp_path)


def test_a_question_that_pulsar_passes_over_has_no_answer(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.deaf = {"t-1", "t-3", "t-4"}
        answers = await asyncio.gather(*(carrier.status(each) for each in ("t-1", "t-2", "t-3", "t-4")))
        assert [each is None for each in answers] == [True, False, True, True]
        assert len(post.sent) == 5  # one question more for all who waited
        assert await carrier.status("t-1") is None
        assert len(post.sent) == 7

    with_pulsar(test, tmp_path, slow=0.2)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("mistake", [RuntimeError("what we did not think of"), Odd()])
def test_a_mistake_about_one_letter_makes_nobody_deaf(
    tmp_path: Path, alone: bool, mistake: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.say(mistake)
        post.states["a-1"] = "running"
        answer = await carrier.status("a-1")
        assert answer is not None
        post.say({"job_id": "a-1", "status": "complete", "returncode": 0})
        job_id, status = await anext(aiter(carrier.updates()))
        assert (job_id, status.state) == ("a-1", "complete")
        if isinstance(mistake, Odd):
            assert post.given >= 1, "the letter was given back to nobody"

    with_pulsar(test, tmp_path, alone=alone)
    assert "what we did not think of" in caplog.text


def test_a_check_is_a_question_and_tells_the_version(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        assert await carrier.check() == "0.16.0"
        assert [box for box, _ in post.sent] == ["status"]

    with_pulsar(test, tmp_path)


def test_a_later_question_that_cannot_be_sent_says_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    """None would say that Pulsar has the job; a submit would take that for its success."""

    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.deaf = post.broken = {"t-1"}
        with pytest.raises(SiteUnavailable, match="The way is broken"):
            await carrier.status("t-1")

    with_pulsar(test, tmp_path, slow=0.2)


def test_a_pulsar_that_is_silent_is_unavailable(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.silent = True
        with pytest.raises(SiteUnavailable, match="a small Pulsar did not answer in time"):
            await carrier.status("t-1")
        with pytest.raises(SiteUnavailable, match="did not run a small job"):
            await carrier.fetch("t-1", "progress.json", 99)

    with_pulsar(test, tmp_path, timeout=0.1)


def test_what_is_asked_for_at_the_same_time_shares_an_errand(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        data = {f"t-{number}": progress_of(tmp_path, f"t-{number}") for number in range(40)}
        post.gate.clear()
        first = asyncio.create_task(carrier.fetch("t-0", "progress.json", 999))
        await settled()
        assert post.errands == 1
        fetches = [carrier.fetch(each, "progress.json", 999) for each in data for _ in range(2)]
        put = carrier.put("t-1", ANSWER, JOBDIR, b"{}")
        others = asyncio.gather(*fetches, put, carrier.clean("t-99"))
        await settled()
        assert post.errands == 1
        post.gate.set()
        found = await others
        assert await first == data["t-0"]
        assert found[:-2] == [each for each in data.values() for _ in range(2)]
        assert post.errands == 2
        assert (tmp_path / "t-1" / "answer.json").read_text() == "{}"

    with_pulsar(test, tmp_path)


def test_one_who_gives_up_waiting_for_an_errand_harms_nobody(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        data = progress_of(tmp_path, "t-1")
        post.gate.clear()
        impatient = asyncio.create_task(carrier.fetch("t-1", "progress.json", 999))
        await settled()
        impatient.cancel()
        patient = asyncio.create_task(carrier.fetch("t-1", "progress.json", 998))
        await settled()
        post.gate.set()
        assert await patient == data

    with_pulsar(test, tmp_path)


def test_large_files_come_in_several_answers(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.room = 10
        data = {f"t-{number}": progress_of(tmp_path, f"t-{number}") for number in range(4)}
        found = await asyncio.gather(*(carrier.fetch(each, "progress.json", 999) for each in data))
        assert found == list(data.values())
        assert post.errands == 4

    with_pulsar(test, tmp_path)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({"status": "failed", "realized_dynamic_file_sources": []}, "could not launch"),
        ({"returncode": 127, "realized_dynamic_file_sources": []}, "no python3"),
        ({"returncode": 1, "realized_dynamic_file_sources": [], "job_stderr": "a\nSyntaxError: x\n"}, "SyntaxError: x"),
        ({"realized_dynamic_file_sources": [{"path": "result.json", "contents": "[]"}]}, "without an answer"),
        ({"status": "cancelled", "realized_dynamic_file_sources": None}, "without an answer"),
    ],
)
def test_an_errand_that_fails_is_no_answer(tmp_path: Path, ends: dict[str, Any], words: str) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.ends = ends
        with pytest.raises(SiteClosed if ends.get("returncode") == 127 else SiteUnavailable, match=words):
            await carrier.fetch("t-1", "progress.json", 99)
        post.ends = None
        assert await carrier.fetch("t-1", "progress.json", 99) is None

    with_pulsar(test, tmp_path)


def test_a_file_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        (tmp_path / "t-1").symlink_to("/")
        with pytest.raises(SiteUnavailable, match="the job's directory is a link"):
            await carrier.put("t-1", ANSWER, JOBDIR, b"{}")

    with_pulsar(test, tmp_path)


@pytest.mark.parametrize("alone", [False, True])
def test_a_letter_is_kept_until_the_next_update_is_asked_for(tmp_path: Path, alone: bool) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        for state in ("running", "lost", "complete", "failed"):  # what is no news is given back to nobody at once
            post.say({"job_id": "t-1", "status": state})
        updates = carrier.updates()
        job_id, status = await anext(updates)
        assert (job_id, status.state) == ("t-1", "complete")
        await settled()
        assert post.given == 2
        assert (await anext(updates))[1].state == "failed"
        await settled()
        assert post.given == 3

    with_pulsar(test, tmp_path, alone=alone)


def test_an_update_that_nobody_takes_does_not_keep_an_errand_waiting(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        post.say({"job_id": "t-1", "status": "complete"})
        await settled()
        assert await carrier.fetch("t-1", "progress.json", 99) is None

    with_pulsar(test, tmp_path)


def test_the_directories_of_errands_go_with_the_next_one(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        other = tmp_path / ("tes-errand-" + "0" * 32)  # of a service that has died
        other.mkdir()
        post.say({"job_id": other.name, "status": "complete"})
        await settled()
        for _ in range(3):
            await carrier.fetch("t-1", "progress.json", 99)
        assert not other.exists()
        assert len(carrier._spent) <= 1

    with_pulsar(test, tmp_path)


def test_whoever_waits_when_the_carrier_closes_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        post = SmallPulsar(tmp_path)
        post.gate.clear()
        async with MailCarrier(post) as carrier:
            waiting = [
                asyncio.create_task(carrier.fetch("t-1", "progress.json", 99)),
                asyncio.create_task(carrier.status("t-2")),
            ]
            post.deaf.add("t-2")
            await settled()
            waiting.append(asyncio.create_task(carrier.clean("t-3")))
            await settled()
        for each in waiting:
            with pytest.raises(SiteUnavailable, match="not in use any more"):
                await each

    asyncio.run(main())


def test_words_of_strangers_are_short() -> None:
    assert len(mail._words("x" * 10_000_000)) <= 100
    assert mail._words("\x1b[31m\n" * 50).isprintable()


# The site by mail


def test_a_look_at_a_running_job_fetches_its_progress_rarely(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        await carrier.launch(Launch("t-1", "true", ()))
        progress_of(tmp_path, "t-1", phase="running", started=NOW, beat=1)
        for _ in range(10):
            (seen,) = await site.observe(["t-1"])
            assert seen.phase is Phase.RUNNING
            assert seen.progress is not None
            assert seen.progress.started == NOW
        assert post.errands == 1
        assert sum(box == "status" for box, _ in post.sent) >= 10

    with_pulsar(test, tmp_path)


def test_a_look_does_not_wait_long_for_an_errand_nor_does_its_failure_hide_that_the_job_runs(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        await carrier.launch(Launch("t-1", "true", ()))
        progress_of(tmp_path, "t-1", phase="running", started=NOW, beat=1)
        post.gate.clear()
        (seen,) = await site.observe(["t-1"])
        assert (seen.phase, seen.progress) == (Phase.RUNNING, None)
        post.gate.set()
        await asyncio.gather(*site._looking.values())
        (seen,) = await site.observe(["t-1"])
        assert seen.progress is not None

    with_pulsar(test, tmp_path, timeout=2.0)


def test_a_job_on_the_way_is_not_taken_for_gone(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        await site.submit(job.Plan(job_id="t-1", task_id="t", executors=[]))
        del post.states["t-1"]  # Pulsar's other threads have not come to it yet
        (seen,) = await site.observe(["t-1"])
        assert (seen.phase, seen.progress) == (Phase.RUNNING, None)
        post.states["t-1"] = "running"
        await site.observe(["t-1"])
        del post.states["t-1"]
        (seen,) = await site.observe(["t-1"])
        assert seen.phase is Phase.UNKNOWN

    with_pulsar(test, tmp_path)


def test_a_cancel_does_not_remove_a_job_that_another_process_has_just_sent(tmp_path: Path) -> None:
    """Pulsar would call it running for ever."""

    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        cancel = asyncio.create_task(site.cancel("t-1"))
        while not post.given:  # Pulsar does not know it
            await asyncio.sleep(0)
        progress_of(tmp_path, "t-1")
        await post.send("setup", {"job_id": "t-1"})
        await cancel
        assert json.loads((tmp_path / "t-1" / ANSWER).read_text())["cancel"] is True
        assert (tmp_path / "t-1" / "metadata").is_dir()

    with_pulsar(test, tmp_path)


def test_whether_a_job_had_begun_is_not_judged_by_an_old_look(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        await carrier.launch(Launch("t-1", "true", ()))
        progress_of(tmp_path, "t-1")
        (seen,) = await site.observe(["t-1"])
        assert seen.progress is not None
        assert seen.progress.phase == "waiting"
        progress_of(tmp_path, "t-1", phase="running", started=NOW, beat=1)
        updates = site.updates()
        post.say({"job_id": "t-1", "status": "complete", "returncode": 1})
        seen = await anext(updates)
        assert (seen.phase, seen.exit_code) == (Phase.ENDED, None)
        await updates.aclose()  # type: ignore[attr-defined]

    with_pulsar(test, tmp_path)


def test_a_job_that_waits_for_ever_by_pulsars_word_is_looked_at(tmp_path: Path) -> None:
    """A Pulsar that could not take it up again after its own death says so of a job that runs, or has ended."""

    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        post.states["t-1"] = "queued"
        progress_of(tmp_path, "t-1", phase="running", started=NOW, beat=1)
        (seen,) = await site.observe(["t-1"])
        assert (seen.phase, post.errands) == (Phase.WAITING, 0)
        site._waiting_since["t-1"] -= 1000
        (seen,) = await site.observe(["t-1"])
        assert (seen.phase, post.errands) == (Phase.RUNNING, 1)

    with_pulsar(test, tmp_path)


@pytest.mark.parametrize("batch", [False, True])
def test_a_launch_without_an_end_is_no_sign_of_life(tmp_path: Path, batch: bool) -> None:
    """A Pulsar that was killed while it launched the job calls it queued ever after. A batch system's queue is long."""

    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x", batch=batch), carrier, standin.bundle())
        post.states["t-1"] = "queued"
        progress_of(tmp_path, "t-1")
        (seen,) = await site.observe(["t-1"])
        site._waiting_since["t-1"] -= 1000
        for _ in range(2):  # a look at the files, however often, is no news of the job
            (seen,) = await site.observe(["t-1"])
            assert (seen.phase, post.errands) == (Phase.WAITING, 1)
        site._pulses["t-1"].since -= 1000
        if batch:
            site._waiting_since["t-1"] = site._seen["t-1"].at - 1000
            site.freshen(["t-1"])
        (seen,) = await site.observe(["t-1"])
        assert seen.phase is (Phase.WAITING if batch else Phase.RUNNING)
        if batch:
            assert post.errands == 2, "one for the progress, none for a result"
            (seen,) = await site.observe(["t-1"])
            assert (seen.phase, post.errands) == (Phase.WAITING, 2), "not each time"

    with_pulsar(test, tmp_path)


def test_a_delivery_goes_on_when_a_submit_gives_up(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        post.gate.clear()
        first = asyncio.create_task(site.submit(job.Plan(job_id="t-1", task_id="t", executors=[])))
        await settled()
        first.cancel()
        second = asyncio.create_task(site.submit(job.Plan(job_id="t-2", task_id="t", executors=[])))
        await settled()
        assert post.errands == 1
        post.gate.set()
        await second
        assert post.errands == 1
        assert post.states["t-2"] == "running"
        assert "t-1" not in post.states

    with_pulsar(test, tmp_path)


def test_a_delivery_that_fails_when_nobody_waits_any_more_is_no_news(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        unheard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        post.gate.clear()
        post.ends = {"status": "failed", "realized_dynamic_file_sources": None}
        submit = asyncio.create_task(site.submit(job.Plan(job_id="t-1", task_id="t", executors=[])))
        await settled()
        submit.cancel()
        await settled()
        post.gate.set()
        while any("deliver" in str(each.get_coro()) for each in asyncio.all_tasks()):
            await asyncio.sleep(0)
        gc.collect()
        await settled()
        assert (post.errands, unheard) == (1, [])

    with_pulsar(test, tmp_path)


def test_a_kill_goes_out_also_where_no_errand_runs(tmp_path: Path) -> None:
    """A batch system may be too full for an errand."""

    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        post.states["t-1"] = "running"
        post.gate.clear()
        with pytest.raises(SiteUnavailable):
            await site.cancel("t-1", force=True)
        assert ("kill", "t-1") in post.sent

    with_pulsar(test, tmp_path, timeout=2.0)


def test_an_end_without_a_result_is_looked_up_beside_the_other_news(tmp_path: Path) -> None:
    async def test(post: SmallPulsar, carrier: MailCarrier) -> None:
        site = PulsarSite(SiteFacts(name="x"), carrier, standin.bundle())
        post.gate.clear()
        result = job.Result(job_id="t-2", state="COMPLETE", start_time=NOW, end_time=NOW)
        text = documents.dump(result).decode("ascii")
        progress_of(tmp_path, "t-1", phase="running", started=NOW)
        post.say({"job_id": "t-1", "status": "complete", "returncode": 137})
        dynamic = [{"path": "result.json", "contents": text}]
        post.say({"job_id": "t-2", "status": "complete", "returncode": 0, "realized_dynamic_file_sources": dynamic})
        updates = site.updates()
        first = await anext(updates)
        assert (first.job_id, first.result) == ("t-2", result)
        post.gate.set()
        second = await anext(updates)
        assert (second.job_id, second.phase, second.result) == ("t-1", Phase.ENDED, None)
        await updates.aclose()  # type: ignore[attr-defined]

    with_pulsar(test, tmp_path)
