"""What every site must do, whatever is behind it."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tesp_api.api.relay import SETTLE
from tesp_api.errors import SiteUnavailable
from tesp_api.runner.job import EXIT_BAD_PLAN, Input, Progress
from tesp_api.sites import Site, SiteFacts, documents
from tesp_api.sites.local import LocalSite
from tesp_api.sites.pulsar.amqp import AmqpPost
from tesp_api.sites.pulsar.embedded import EmbeddedPulsar, EmbeddedSite
from tesp_api.sites.pulsar.mail import MailCarrier
from tesp_api.sites.pulsar.relay import RelayPost
from tesp_api.sites.pulsar.rest import RestCarrier
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Observation, Phase
from tests import standin
from tests.pulsars import PulsarMain, PulsarServer, ended, exists, forgotten, new_plan, phase, running, until
from tests.rabbitmq import Broker, need_rabbitmq
from tests.relays import MANAGER, relay_app, relay_pulsar, served
from tests.support import no_more_descriptors, require

FACTS = SiteFacts(name="here")


class Place:
    """One kind of site: `open` makes a further service's view of the same place, `jobs` is where its jobs lie."""

    def __init__(self, open_site: Callable[[], Site], jobs: Path) -> None:
        self.open, self.jobs = open_site, jobs


@pytest.fixture(scope="module")
def pulsar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PulsarServer]:
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
    server = PulsarServer(tmp_path_factory.mktemp("pulsar"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def behind_a_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, PulsarMain]]:
    need_rabbitmq()
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
    broker = Broker(tmp_path_factory.mktemp("broker"))
    pulsar = PulsarMain(tmp_path_factory.mktemp("pulsar-main"), "amqp/app.yml", AMQP_URL=f"{broker.url}/")
    try:
        broker.start()
        pulsar.start()
        yield broker, pulsar
    finally:
        pulsar.kill()
        broker.remove()


class OwnStore(RelayPost):
    """A Post like that of another process than the relay's: with a store of its own on the same file."""

    def __init__(self, file: Path) -> None:
        self._store = SqliteStore(file)
        super().__init__(self._store.mail, MANAGER, look_every=0.02)

    async def __aenter__(self) -> Self:
        await self._store.__aenter__()
        return await super().__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await super().__aexit__(*error)
        await self._store.__aexit__(*error)


@pytest.fixture(scope="module")
def at_the_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PulsarMain]]:
    """The file of a relay's letters, and the Pulsar that calls it."""
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
    file = tmp_path_factory.mktemp("relay") / "tasks.sqlite"
    stack = AsyncExitStack()

    async def open_relay() -> str:
        store = await stack.enter_async_context(SqliteStore(file))
        return await stack.enter_async_context(served(relay_app(store.mail, settle=SETTLE, look_every=0.02)))

    with event_loop_in_a_thread() as loop:
        url = asyncio.run_coroutine_threadsafe(open_relay(), loop).result()
        pulsar = relay_pulsar(tmp_path_factory.mktemp("pulsar-main"), url)
        try:
            pulsar.start()
            yield file, pulsar
        finally:
            pulsar.kill()
            asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result()


@contextmanager
def event_loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def embedded_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of an embedded Pulsar that another service keeps running meanwhile."""
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
    directory = tmp_path_factory.mktemp("embedded")
    with event_loop_in_a_thread() as loop:
        owner = EmbeddedPulsar(directory)
        asyncio.run_coroutine_threadsafe(owner.__aenter__(), loop).result()
        asyncio.run_coroutine_threadsafe(owner.ready(60), loop).result()
        yield directory
        asyncio.run_coroutine_threadsafe(owner.__aexit__(None, None, None), loop).result()


PULSARS = [pytest.param(name, marks=pytest.mark.service) for name in ("rest", "amqp", "relay", "embedded")]


@pytest.fixture(params=["local", *PULSARS])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    runner = standin.bundle()
    if request.param == "local":
        return Place(lambda: LocalSite(FACTS, tmp_path / "jobs", runner), tmp_path / "jobs")
    if request.param == "rest":
        server: PulsarServer = request.getfixturevalue("pulsar")
        carrier: Callable[[], Any] = lambda: RestCarrier(server.url, private_token=server.token)  # noqa: E731
        return Place(lambda: PulsarSite(FACTS, carrier(), runner), server.staging)
    if request.param == "amqp":
        broker, pulsar = request.getfixturevalue("behind_a_broker")

        def behind() -> Site:
            return PulsarSite(FACTS, MailCarrier(AmqpPost(broker.url), timeout=60, file_pause=0.5), runner)

        return Place(behind, pulsar.staging)
    if request.param == "relay":
        file, pulsar = request.getfixturevalue("at_the_relay")

        def at() -> Site:
            return PulsarSite(FACTS, MailCarrier(OwnStore(file), timeout=60, file_pause=0.5), runner)

        return Place(at, pulsar.staging)
    directory: Path = request.getfixturevalue("embedded_directory")
    return Place(lambda: EmbeddedSite(FACTS, directory, runner), directory / "staging")


def on(test: Callable[[Place, Site], Any]) -> Callable[[Place], None]:
    """Run an async test with one open site."""

    def run(place: Place) -> None:
        async def main() -> None:
            async with place.open() as site:
                await test(place, site)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@asynccontextmanager
async def sites(place: Place, count: int) -> AsyncIterator[list[Site]]:
    opened = [place.open() for _ in range(count)]
    for site in opened:
        await site.__aenter__()
    yield opened
    for site in opened:
        await site.__aexit__(None, None, None)


@on
async def test_a_site_can_be_asked_how_it_is(place: Place, site: Site) -> None:
    before = set(place.jobs.glob("*"))
    assert isinstance(await site.check(), str)
    assert set(place.jobs.glob("*")) <= before, "to ask leaves nothing behind"


@on
async def test_a_job_runs_and_leaves_its_result(place: Place, site: Site) -> None:
    plan = new_plan("sh", "-c", "echo out; echo err >&2; exit 3")
    await site.submit(plan)
    seen = await ended(site, plan.job_id)
    assert seen.phase is Phase.ENDED
    assert seen.result is not None
    assert seen.result.state == "EXECUTOR_ERROR"
    assert [(each.exit_code, each.stdout, each.stderr) for each in seen.result.executors] == [(3, "out\n", "err\n")]
    await forgotten(site, plan.job_id)
    assert not (place.jobs / plan.job_id).exists()
    assert (await site.observe([plan.job_id]))[0].phase is Phase.UNKNOWN


@on
async def test_a_running_job_shows_its_progress(place: Place, site: Site) -> None:
    plan = new_plan("sleep", "60")
    await site.submit(plan)
    seen = await running(site, plan.job_id)
    assert seen.phase is Phase.RUNNING
    assert seen.progress is not None
    assert seen.progress.started == "2026-01-31T12:00:00.000000Z"

    async def later() -> bool:
        (again,) = await site.observe([plan.job_id])
        return again.progress is not None and again.progress.beat > seen.progress.beat  # type: ignore[union-attr]

    await until(later, "the next beat")
    assert await site.forget(plan.job_id, force=True)


@on
async def test_an_unknown_job_is_unknown_and_no_error(place: Place, site: Site) -> None:
    (seen,) = await site.observe(["nobody-1"])
    assert seen.phase is Phase.UNKNOWN
    await site.cancel("nobody-1")
    await site.cancel("nobody-1", force=True)
    assert await site.forget("nobody-1")
    assert await site.forget("nobody-1", force=True)
    assert not (place.jobs / "nobody-1").exists()


@on
async def test_observing_nothing_is_no_error(place: Place, site: Site) -> None:
    assert list(await site.observe([])) == []


@on
async def test_submitting_again_runs_nothing_again(place: Place, site: Site) -> None:
    witness = place.jobs.parent / f"witness-{id(site)}"
    plan = new_plan("sh", "-c", f"echo once >> {witness}; sleep 0.2")
    await site.submit(plan)
    await site.submit(plan)
    await exists(witness)
    await site.submit(plan)
    await ended(site, plan.job_id)
    await site.submit(plan)
    await ended(site, plan.job_id)
    async with place.open() as other:
        await other.submit(plan)
        await ended(other, plan.job_id)
    assert witness.read_text() == "once\n"


def test_four_services_that_submit_at_once_run_it_once(place: Place) -> None:
    async def main() -> None:
        witness = place.jobs.parent / "witness-of-four"
        witness.unlink(missing_ok=True)
        plan = new_plan("sh", "-c", f"echo once >> {witness}; sleep 0.5")
        async with sites(place, 4) as four:
            await four[0].submit(new_plan())  # the runner is there
            await asyncio.gather(*(each.submit(plan) for each in four), *(each.submit(plan) for each in four))
            seen = await ended(four[3], plan.job_id)
            assert seen.result is not None
            assert seen.result.state == "COMPLETE"
        assert witness.read_text() == "once\n"

    asyncio.run(main())


@on
async def test_the_losers_of_a_race_do_not_end_the_job(place: Place, site: Site) -> None:
    plan = new_plan("sleep", "0.5")
    await site.submit(plan)
    while True:
        (seen,) = await site.observe([plan.job_id])
        if seen.result is not None:
            return
        assert seen.phase in (Phase.WAITING, Phase.RUNNING)


@on
async def test_cancel_stops_a_running_job_which_leaves_a_result(place: Place, site: Site) -> None:
    plan = new_plan("sleep", "60")
    await site.submit(plan)
    await running(site, plan.job_id)
    await site.cancel(plan.job_id)
    await site.cancel(plan.job_id)
    seen = await ended(site, plan.job_id)
    assert seen.result is not None
    assert seen.result.state == "CANCELED"


@on
async def test_cancel_during_the_submit_stops_the_job_before_its_first_executor(place: Place, site: Site) -> None:
    witness = place.jobs.parent / f"never-{id(site)}"
    plan = new_plan("sh", "-c", f"sleep 5; echo ran >> {witness}")
    submit = asyncio.create_task(site.submit(plan))
    await asyncio.sleep(0)
    await submit
    await site.cancel(plan.job_id)
    seen = await ended(site, plan.job_id)
    assert seen.result is not None
    assert seen.result.state == "CANCELED"
    assert not witness.exists()


@on
async def test_cancel_after_the_end_changes_nothing(place: Place, site: Site) -> None:
    plan = new_plan()
    await site.submit(plan)
    await ended(site, plan.job_id)
    await site.cancel(plan.job_id)
    await site.cancel(plan.job_id, force=True)
    seen = await ended(site, plan.job_id)
    assert seen.result is not None
    assert seen.result.state == "COMPLETE"


@on
async def test_force_kills_a_job_that_does_not_listen(place: Place, site: Site) -> None:
    plan = new_plan("sh", "-c", "sleep 60", wishes="deaf")
    await site.submit(plan)
    await running(site, plan.job_id)
    await site.cancel(plan.job_id, force=True)
    seen = await ended(site, plan.job_id)  # what outlived the runner wrote it
    assert seen.result is not None
    assert seen.result.state == "CANCELED"
    await forgotten(site, plan.job_id)


@on
async def test_force_kills_a_job_without_a_trace(place: Place, site: Site) -> None:
    plan = new_plan("sleep", "60", wishes="deaf.silent")
    await site.submit(plan)
    await running(site, plan.job_id)
    await site.cancel(plan.job_id, force=True)
    seen = await phase(site, plan.job_id, Phase.ENDED)
    assert seen.result is None
    assert seen.exit_code not in (1, 2, 76, 77, 78, 127)


@on
async def test_a_running_job_is_forgotten_only_by_force(place: Place, site: Site) -> None:
    plan = new_plan("sleep", "60")
    await site.submit(plan)
    await running(site, plan.job_id)
    assert not await site.forget(plan.job_id)
    await running(site, plan.job_id)

    async def gone() -> bool:
        return await site.forget(plan.job_id, force=True) and not (place.jobs / plan.job_id).exists()

    await until(gone, "the directory gone")
    assert (await site.observe([plan.job_id]))[0].phase is Phase.UNKNOWN


@on
async def test_a_job_that_cannot_be_looked_at_runs_on(place: Place, site: Site) -> None:
    """For want of file descriptors, say."""
    if not isinstance(site, LocalSite | EmbeddedSite):
        return  # its files are elsewhere
    plan = new_plan("sleep", "60")
    await site.submit(plan)
    await running(site, plan.job_id)
    with no_more_descriptors():
        with suppress(SiteUnavailable):
            (seen,) = await site.observe([plan.job_id])
            assert seen.phase is Phase.RUNNING
        with suppress(SiteUnavailable):
            assert not await site.forget(plan.job_id)
        if isinstance(site, LocalSite):
            with pytest.raises(SiteUnavailable):
                await site.cancel(plan.job_id, force=True)
            with pytest.raises(SiteUnavailable):
                await site.forget(plan.job_id, force=True)
    await running(site, plan.job_id)
    assert await site.forget(plan.job_id, force=True)


@on
async def test_how_a_job_ended_is_told_when_it_can_be_seen(place: Place, site: Site) -> None:
    if not isinstance(site, LocalSite):
        return
    plan = new_plan(wishes="dies")
    await site.submit(plan)
    await phase(site, plan.job_id, Phase.ENDED)
    async with place.open() as other:
        with no_more_descriptors():
            (seen,) = await other.observe([plan.job_id])
            assert (seen.phase, seen.exit_code) == (Phase.RUNNING, None)
            with pytest.raises(SiteUnavailable):
                await other.forget(plan.job_id)
        (seen,) = await other.observe([plan.job_id])
        assert (seen.phase, seen.exit_code) == (Phase.ENDED, EXIT_BAD_PLAN)
    await forgotten(site, plan.job_id)
    assert not (place.jobs / plan.job_id).exists()


@on
async def test_a_forgotten_job_is_watched_no_more(place: Place, site: Site) -> None:
    if not isinstance(site, LocalSite | EmbeddedSite):
        return  # told of its jobs by others
    told: list[Observation] = []

    async def listen() -> None:
        async for seen in site.updates():
            told.append(seen)

    plan, last = new_plan(wishes="silent.dies"), new_plan()
    await site.submit(plan)
    await phase(site, plan.job_id, Phase.ENDED)
    await forgotten(site, plan.job_id)
    metadata = place.jobs / plan.job_id / "metadata"
    metadata.mkdir(parents=True)
    (metadata / "progress.json").write_bytes(documents.dump(Progress(job_id=plan.job_id, phase="running", beat=1)))
    await site.submit(last)
    listening = asyncio.create_task(listen())

    async def heard() -> bool:
        return any(seen.job_id == last.job_id for seen in told)

    await until(heard, "what the other job does")
    assert plan.job_id not in {seen.job_id for seen in told}
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    shutil.rmtree(metadata.parent)
    await ended(site, last.job_id)
    await forgotten(site, last.job_id)


@on
async def test_directories_without_write_permission_are_removed(place: Place, site: Site) -> None:
    plan = new_plan()
    await site.submit(plan)
    await ended(site, plan.job_id)
    if isinstance(site, LocalSite):  # a Pulsar removes what it can; that is its own business
        closed = place.jobs / plan.job_id / "tes" / "a" / "b"
        closed.mkdir(parents=True)
        (closed / "file").touch()
        closed.chmod(stat.S_IRUSR)
        closed.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    await forgotten(site, plan.job_id)
    assert not (place.jobs / plan.job_id).exists()


@on
async def test_garbage_from_the_node_is_no_document_and_no_error(place: Place, site: Site) -> None:
    bad, good = new_plan(wishes="garbage"), new_plan()
    await asyncio.gather(site.submit(bad), site.submit(good))
    await ended(site, good.job_id)

    async def look() -> bool:
        seen = {each.job_id: each for each in await site.observe([bad.job_id, good.job_id])}
        assert seen[good.job_id].result is not None
        assert seen[bad.job_id].result is None
        assert seen[bad.job_id].progress is None or seen[bad.job_id].progress.phase == "waiting"
        return seen[bad.job_id].phase is Phase.ENDED

    await until(look, "the end of the bad job")


@on
async def test_a_job_without_a_result_ends(place: Place, site: Site) -> None:
    plan = new_plan(wishes="silent")
    await site.submit(plan)
    seen = await phase(site, plan.job_id, Phase.ENDED)
    assert seen.result is None


@on
async def test_exit_codes_that_say_nothing_was_started_are_told(place: Place, site: Site) -> None:
    plan = new_plan(wishes="dies")
    await site.submit(plan)

    async def look() -> bool:
        (seen,) = await site.observe([plan.job_id])
        return seen.phase is Phase.ENDED and seen.exit_code == EXIT_BAD_PLAN

    await until(look, "the exit code")


@on
async def test_exit_codes_of_a_runner_that_had_begun_are_not_believed(place: Place, site: Site) -> None:
    plan = new_plan(wishes="crash")
    await site.submit(plan)
    seen = await phase(site, plan.job_id, Phase.ENDED)
    assert (seen.result, seen.exit_code) == (None, None)


@on
async def test_bytes_that_are_no_text_do_not_hide_the_result(place: Place, site: Site) -> None:
    plan = new_plan(wishes="noise")
    await site.submit(plan)
    await ended(site, plan.job_id)
    await forgotten(site, plan.job_id)


@on
async def test_a_long_plan_arrives(place: Place, site: Site) -> None:
    plan = new_plan(inputs=[Input(path="/in", content="x é" * 350_000)])
    await site.submit(plan)
    await ended(site, plan.job_id)
    assert (place.jobs / plan.job_id / "inputs" / "job.json").stat().st_size > 1024 * 1024


@on
async def test_an_answer_written_before_a_set_up_stays(place: Place, site: Site) -> None:
    """A submit repeated after its cancel must not lose the cancel."""
    plan = new_plan("sleep", "60")
    await site.submit(plan)
    await site.cancel(plan.job_id)
    await site.submit(plan)
    seen = await ended(site, plan.job_id)
    assert seen.result is not None
    assert seen.result.state == "CANCELED"


@on
async def test_thirty_jobs_at_once(place: Place, site: Site) -> None:
    plans = [new_plan("echo", str(number)) for number in range(30)]
    await asyncio.gather(*(site.submit(each) for each in plans))
    ids = {each.job_id: number for number, each in enumerate(plans)}
    done: dict[str, str] = {}

    async def look() -> bool:
        for seen in await site.observe([each for each in ids if each not in done]):
            if seen.result is not None:
                done[seen.job_id] = seen.result.executors[0].stdout
        return len(done) == len(ids)

    await until(look, "all results", within=60)
    assert done == {job_id: f"{number}\n" for job_id, number in ids.items()}
    await asyncio.gather(*(forgotten(site, each) for each in ids))
    assert not any((place.jobs / each).exists() for each in ids)


@pytest.mark.parametrize("place", PULSARS, indirect=True)
def test_a_launch_that_was_cut_off_is_no_sign_of_life(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pulsar that was killed in the middle of a launch, before the process began, calls the job queued ever after."""
    job_id = new_plan().job_id
    directory = place.jobs / job_id
    for name in ("configs", "inputs", "metadata", "outputs", "tool_files", "working"):
        (directory / name).mkdir(parents=True)
    for name, text in {"tool_id": '""', "tool_version": '""', "preprocessed": "true", "submitted": '"true"'}.items():
        (directory / name).write_text(text)
    (directory / "metadata" / "progress.json").write_bytes(documents.dump(Progress(job_id)))

    async def main() -> None:
        async with place.open() as site:
            for _ in range(2):
                (seen,) = await site.observe([job_id])
                assert seen.phase is Phase.WAITING, "it may be about to begin"
            monkeypatch.setattr("tesp_api.sites.pulsar.site.STILL", -1000.0)
            await phase(site, job_id, Phase.RUNNING)
            (seen,) = await site.observe([job_id])
            assert (seen.phase, seen.result) == (Phase.RUNNING, None)
            assert seen.progress is not None
            assert seen.progress.beat == 0
            await site.cancel(job_id, force=True)
            await phase(site, job_id, Phase.ENDED, Phase.UNKNOWN)
            await until(lambda: site.forget(job_id, force=True), "nothing is left")
            assert not directory.exists()

    asyncio.run(main())


def test_jobs_outlive_the_service(place: Place) -> None:
    async def first(job: Any) -> None:
        async with place.open() as site:
            await site.submit(job)
            await running(site, job.job_id)

    async def second(job: Any, release: Path) -> None:
        async with place.open() as site:
            await running(site, job.job_id)
            assert not await site.forget(job.job_id)
            release.touch()
            seen = await ended(site, job.job_id)
            assert seen.result is not None
            assert seen.result.state == "COMPLETE"

    release = place.jobs.parent / "release"
    release.unlink(missing_ok=True)
    plan = new_plan("sh", "-c", f"while [ ! -e {release} ]; do sleep 0.02; done")
    asyncio.run(first(plan))
    asyncio.run(second(plan, release))


@on
async def test_updates_end_with_the_site(place: Place, site: Site) -> None:
    updates = asyncio.create_task(anext(aiter(site.updates())))
    await asyncio.sleep(0)
    updates.cancel()
    await asyncio.gather(updates, return_exceptions=True)
