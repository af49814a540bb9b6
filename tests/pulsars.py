"""Real Pulsars for tests, plans for them, and how to wait for something."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import httpx

from tesp_api.runner.job import Executor, Input, Plan, Runtime
from tesp_api.sites import Site
from tesp_api.task import Observation, Phase
from tests.support import free_port

T = TypeVar("T")
_numbers = itertools.count(1)


def new_plan(*command: str, wishes: str = "task", job_id: str = "", inputs: Sequence[Input] = ()) -> Plan:
    """A plan of one executor that runs on the host; `wishes` are those of the stand-in."""
    return Plan(
        job_id=job_id or f"job{next(_numbers)}-{secrets.token_hex(4)}-1",
        task_id=wishes,
        executors=[Executor(image="none", command=list(command or ("true",)))],
        inputs=list(inputs),
        runtime=Runtime(kind="host"),
    )


async def until(look: Callable[[], Awaitable[T | None]], what: str, *, within: float = 60.0) -> T:
    """Look again and again until there is something; fails after a while."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if seen := await look():
            return seen
        await asyncio.sleep(0.01)
    raise AssertionError(f"waited {within:.0f} s for: {what}")


async def phase(site: Site, job_id: str, *wanted: Phase, within: float = 60.0) -> Observation:
    """The first observation of the job in one of these phases."""

    async def look() -> Observation | None:
        (seen,) = await site.observe([job_id])
        return seen if seen.phase in wanted else None

    return await until(look, f"{job_id} {'/'.join(wanted)}", within=within)


async def running(site: Site, job_id: str, *, within: float = 20.0) -> Observation:
    """The first observation of the job that shows a running executor."""

    async def look() -> Observation | None:
        (seen,) = await site.observe([job_id])
        return seen if seen.progress is not None and seen.progress.phase == "running" else None

    return await until(look, f"{job_id} running", within=within)


async def ended(site: Site, job_id: str, *, within: float = 60.0) -> Observation:
    """The job with its result."""

    async def look() -> Observation | None:
        (seen,) = await site.observe([job_id])
        return seen if seen.result is not None else None

    return await until(look, f"the result of {job_id}", within=within)


async def forgotten(site: Site, job_id: str) -> None:
    """Wait until the site has forgotten the job."""

    async def look() -> bool:
        return await site.forget(job_id)

    await until(look, f"{job_id} forgotten")


async def exists(path: Path, *, within: float = 60.0) -> None:
    """Wait for a file with something in it."""

    async def look() -> bool:
        return path.exists() and path.stat().st_size > 0

    await until(look, str(path), within=within)


PYTHON = os.environ.get("TESP_PULSAR_PYTHON", sys.executable)
"""The interpreter whose Pulsar is started; that variable names the one of another environment, with another release."""

DOCKER = Path(__file__).parent.parent / "docker" / "pulsar"
"""The configuration files that docs/pulsar.md hands to admins."""


class PulsarServer:
    """A `pulsar-serve` on 127.0.0.1 that can be killed and started again.

    `app` is the text of an app.yml beside the server.ini of docker/pulsar; `variables` are for Pulsar's environment.
    """

    def __init__(
        self,
        directory: Path,
        *,
        token: str = "s3cret-t0ken",
        app: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.directory, self.token, self.port = directory, token, free_port()
        self._variables = variables or {}
        self.url = f"http://127.0.0.1:{self.port}"
        self.staging = directory / "staging"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        text = (DOCKER / "server.ini").read_text()
        values = {"0.0.0.0": "127.0.0.1", "8913": str(self.port), "@STAGING@": str(directory), "@TOKEN@": token}
        for each, value in values.items():
            assert each in text
            text = text.replace(each, value)
        (directory / "server.ini").write_text(text)
        if app:
            (directory / "app.yml").write_text(app)

    def start(self) -> None:
        """Start it and wait until it answers."""
        path = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
        environment = {"HOME": str(self.directory), "PATH": path, **self._variables}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-P", "-m", "pulsar.scripts.serve", str(self.directory / "server.ini")],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/healthz", params={"private_token": self.token}).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"Pulsar did not start: {self.log()}")

    def kill(self) -> None:
        """kill -9 it with its workers, but not its jobs."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def log(self) -> str:
        """What it has written."""
        return (self.directory / "log").read_text("utf-8", "replace")


class PulsarMain:
    """A `pulsar-main`, which listens on no port but takes its jobs elsewhere; it can be killed and started again.

    `config` is one of the app.yml in docker/pulsar, with what stands for its `@NAMES@`.
    """

    def __init__(self, directory: Path, config: str, **names: str) -> None:
        self.directory, self.staging = directory, directory / "staging"
        self.path = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
        self.variables: dict[str, str] = {}  # further ones for its environment
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        text = (DOCKER / config).read_text()
        for name, value in {"STAGING": str(directory), **names}.items():
            text = text.replace(f"@{name}@", value)
        (directory / "app.yml").write_text(text)

    def start(self) -> None:
        """Start it; nobody can tell when it is ready but by its answers."""
        environment = {"HOME": str(self.directory), "PATH": self.path, **self.variables}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(PYTHON, "-P", "-m", "pulsar.main", "-c", str(self.directory)),
                    *("--app_conf_path", str(self.directory / "app.yml")),
                ],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9 it, but not its jobs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        """What it has written."""
        return (self.directory / "log").read_text("utf-8", "replace")


class Cutter:
    """A TCP proxy in front of a server that can swallow answers: the request arrives, the connection is cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._busy: set[asyncio.Task[None]] = set()
        self.cut: Callable[[bytes], bool] = lambda request: False
        self.port = 0

    async def __aenter__(self) -> Cutter:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def close(self) -> None:
        """Take no further connection."""
        assert self._server is not None
        self._server.close()

    async def __aexit__(self, *_: object) -> None:
        self.close()
        for each in self._busy:
            each.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        self._busy.add(me)
        try:
            await self._pass_on(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._busy.discard(me)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request per connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
        body = await reader.readexactly(length)
        above_reader, above_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            above_writer.write(head.replace(b"keep-alive", b"close") + body)
            answer = await above_reader.read()
        finally:
            above_writer.close()
        if not self.cut(head):
            writer.write(answer)
            await writer.drain()
