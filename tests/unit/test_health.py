"""Circuits: when they open, and what closes them."""

from __future__ import annotations

import logging

import pytest

from tesp_api.dispatch import health as module
from tesp_api.dispatch.health import FAILURES, IDLE, Health


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def both() -> tuple[Health, Clock]:
    clock = Clock()
    return Health(["a", "b"], clock), clock


def state(health: Health, clock: Clock) -> str:
    return health.of("a").state(clock.now)


def test_failures_running_open_it_and_any_answer_closes_it() -> None:
    health, clock = both()
    assert state(health, clock) == "unknown"
    for _ in range(FAILURES - 1):
        health.silent("a", "no")
    health.answers("a")
    for _ in range(FAILURES - 1):
        health.silent("a", "no")
        assert health.takes("a")
        assert state(health, clock) == "up"
    health.silent("a", "really no")
    assert not health.takes("a")
    assert (state(health, clock), health.why("a")) == ("down", "really no")
    assert health.takes("b")
    clock.now += 100
    assert state(health, clock) == "probing"
    assert not health.takes("a"), "an answer is needed, not only time"
    health.answers("a", "0.15.16")
    assert (health.takes("a"), state(health, clock), health.of("a").version) == (True, "up", "0.15.16")


def test_probes_become_rarer() -> None:
    health, clock = both()
    for _ in range(FAILURES):
        health.silent("a", "no")
    pauses = []
    for _ in range(8):
        begun = clock.now
        while not health.wants_a_check("a"):
            clock.now += 0.5
        pauses.append(clock.now - begun)
        for _ in range(50):  # many looks fail at the same moment
            health.silent("a", "no")
    assert pauses == [2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 15.0, 15.0]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_holds_nothing_up(jump: float) -> None:
    health, clock = both()
    for _ in range(FAILURES):
        health.silent("a", "no")
    clock.now += jump
    assert health.wants_a_check("a")
    health.answers("a")
    clock.now -= jump
    assert health.wants_a_check("a") or jump > 0
    health.refused("a", "no")
    health.answers("a")
    clock.now += jump
    assert health.takes("a")


def test_a_refusal_opens_it_at_once_and_only_a_job_that_is_taken_closes_it() -> None:
    health, clock = both()
    health.answers("a")
    health.refused("a", "wrong token")
    assert not health.takes("a")
    clock.now += 2
    assert health.wants_a_check("a")
    assert not health.takes("a"), "first it must answer"
    health.answers("a")
    assert health.takes("a")
    assert state(health, clock) == "probing"
    health.sends("a")
    assert not health.takes("a"), "one is enough"
    health.refused("a", "no python3")
    clock.now += 3
    assert not health.wants_a_check("a"), "the pause grows"
    clock.now += 1
    health.answers("a")
    health.sends("a")
    health.took("a")
    assert health.takes("a")
    assert state(health, clock) == "up"


def test_a_site_that_takes_jobs_which_cannot_start_is_well_only_when_one_begins() -> None:
    health, clock = both()
    health.refused("a", "no python3", lame=True)
    clock.now += 2
    health.answers("a")
    health.sends("a")
    health.took("a")
    assert not health.takes("a"), "it took the others, too"
    health.refused("a", "no python3", lame=True)
    clock.now += 4
    health.answers("a")
    health.sends("a")
    health.took("a")
    health.began("a")
    assert health.takes("a")
    assert state(health, clock) == "up"


def test_who_is_asked() -> None:
    health, clock = both()
    assert health.wants_a_check("a"), "nothing is known of it"
    health.asks("a")
    assert not health.wants_a_check("a")
    health.silent("a", "no")
    clock.now += 2
    assert health.wants_a_check("a"), "soon, after a failure"
    health.answers("a")
    assert not health.wants_a_check("a")
    clock.now += IDLE
    assert health.wants_a_check("a")


def test_what_is_reported() -> None:
    health, clock = both()
    assert health.report("a") is None
    health.silent("a", "no")
    assert health.report("a") == {"health": "unknown", "version": "", "error": "no", "error_at": 1000.0}
    health.answers("a", "1")
    clock.now += 1
    assert health.report("a") == {"health": "up", "version": "1", "error": "no", "error_at": 1000.0}


def test_the_log_tells_each_turn_once(caplog: pytest.LogCaptureFixture) -> None:
    health, _ = both()
    with caplog.at_level(logging.INFO, module.log.name):
        for _ in range(5):
            health.silent("a", "no")
        health.answers("a")
        for _ in range(5):
            health.refused("a", "wrong token")
        health.answers("a")
        health.took("a")
    assert [each.levelname for each in caplog.records] == ["WARNING", "INFO", "WARNING", "INFO"]
