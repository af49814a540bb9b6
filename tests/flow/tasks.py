"""Tasks for an app in this process, and how to follow them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

GUARD = 60.0
"""Seconds after which a wait has failed; nothing here is timed."""


async def create(client: httpx.AsyncClient, **task: Any) -> str:
    answer = await client.post("/v1/tasks", json=task)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["id"]
    return task_id


async def get(client: httpx.AsyncClient, task_id: str, view: str = "FULL") -> dict[str, Any]:
    document: dict[str, Any] = (await client.get(f"/v1/tasks/{task_id}", params={"view": view})).json()
    return document


async def until(client: httpx.AsyncClient, task_id: str, good: Callable[[str], bool]) -> dict[str, Any]:
    async with asyncio.timeout(GUARD):
        while not good((await get(client, task_id, "MINIMAL"))["state"]):
            await asyncio.sleep(0.01)
    return await get(client, task_id)


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"image": "none", "command": ["sh", "-c", script], **more}
