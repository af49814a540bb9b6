"""A task through the whole app in this process, on each carrier: HTTP, store, loops, the site and the real runner,
without containers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tesp_api.app import create_app
from tesp_api.settings import Settings, load
from tests.carried import PLACES, Place, Separate
from tests.flow.tasks import GUARD, create, get, sh, until
from tests.relays import served
from tests.running import FINAL
from tests.support import free_port


class Flow:
    """A data directory and one site; apps on them come and go."""

    def __init__(self, directory: Path, place: Place) -> None:
        self.directory, self.place = directory, place
        self._is_new = True

    def settings(self, of_the_site: Mapping[str, Any] | None = None, **overrides: Any) -> Settings:
        roots = {"runtime": "host", "file_roots": [str(self.directory)]}
        sites = Settings.model_validate({"sites": [{**self.place.keys, **roots, **(of_the_site or {})}]}).sites
        overrides = {"server.data_dir": self.directory / "data", **overrides}
        if self.place.reports:
            overrides["server.public_url"] = self.place.url
        return load(environ={}, overrides=overrides).model_copy(update={"sites": sites})

    @asynccontextmanager
    async def running(self, chosen: Settings | None = None) -> AsyncIterator[httpx.AsyncClient]:
        """The app; where the site's Pulsar calls it, it is on its port, too."""
        app = create_app(chosen or self.settings())
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(app.router.lifespan_context(app))
            if self.place.reports:
                await stack.enter_async_context(served(app, int(self.place.url.rpartition(":")[2])))
                if self._is_new:  # it has found nobody for a while, and would take its time before it asks again
                    self.place.start_pulsar()
                self._is_new = False
            transport = httpx.ASGITransport(app)
            yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://tes"))

    def runners(self, job_id: str) -> list[int]:
        """The living runners of a job."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (
                    f"/{job_id}" in str((entry / "cwd").readlink())
                    and b"runner.pyz" in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
        return found


@pytest.fixture(
    scope="module",
    params=[each if each == "local" else pytest.param(each, marks=pytest.mark.service) for each in PLACES],
)
def separate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Place] | Place]:
    """A site with what stands behind it; if that is the app's own, only its kind."""
    kind = PLACES[request.param]
    if not issubclass(kind, Separate):
        yield kind
        return
    place = kind(tmp_path_factory.mktemp(request.param), free_port())
    place.temporary.mkdir()
    try:
        place.start()
        yield place
    finally:
        place.stop()


@pytest.fixture
def flow(separate: type[Place] | Place, tmp_path: Path) -> Flow:
    return Flow(tmp_path, separate if isinstance(separate, Place) else separate(tmp_path, 0))


def test_a_task_from_post_to_result(flow: Flow) -> None:
    async def go() -> None:
        async with flow.running() as client:
            task_id = await create(
                client,
                name="flow",
                inputs=[{"path": "/in/x", "content": "text"}],
                executors=[sh("cat /in/x; echo warning >&2"), sh("echo result > /out/y")],
                outputs=[{"path": "/out/y", "url": str(flow.directory / "y")}],
            )
            task = await until(client, task_id, FINAL.__contains__)
            assert task["state"] == "COMPLETE", task
            assert (flow.directory / "y").read_text() == "result\n"
            (log,) = task["logs"]
            assert [each["exit_code"] for each in log["logs"]] == [0, 0]
            assert (log["logs"][0]["stdout"], log["logs"][0]["stderr"]) == ("text", "warning\n")
            assert log["metadata"]["site"] == flow.place.name
            assert log["start_time"] <= log["logs"][0]["start_time"] <= log["end_time"]

    asyncio.run(go())


def test_many_tasks_and_the_limit_of_the_site(flow: Flow) -> None:
    async def go() -> None:
        async with flow.running(flow.settings({"max_jobs": 3})) as client:
            script = f"mkdir {flow.directory}/n$$; ls -d {flow.directory}/n* | wc -l; rmdir {flow.directory}/n$$"
            ids = [await create(client, executors=[sh(script)]) for _ in range(12)]
            tasks = [await until(client, task_id, FINAL.__contains__) for task_id in ids]
            assert {task["state"] for task in tasks} == {"COMPLETE"}
            assert max(int(task["logs"][0]["logs"][0]["stdout"]) for task in tasks) <= 3

    asyncio.run(go())


def test_what_a_running_task_says_is_seen_as_it_grows(flow: Flow) -> None:
    """Where jobs do not report, who looks at a task has its job looked at, which would else wait for ten minutes."""

    async def see(client: httpx.AsyncClient, task_id: str, text: str) -> None:
        async with asyncio.timeout(GUARD):
            while True:
                task = await get(client, task_id)
                assert task["state"] not in FINAL, task
                if text == task.get("logs", [{"metadata": {}}])[0]["metadata"].get("stdout_tail"):
                    return
                await asyncio.sleep(0.05)

    async def go() -> None:
        async with flow.running(flow.settings({"status": {"poll_interval": 600.0}})) as client:
            wait = f"while [ ! -e {flow.directory}/%s ]; do sleep 0.05; done"
            script = f"echo one; {wait % 'a'}; echo two; {wait % 'b'}"
            task_id = await create(client, executors=[sh("echo before"), sh(script)])
            await see(client, task_id, "one\n")
            task = await get(client, task_id)
            assert task["logs"][0]["metadata"]["executor"] == "1"
            (flow.directory / "a").touch()
            await see(client, task_id, "one\ntwo\n")
            for view in ("MINIMAL", "BASIC"):
                assert "_tail" not in str(await get(client, task_id, view))
            (flow.directory / "b").touch()
            task = await until(client, task_id, FINAL.__contains__)
            assert task["state"] == "COMPLETE"
            assert "_tail" not in str(task)

    asyncio.run(go())


@pytest.mark.parametrize("moment", ["at once", "INITIALIZING", "RUNNING"])
def test_cancel(flow: Flow, moment: str) -> None:
    async def go() -> None:
        async with flow.running() as client:
            pid_file = flow.directory / "pid"
            task_id = await create(client, executors=[sh(f"echo half; echo $$ > {pid_file}; sleep 300")])
            if moment != "at once":
                await until(client, task_id, lambda state: state in (moment, "RUNNING"))
            async with asyncio.timeout(GUARD):
                while moment == "RUNNING" and not (pid_file.exists() and pid_file.read_text()):
                    await asyncio.sleep(0.01)
            answer = await client.post(f"/v1/tasks/{task_id}:cancel")
            assert (answer.status_code, answer.json()) == (200, {})
            task = await until(client, task_id, FINAL.__contains__)
            assert task["state"] == "CANCELED"
            if pid_file.exists() and (pid := pid_file.read_text().strip()):
                assert not Path("/proc", pid).exists()
            if moment == "RUNNING":
                assert [each["stdout"] for each in task["logs"][0]["logs"]] == ["half\n"], "what it had written is kept"

    asyncio.run(go())


def test_a_restart_in_the_middle(flow: Flow) -> None:
    async def first() -> str:
        async with flow.running() as client:
            task_id = await create(
                client,
                executors=[
                    sh(f"echo ran >> {flow.directory}/ran; until [ -e {flow.directory}/go ]; do sleep 0.05; done")
                ],
            )
            await until(client, task_id, "RUNNING".__eq__)
            return task_id

    async def second(task_id: str) -> None:
        async with flow.running() as client:
            task = await until(client, task_id, FINAL.__contains__)
            assert task["state"] == "COMPLETE"
            assert len(task["logs"]) == 1

    task_id = asyncio.run(first())
    (flow.directory / "go").touch()
    asyncio.run(second(task_id))
    assert (flow.directory / "ran").read_text() == "ran\n"


@pytest.mark.parametrize("fold", [False, True])
def test_a_runner_that_is_killed_once(flow: Flow, fold: bool) -> None:
    """The first attempt tells what became of it, the second one does the work."""

    async def go() -> None:
        async with flow.running(flow.settings(**{"retry.backoff": 0.1, "retry.fold": fold})) as client:
            script = f"echo x >> {flow.directory}/ran; [ $(wc -l < {flow.directory}/ran) = 2 ] || sleep 600"
            task_id = await create(client, executors=[sh("echo first"), sh(script), sh("echo third")])
            async with asyncio.timeout(GUARD):
                while not (flow.directory / "ran").exists():
                    await asyncio.sleep(0.01)
            (runner,) = flow.runners(f"{task_id}-1")
            os.kill(runner, signal.SIGKILL)
            task = await until(client, task_id, FINAL.__contains__)
            assert task["state"] == "COMPLETE", task
            assert [each.get("stdout") for each in task["logs"][-1]["logs"]] == ["first\n", None, "third\n"]
            if fold:
                assert len(task["logs"]) == 1
            else:
                failed, _ = task["logs"]
                assert [each["stdout"] for each in failed["logs"]] == ["first\n"]
                assert "The runner was killed" in failed["system_logs"][0]
                assert failed["end_time"] <= task["logs"][1]["start_time"]
            async with asyncio.timeout(GUARD):
                while list(flow.place.staging.glob(f"{task_id}-*")):
                    await asyncio.sleep(0.01)

    asyncio.run(go())
    assert (flow.directory / "ran").read_text() == "x\nx\n"


def test_an_executor_that_failed_is_not_run_again(flow: Flow) -> None:
    async def go() -> None:
        async with flow.running(flow.settings(**{"retry.backoff": 0.1})) as client:
            task_id = await create(client, executors=[sh(f"echo ran >> {flow.directory}/ran; exit 3")])
            task = await until(client, task_id, FINAL.__contains__)
            assert (task["state"], len(task["logs"])) == ("EXECUTOR_ERROR", 1)

    asyncio.run(go())
    assert (flow.directory / "ran").read_text() == "ran\n"
