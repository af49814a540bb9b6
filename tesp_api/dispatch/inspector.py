"""Asks sites how they are when nothing else does, and tells the store, where every process can read it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from tesp_api.dispatch import loop
from tesp_api.dispatch.health import Health
from tesp_api.errors import SiteClosed, SiteError
from tesp_api.sites import Site
from tesp_api.store import Ring, TaskStore
from tesp_api.task import rfc3339

log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two rounds."""

ANSWER_WITHIN = 60.0
"""Seconds that a site may take; over a broker or a relay a question goes a long way."""

TELL_EVERY = 2.0
"""Seconds between two reports of the same site that differ."""

TELL_AGAIN = 30.0
"""Seconds after which a report is repeated, to show that it is still true."""


class Inspector:
    """Probes sites whose circuit is open, and those that nobody has heard of for long."""

    name = "inspector"

    def __init__(
        self,
        store: TaskStore,
        sites: Mapping[str, Site],
        health: Health,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._sites = sites
        self._health = health
        self._clock = clock
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._told: dict[str, tuple[float, str]] = {}

    async def tick(self) -> int:
        """Start what checks are due, and report."""
        for name, site in self._sites.items():
            if name not in self._asking and self._health.wants_a_check(name):
                self._health.asks(name)
                self._asking[name] = asyncio.create_task(self._check(name, site), name=f"check of {name}")
        for name in self._sites:
            await self._report(name)
        return 0

    async def _check(self, name: str, site: Site) -> None:
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                version = await site.check()
        except SiteClosed as error:
            self._health.refused(name, str(error))
        except (SiteError, TimeoutError) as error:
            self._health.silent(name, str(error) or f"The site {name!r} did not answer in time.")
        except Exception as error:
            log.exception("the check of %s failed", name)
            self._health.silent(name, f"The service failed: {type(error).__name__}")
        else:
            self._health.answers(name, version)
        finally:
            del self._asking[name]

    async def _report(self, name: str) -> None:
        """What this process knows; nothing as long as that is nothing."""
        now = self._clock()
        report = self._health.report(name)
        if report is None:
            return
        text = json.dumps(_document(report), ensure_ascii=True)
        at, before = self._told.get(name, (None, ""))
        age = now - at if at is not None else TELL_AGAIN
        if 0 <= age < (TELL_EVERY if text != before else TELL_AGAIN):
            return
        await self._store.report(name, now, text)
        self._told[name] = (now, text)

    def wakes_on(self) -> Ring:
        """Nothing that happens to a task is urgent here."""
        return Ring(0)

    async def next_due(self) -> float | None:
        """When the next round is."""
        return self._clock() + EVERY

    async def wait(self) -> None:
        """Wait for the checks under way."""
        await asyncio.gather(*self._asking.values())

    async def drain(self) -> None:
        """End the checks under way; nobody waits for what they find."""
        await loop.end(self._asking.values())


def _document(report: Mapping[str, Any]) -> dict[str, Any]:
    at = report["error_at"]
    error = {"last_error": {"message": report["error"], "time": rfc3339(at)}} if at is not None else {}
    return {"health": report["health"], "version": report["version"], **error}


__all__ = ["Inspector"]
