"""Which sites take jobs: a circuit for each, which opens when calls fail and closes when they are answered.

A site that gives no usable answer three times running gets no new jobs; looks at those that it has go on, and any
answer closes the circuit. One that refuses us altogether gets none either; after a pause, once it answers at all, it is
tried with a single job, and only a job that it takes closes the circuit (that begins, if one before it could not). All
this is what one process knows: nothing is lost with it, and another that does not know it yet finds out by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("tesp_api.dispatch")

FAILURES = 3
"""Calls without a usable answer, one after the other, that open a circuit."""

FIRST_PAUSE = 2.0
LONGEST_PAUSE = 15.0
LONGEST_REFUSED = 60.0
"""Seconds until an open circuit is probed: the first time, and at most; a refusal needs an operator to change."""

IDLE = 30.0
"""Seconds without an answer after which a site is asked how it is though nobody needs it."""


@dataclass
class Circuit:
    """What is known of one site. Times are seconds since the epoch; None: never.

    `lame`: it takes jobs, but they cannot start there.
    """

    failures: int = 0
    opened: bool = False
    refused: bool = False
    lame: bool = False
    probed: bool = False
    pause: float = FIRST_PAUSE
    tried: float = 0.0
    heard: float | None = None
    asked: float | None = None
    version: str = ""
    error: str = ""
    error_at: float | None = None

    def is_due(self, now: float) -> bool:
        """Whether the pause since the last try is over. A clock that went back must not hold this up."""
        return not 0 <= now - self.tried < self.pause

    def state(self, now: float) -> str:
        """up, down, probing, or unknown as long as nothing was heard of it."""
        if self.opened:
            return "probing" if self.is_due(now) else "down"
        return "unknown" if self.heard is None else "up"

    def open(self, now: float) -> None:
        """No new jobs for a while, and the longer the more often."""
        longest = LONGEST_REFUSED if self.refused else LONGEST_PAUSE
        self.pause = min(2 * self.pause, longest) if self.opened else FIRST_PAUSE
        self.opened, self.probed, self.tried = True, False, now

    def close(self) -> None:
        """All is well."""
        self.opened = self.refused = self.lame = self.probed = False
        self.failures, self.pause = 0, FIRST_PAUSE


class Health:
    """The circuits of all sites; each call says what was seen of a site."""

    def __init__(self, sites: Iterable[str] = (), clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._circuits = {name: Circuit() for name in sites}
        self._silent: set[str] = set()
        self.changes = 0

    def of(self, site: str) -> Circuit:
        """The circuit of a site."""
        return self._circuits.setdefault(site, Circuit())

    # What was seen

    def silent(self, site: str, reason: str) -> None:
        """It gave no usable answer."""
        circuit, now = self.of(site), self._clock()
        circuit.failures += 1
        circuit.error, circuit.error_at = reason, now
        if site not in self._silent:
            self._silent.add(site)
            log.warning("The site %r does not answer: %s", site, reason)
        if circuit.opened:
            if circuit.is_due(now):
                circuit.open(now)
        elif circuit.failures >= FAILURES:
            circuit.open(now)
            self.changes += 1

    def refused(self, site: str, reason: str, *, lame: bool = False) -> None:
        """It takes nothing from us, whatever the job; or (`lame`) took one and could not even start it."""
        circuit, now = self.of(site), self._clock()
        circuit.lame = circuit.lame or lame
        circuit.error, circuit.error_at = reason, now
        if not circuit.refused:
            log.warning("The site %r takes no jobs from us; its tasks wait: %s", site, reason)
        first, circuit.refused = not circuit.refused, True
        if first or circuit.is_due(now) or circuit.probed:
            circuit.open(now)
        self.changes += 1

    def answers(self, site: str, version: str = "") -> None:
        """It answered, and may have told its version."""
        circuit = self.of(site)
        circuit.heard, circuit.failures = self._clock(), 0
        circuit.version = version or circuit.version
        if circuit.refused:
            circuit.probed = True
        elif circuit.opened:
            circuit.close()
            self.changes += 1
        if site in self._silent:
            self._silent.discard(site)
            log.info("The site %r answers again.", site)

    def took(self, site: str) -> None:
        """It took a job."""
        if not self.of(site).lame:
            self._is_well(site)
        self.answers(site)

    def began(self, site: str) -> None:
        """A job has begun there."""
        self._is_well(site)

    def _is_well(self, site: str) -> None:
        circuit = self.of(site)
        if circuit.refused:
            log.info("The site %r takes jobs again.", site)
            circuit.close()
            self.changes += 1

    # What follows

    def takes(self, site: str) -> bool:
        """Whether a new job may go there."""
        circuit = self.of(site)
        return not circuit.opened or (circuit.refused and circuit.probed and circuit.is_due(self._clock()))

    def sends(self, site: str) -> None:
        """A new job goes there; if that is to find out whether the site takes any, it is the only one for a while."""
        circuit = self.of(site)
        if circuit.opened:
            circuit.tried = self._clock()
            self.changes += 1

    def wants_a_check(self, site: str) -> bool:
        """Whether it should be asked how it is."""
        circuit, now = self.of(site), self._clock()
        if circuit.opened:
            return circuit.is_due(now) and not circuit.probed
        last = max(circuit.heard or 0.0, circuit.asked or 0.0)
        return not 0 <= now - last < (FIRST_PAUSE if circuit.failures else IDLE)

    def asks(self, site: str) -> None:
        """It is being asked."""
        self.of(site).asked = self._clock()

    def report(self, site: str) -> Mapping[str, Any] | None:
        """What can be told of it; None if nothing is known."""
        circuit, now = self.of(site), self._clock()
        health = circuit.state(now)
        if health == "unknown" and not circuit.error:
            return None
        return {"health": health, "version": circuit.version, "error": circuit.error, "error_at": circuit.error_at}

    def why(self, site: str) -> str:
        """What it said, or what happened, when it was last asked in vain."""
        return self.of(site).error


__all__ = ["Circuit", "Health"]
