"""The one form of all background work: tick, wait for the bell or the next due time, tick again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from tesp_api.errors import StoreUnavailable
from tesp_api.store import Bell, Ring

log = logging.getLogger(__name__)

LONGEST_WAIT = 0.25
"""Seconds after which a loop looks by itself: another process may have rung a bell that we cannot hear."""


STORE_AGAIN = 2.0
"""Longest pause in seconds before a store that does not answer is asked again."""


class Ticker(Protocol):
    """One kind of background work."""

    name: str

    async def tick(self) -> int:
        """Do one round; how many tasks it moved."""

    def wakes_on(self) -> Ring:
        """Which rings of the store's bell are worth a tick now."""

    async def next_due(self) -> float | None:
        """When there will be something to do, in seconds since the epoch; None if nothing is known."""


async def run(ticker: Ticker, bell: Bell, clock: Callable[[], float] = time.time) -> None:
    """Tick for ever. An error is logged and followed by a growing pause; only cancellation ends this.

    `clock` is the one by which things become due.
    """
    listener = bell.listen()
    failures = 0
    while True:
        try:
            moved = await ticker.tick()
            failures = 0
            pause = 0.0 if moved else await _pause(ticker, clock)
        except StoreUnavailable as error:
            failures += 1
            pause = min(_backoff(failures), STORE_AGAIN)
            log.warning("%s: %s Trying again in %.1f s.", ticker.name, error, pause)
            await asyncio.sleep(pause)
            continue
        except Exception:
            failures += 1
            pause = _backoff(failures)
            log.exception("%s failed. Trying again in %.1f s.", ticker.name, pause)
            await asyncio.sleep(pause)
            continue
        if pause > 0:
            await listener.wait(pause, ticker.wakes_on())
        else:
            await asyncio.sleep(0)


async def end(work: Iterable[asyncio.Task[Any]]) -> None:
    """End what is under way. Left alone, it would go on while store and sites are being closed, and blame them."""
    left = list(work)
    for each in left:
        each.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _pause(ticker: Ticker, clock: Callable[[], float]) -> float:
    due = await ticker.next_due()
    return LONGEST_WAIT if due is None else min(max(due - clock(), 0.002), LONGEST_WAIT)


def _backoff(failures: int) -> float:
    return float(min(0.1 * 2 ** min(failures, 8), 10.0))
