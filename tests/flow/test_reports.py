"""Jobs that report over HTTP: the real runner, a real server on a socket, and a site that tells us nothing.

What is seen here of a job came by its reports, and it heard of a cancel by their answers: the site is deaf and dumb
once it has a job, and nobody looks again for minutes.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from tesp_api import lifecycle
from tesp_api.api import problems
from tesp_api.api.jobs import PATH, Jobs
from tesp_api.api.routes import Methods
from tesp_api.app import Service, create_app
from tesp_api.dispatch.dispatcher import Dispatcher
from tesp_api.dispatch.health import Health
from tesp_api.dispatch.inspector import Inspector
from tesp_api.dispatch.keeper import Keeper
from tesp_api.dispatch.poller import Poller
from tesp_api.lifecycle import Policy
from tesp_api.record import record
from tesp_api.runner import job
from tesp_api.runner.bundle import build
from tesp_api.settings import load
from tesp_api.sites import Site, SiteFacts, documents
from tesp_api.sites.local import LocalSite
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import MANY, Observation, Phase, Task, rfc3339, task_of, token_hash
from tesp_api.tes import TesState, TesView
from tests.builders import NOW, client_of, make_attempt, make_task, run
from tests.doubles import down

FINAL = {"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"}
GUARD = 120.0
"""Seconds after which a wait has failed; nothing here is timed."""

POLICY = Policy(patience=3000.0, poll_interval=500.0, first_look=300.0)


class Mute(LocalSite):
    """The local site, of which nothing is seen: its jobs run, and no news of them comes back by itself.

    `blind`: a look shows nothing either, and a cancel does not arrive.
    """

    blind = True

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        if self.blind:
            return [Observation(job_id=job_id, phase=Phase.RUNNING) for job_id in job_ids]
        return await super().observe(job_ids)

    async def updates(self) -> AsyncIterator[Observation]:
        for each in ():
            yield each

    async def cancel(self, job_id: str, *, force: bool = False) -> None:
        if self.blind:
            raise down("cancel", job_id)
        await super().cancel(job_id, force=force)


class World:
    """A data directory and an address; services on them come and go."""

    def __init__(self, directory: Path, site: type[LocalSite] = Mute) -> None:
        self.directory = directory
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.report_url = self.url + PATH
        self.site_class = site
        self.http = httpx.AsyncClient(base_url=self.url, timeout=GUARD)

    @asynccontextmanager
    async def service(self) -> AsyncIterator[Service]:
        """A service on the address; it is stopped as its operator would."""
        facts = SiteFacts(
            name="here",
            runtime=job.Runtime("host"),
            file_roots=(job.FileRoot(str(self.directory)),),
            report_url=self.report_url,
        )
        store = SqliteStore(self.directory / "tasks.sqlite")
        sites: dict[str, Site] = {"here": self.site_class(facts, self.directory / "site", build())}
        policies = {"here": POLICY}
        dispatcher = Dispatcher(store, sites, policies)
        poller = Poller(store, sites, policies, dispatcher.submit)
        service = Service(
            store,
            store.mail,
            sites,
            dispatcher,
            poller,
            Keeper(store),
            policies,
            Inspector(store, sites, Health(sites)),
        )
        app = create_app(load(environ={}, overrides={"server.data_dir": self.directory}), service)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=int(GUARD)))
        serving = asyncio.create_task(server.serve(sockets=[self.socket.dup()]))
        try:
            await until(lambda: server.started)
            yield service
        finally:
            signal.raise_signal(signal.SIGTERM)
            with suppress(asyncio.CancelledError):
                await serving

    async def post(self, script: str) -> str:
        executors = [{"image": "none", "command": ["sh", "-c", script]}]
        answer = await self.http.post("/v1/tasks", json={"executors": executors})
        assert answer.status_code == 200, answer.text
        task_id: str = answer.json()["id"]
        return task_id

    async def get(self, task_id: str, view: str = "FULL") -> dict[str, Any]:
        document: dict[str, Any] = (await self.http.get(f"/v1/tasks/{task_id}", params={"view": view})).json()
        return document

    async def state(self, task_id: str, *wanted: str) -> dict[str, Any]:
        """The task, once it is in one of these states."""
        return await self.see(task_id, lambda task: task["state"] in wanted)

    async def see(self, task_id: str, good: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The task, once it is as wished."""
        task: dict[str, Any] = {}
        async with asyncio.timeout(GUARD):
            while not good(task := await self.get(task_id)):
                await asyncio.sleep(0.02)
        return task

    def token(self, task_id: str) -> str:
        plan = json.loads((self.directory / "site" / f"{task_id}-1" / "inputs" / "job.json").read_text("ascii"))
        token: str = plan["report"]["token"]
        return token

    async def report(self, job_id: str, token: str, content: Any = b"{}") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return await self.http.post(f"{PATH}/{job_id}", content=content, headers=headers)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(GUARD):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def no_exit() -> Iterator[None]:
    """The servers here end by the signal that ends a server, which they hand on when they are done."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


def on(
    site: type[LocalSite] = Mute,
) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], Callable[[Path], None]]:
    """Run an async test in a world of its own, a service not yet started."""

    def decorate(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
        def run_it(tmp_path: Path) -> None:
            async def main() -> None:
                world = World(tmp_path, site)
                try:
                    async with world.http:
                        await test(world)
                finally:
                    world.socket.close()

            asyncio.run(main())

        run_it.__name__, run_it.__doc__ = test.__name__, test.__doc__
        return run_it

    return decorate


# All that matters, by reports alone


@on()
async def test_the_whole_life_of_a_task_is_told_by_its_reports(world: World) -> None:
    async with world.service():
        go = world.directory / "go"
        task_id = await world.post(f"echo begun; echo oops >&2; while [ ! -e {go} ]; do sleep 0.05; done; echo done")
        task = await world.see(task_id, lambda task: "stdout_tail" in str(task))
        assert task["state"] == "RUNNING"
        told = task["logs"][0]["metadata"]
        assert told["executor"] == "0"
        task = await world.see(task_id, lambda task: task["logs"][0]["metadata"].get("stderr_tail"))
        told = task["logs"][0]["metadata"]
        assert (told["stdout_tail"], told["stdout_bytes"]) == ("begun\n", "6")
        assert (told["stderr_tail"], told["stderr_bytes"]) == ("oops\n", "5")
        assert task["logs"][0]["logs"] == []
        token = world.token(task_id).encode()
        assert not any(token in each.read_bytes() for each in world.directory.glob("tasks.sqlite*"))
        go.touch()
        task = await world.state(task_id, *FINAL)
        assert task["state"] == "COMPLETE", task
        (log,) = task["logs"]
        assert log["logs"][0]["stdout"] == "begun\ndone\n"
        assert not any("tail" in name for name in log["metadata"])
        assert "tokens" not in str(task)


@on()
async def test_a_cancel_reaches_the_job_by_the_answer_to_its_question(world: World) -> None:
    async with world.service():
        task_id = await world.post("sleep 1000")
        await world.state(task_id, "RUNNING")
        await world.http.post(f"/v1/tasks/{task_id}:cancel")
        task = await world.state(task_id, *FINAL)
        assert task["state"] == "CANCELED", task


@on()
async def test_a_cancel_by_another_process_is_seen_too(world: World) -> None:
    async with world.service() as service, SqliteStore(world.directory / "tasks.sqlite") as other:
        task_id = await world.post("sleep 1000")
        await world.state(task_id, "RUNNING")
        while True:
            found = await other.get(task_id, TesView.BASIC)
            assert found is not None
            change = lifecycle.cancel(found, service.store.clock())
            if change is None or await other.apply(task_id, change):
                break
        task = await world.state(task_id, *FINAL)
        assert task["state"] == "CANCELED", task


@on()
async def test_reports_go_on_after_a_restart_of_the_service(world: World) -> None:
    go = world.directory / "go"
    async with world.service():
        task_id = await world.post(f"while [ ! -e {go} ]; do sleep 0.05; done; echo late")
        await world.state(task_id, "RUNNING")
    async with world.service():
        assert (await world.get(task_id))["state"] == "RUNNING"
        go.touch()
        task = await world.state(task_id, *FINAL)
        assert (task["state"], len(task["logs"])) == ("COMPLETE", 1), task


class Seen(Mute):
    """Looks show the truth, but nobody is told by itself."""

    blind = False


@on(Seen)
async def test_a_result_too_long_for_a_report_is_fetched(world: World) -> None:
    """128 KiB of each stream, all of it to be escaped in JSON."""
    async with world.service():
        script = "head -c 131072 /dev/zero | tr '\\0' '\\1' >&2; head -c 131072 /dev/zero | tr '\\0' '\\1'"
        task = await world.state(await world.post(script), *FINAL)
        assert task["state"] == "COMPLETE"
        assert len(task["logs"][0]["logs"][0]["stdout"]) == 131072


@on(Seen)
async def test_a_job_whose_service_is_elsewhere_is_not_disturbed(world: World) -> None:
    """Nobody listens where it reports to."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    world.report_url = nowhere + PATH
    async with world.service() as service:
        task_id = await world.post("echo all the same")
        result = world.directory / "site" / f"{task_id}-1" / "metadata" / "progress.json"
        await until(lambda: result.exists() and json.loads(result.read_bytes())["phase"] == "done")
        (seen,) = await service.sites["here"].observe([f"{task_id}-1"])
        await service.poller.note("here", seen)
        task = await world.state(task_id, *FINAL)
        assert task["logs"][0]["logs"][0]["stdout"] == "all the same\n"


# A way that breaks


class Relay:
    """A TCP relay in front of the service, whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.port = 0

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, up_writer}
        self.connections += 1  # only now: a cut that comes before would miss it
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._copy(reader, up_writer), self._copy(up_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        for each in self._writers:
            each.transport.abort()
        self._writers.clear()


@on()
async def test_a_connection_that_is_cut_is_made_anew(world: World) -> None:
    relay = Relay(int(world.url.rpartition(":")[2]))
    async with await relay.start():
        world.report_url = f"http://127.0.0.1:{relay.port}{PATH}"
        async with world.service():
            task_id = await world.post("sleep 1000")
            await world.state(task_id, "RUNNING")
            await until(lambda: relay.connections >= 2)  # what is told, and the open question
            relay.cut()
            await until(lambda: relay.connections >= 3)
            await world.http.post(f"/v1/tasks/{task_id}:cancel")
            task = await world.state(task_id, *FINAL)
            assert task["state"] == "CANCELED", task
            relay.cut()


# Who may report what


@on()
async def test_nobody_else_can_report(world: World) -> None:
    async with world.service():
        one, two = await world.post("sleep 1000"), await world.post("sleep 1000")
        await world.state(one, "RUNNING")
        await world.state(two, "RUNNING")
        good = documents.dump(job.Report(job.Progress(f"{one}-1", "running", beat=9)))
        assert (await world.report(f"{one}-1", world.token(one), good)).json() == job.to_document(job.Answer())
        strangers = [
            await world.report(f"{one}-1", world.token(two), good),
            await world.report(f"{one}-1", "none", good),
            await world.report(f"{one}-2", world.token(one), good),
            await world.report("nothing", world.token(one), good),
            await world.report("no-1", world.token(one), good),
            await world.report("x" * 5000 + "-1", world.token(one), good),
            await world.report("%00-1", world.token(one), good),
            await world.report("%F0%9F%98%80-1", world.token(one), good),
            await world.report(f"{one}-1", "none", b"x" * 10_000_000),
            await world.http.post(f"{PATH}/{one}-1", content=good),
        ]
        assert {each.status_code for each in strangers} == {401}
        assert len({each.text for each in strangers}) == 1, "what is wrong is not told"
        for wrong in (b"", b"{", b"[]", b"\xff", good.replace(b"-1", b"-2")):
            answer = await world.report(f"{one}-1", world.token(one), wrong)
            assert (answer.status_code, answer.json()["error"]) == (400, "Bad Request")
        answer = await world.report(f"{one}-1", world.token(one), b" " * (job.REPORT_BYTES + 1))
        assert answer.status_code == 413
        assert (await world.http.get(f"{PATH}/{one}-1")).status_code == 405
        tokens = {task_id: world.token(task_id) for task_id in (one, two)}
        for task_id in tokens:
            await world.http.post(f"/v1/tasks/{task_id}:cancel")
        for task_id, token in tokens.items():
            await world.state(task_id, "CANCELED")
            done = documents.dump(job.Report(job.Progress(f"{task_id}-1", "running", beat=99)))
            answer = await world.report(f"{task_id}-1", token, done)
            assert answer.json()["cancel"] is True, "what goes on after the end is to stop"
            assert (await world.get(task_id))["state"] == "CANCELED"


# Open questions


@asynccontextmanager
async def reporting(store: SqliteStore, **options: Any) -> AsyncIterator[tuple[Jobs, Any]]:
    app = FastAPI()
    problems.install(app)
    jobs = Jobs(store, {}, lambda: NOW, **options)
    Methods(POST=jobs.report).add_to(app.router, f"{PATH}/{{id}}")

    async with client_of(app, "http://tes") as client:

        async def ask(job_id: str, hold: float = job.HOLD, result: job.Result | None = None) -> dict[str, Any]:
            progress = job.Progress(job_id, "running", started="t", beat=1)
            content = documents.dump(job.Report(progress, result, hold))
            answer = await client.post(f"{PATH}/{job_id}", content=content, headers={"Authorization": "Bearer secret"})
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        yield jobs, ask


async def running(store: SqliteStore) -> str:
    """A task that runs; the id of its job."""
    task = make_task()
    attempt = make_attempt(task.id, submitted=NOW, tokens=(token_hash("secret"),))
    await store.add(replace(task, state=TesState.RUNNING, attempts=(attempt,), due_at=NOW + 1000))
    return attempt.job_id


def test_a_new_question_takes_the_place_of_the_one_before() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store, reporting(store, most=1) as (jobs, ask):
            job_id, other = await running(store), await running(store)
            first = asyncio.create_task(ask(job_id))
            await until(lambda: job_id in jobs.asked)
            assert await ask(other) == {"cancel": False, "pause": job.HOLD, "version": 1}, "there is room for one"
            second = asyncio.create_task(ask(job_id))
            assert (await first)["cancel"] is False
            assert not second.done()
            jobs.close()
            assert (await second)["pause"] > 0
            assert (await ask(job_id))["pause"] > 0, "a service that stops keeps no question open"

    run(go())


def test_a_cancel_just_before_the_question() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store, reporting(store) as (_, ask):
            job_id = await running(store)
            task = await store.get(job_id.rpartition("-")[0], TesView.BASIC)
            assert task is not None
            change = lifecycle.cancel(task, NOW)
            assert change is not None
            await store.apply(task.id, change)
            assert (await ask(job_id))["cancel"] is True

    run(go())


def test_a_question_ends_after_its_time() -> None:
    async def go() -> None:
        async with SqliteStore(":memory:") as store, reporting(store) as (_, ask):
            assert (await ask(await running(store), 0.05)) == {"cancel": False, "pause": 0.0, "version": 1}

    run(go())


# Results that hold much


def test_a_report_of_many_files() -> None:
    files = [job.OutputFile(f"file:///data/{at}", f"/out/{at}", at) for at in range(MANY + 1)]

    async def go() -> None:
        async with SqliteStore(":memory:") as store, reporting(store) as (_, ask):
            job_id = await running(store)
            await ask(job_id, result=job.Result(job_id, "COMPLETE", rfc3339(NOW), rfc3339(NOW), outputs=files))
            task = await store.get(task_of(job_id)[0], TesView.BASIC)
            assert task is not None
            assert task.attempt is not None
            assert task.state is TesState.COMPLETE
            assert [(each.url, each.path, each.size_bytes) for each in task.attempt.log.outputs] == files

    run(go())


def test_others_go_on_while_it_takes_long_to_decide() -> None:
    """The decision waits until the loop has gone on, if it is not made on the loop itself."""
    go_on = threading.Event()

    def decide(task: Task) -> lifecycle.Change | None:
        assert go_on.wait(GUARD)
        return lifecycle.cancel(task, NOW)

    async def go() -> None:
        async with SqliteStore(":memory:") as store:
            task = await store.get(task_of(await running(store))[0], TesView.BASIC)
            assert task is not None
            asyncio.get_running_loop().call_soon(go_on.set)
            written = await record(store, task, decide, aside=True)
            assert written is not None
            assert written.state is TesState.CANCELING

    run(go())
