"""The relay on a port, and real Pulsars that call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from tesp_api.api import problems
from tesp_api.api.relay import Account, Relay
from tesp_api.relay import Manager
from tesp_api.store.mailbox import Mailbox
from tests.pulsars import PulsarMain

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


def relay_pulsar(directory: Path, url: str) -> PulsarMain:
    """A Pulsar that takes its jobs from the relay there, not started yet."""
    return PulsarMain(directory, "relay/app.yml", RELAY_URL=url, USER=USER, PASSWORD=PASSWORD)


async def login(client: httpx.AsyncClient, user: str = USER, password: str = PASSWORD) -> dict[str, str]:
    """The header of a login."""
    form = {"username": user, "password": password, "grant_type": "password"}
    answer = await client.post("/auth/login", data=form)
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}
