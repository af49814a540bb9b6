"""The right to decide, for one process at a time.

To place a task is to count what its site carries and then to write. Between the two no other process may place one, or
both would take the last room. So whoever places holds a right of the store for a while, and the store refuses what it
writes later: a process that is paused in the middle, however long, cannot do harm when it wakes.
"""

from __future__ import annotations

import secrets
from contextlib import suppress

from tesp_api.errors import StoreUnavailable
from tesp_api.store import TaskStore


class Right:
    """One right of this process. `seconds`: how long it lasts, and so how long others wait when we die with it."""

    def __init__(self, store: TaskStore, name: str, seconds: float) -> None:
        self._store = store
        self._name = name
        self._seconds = seconds
        self._holder = secrets.token_hex(8)
        self._until: float | None = None

    async def until(self) -> float | None:
        """When it runs out, by the store's time, prolonged in good time; None while another process has it."""
        # More than was given is left if the clock was set back.
        left = 0.0 if self._until is None else self._until - self._store.clock()
        if not 0.5 * self._seconds <= left <= 2 * self._seconds:
            self._until = None  # if this call fails we know nothing
            self._until = await self._store.hold(self._name, self._holder, self._seconds)
        return self._until

    def lost(self) -> None:
        """The store has refused it."""
        self._until = None

    async def give_back(self) -> None:
        """So that others need not wait."""
        if self._until is not None:
            self._until = None
            with suppress(StoreUnavailable):
                await self._store.hold(self._name, self._holder, 0.0)
