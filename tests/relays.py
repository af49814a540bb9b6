"""The relay on a port, and real Pulsars that call it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
import yaml
from fastapi import FastAPI

from tesp_api.api import problems
from tesp_api.api.relay import Account, Relay
from tesp_api.relay import Manager
from tesp_api.store.mailbox import Mailbox

CONFIGURATION = Path(__file__).parent.parent / "docker" / "pulsar" / "relay" / "app.yml"
"""What an admin is told to use."""

PULSAR_MAIN = [sys.executable, "-P", "-m", "pulsar.main"]

USER, PASSWORD = "cluster", "a password of some length"
MANAGER = Manager("cluster")
ACCOUNT = Account(USER, PASSWORD, [MANAGER])


def relay_app(mailbox: Mailbox, *accounts: Account, **options: Any) -> FastAPI:
    """An application with nothing but the relay."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    problems.install(app)
    Relay(mailbox, accounts or (ACCOUNT,), **{"penalty": 0.01, "settle": 0.0, **options}).add_to(app.router)
    return app


@asynccontextmanager
async def served(app: FastAPI, port: int = 0) -> AsyncIterator[str]:
    """The app on a port of 127.0.0.1: its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    serving = asyncio.create_task(server._serve())
    try:
        while not server.started:
            assert not serving.done()
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


class RelayPulsar:
    """A `pulsar-main` that takes its jobs from a relay; it can be killed and started again."""

    def __init__(self, directory: Path, url: str, **changes: Any) -> None:
        self.directory = directory
        self.staging = directory / "staging"
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        document = yaml.safe_load(CONFIGURATION.read_text())
        document |= {
            "message_queue_url": url,
            "message_queue_username": USER,
            "message_queue_password": PASSWORD,
            "staging_directory": str(self.staging),
            "persistence_directory": str(directory / "persist"),
            **changes,
        }
        (directory / "app.yml").write_text(yaml.safe_dump(document))

    def start(self) -> None:
        """Start it; it logs in by itself."""
        environment = {"HOME": str(self.directory), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*PULSAR_MAIN, "-c", str(self.directory), "--app_conf_path", str(self.directory / "app.yml")],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9 it, but not its jobs."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def log(self) -> str:
        """What it has written."""
        return (self.directory / "log").read_text("utf-8", "replace")


async def login(client: httpx.AsyncClient, user: str = USER, password: str = PASSWORD) -> dict[str, str]:
    """The header of a login."""
    form = {"username": user, "password": password, "grant_type": "password"}
    answer = await client.post("/auth/login", data=form)
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}
