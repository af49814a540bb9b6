"""A round trip through the codec loses nothing."""

from __future__ import annotations

import json
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from tesp_api.store import codec
from tesp_api.task import Attempt, Bodies, Tail
from tesp_api.tes import TesExecutorLog, TesOutputFileLog, TesTaskLog
from tests.builders import make_attempt, make_task

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MAYBE_TEXT = st.none() | TEXT
MOMENT = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | MOMENT
WHOLE = st.integers(0, 2**63 - 1)

LOGS = st.builds(
    TesTaskLog,
    logs=st.lists(
        st.builds(
            TesExecutorLog,
            exit_code=st.integers(-(2**31), 2**31),
            start_time=MAYBE_TEXT,
            end_time=MAYBE_TEXT,
            stdout=MAYBE_TEXT,
            stderr=MAYBE_TEXT,
        ),
        max_size=3,
    ),
    outputs=st.lists(st.builds(TesOutputFileLog, url=TEXT, path=TEXT, size_bytes=WHOLE), max_size=3),
    metadata=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    start_time=MAYBE_TEXT,
    end_time=MAYBE_TEXT,
    system_logs=st.none() | st.lists(TEXT, max_size=2),
)

ATTEMPTS = st.builds(
    Attempt,
    number=st.integers(1, 99),
    job_id=TEXT,
    site=TEXT,
    assigned=MOMENT,
    submitted=MAYBE,
    heard=MAYBE,
    beat=st.integers(-1, 2**70),
    silence=MOMENT,
    vain=MAYBE,
    looks=WHOLE,
    cancel_sent=MAYBE,
    cancels=WHOLE,
    ended=MAYBE,
    abandoned=st.booleans(),
    forgotten=st.booleans(),
    tokens=st.lists(TEXT, max_size=4).map(tuple),
    reported=MAYBE,
    withdrawn=st.booleans(),
    watched=MAYBE,
    log=LOGS,
)


@given(st.lists(ATTEMPTS, max_size=3).map(tuple))
def test_attempts(attempts: tuple[Attempt, ...]) -> None:
    assert codec.attempts_from_json(codec.attempts_to_json(attempts)) == attempts


def test_the_strategy_covers_every_field() -> None:
    """A new field must be in the round trip above."""
    assert {each.name for each in fields(Attempt)} == {
        *("number", "job_id", "site", "assigned", "submitted", "heard", "beat", "looks", "cancel_sent", "cancels"),
        *("ended", "abandoned", "forgotten", "withdrawn", "tokens", "reported", "watched", "log", "silence", "vain"),
    }


def test_records_of_other_releases_are_read() -> None:
    """Keys that are not known are left out, keys that are missing have their default."""
    (document,) = json.loads(codec.attempts_to_json((make_attempt("t"),)))
    for name in ("cancels", "beat", "silence", "vain", "abandoned", "forgotten", "tokens", "reported"):
        del document[name]
    document["of_a_newer_release"] = {"x": 1}
    document["log"]["new"] = 1
    assert codec.attempts_from_json(json.dumps([document])) == (make_attempt("t"),)


BODIES = st.builds(
    Bodies,
    contents=st.dictionaries(st.integers(0, 50), TEXT, max_size=4),
    streams=st.dictionaries(
        st.tuples(st.integers(1, 5), st.integers(0, 20), st.sampled_from(["stdout", "stderr"])), TEXT, max_size=4
    ),
    system=st.dictionaries(st.integers(0, 5), st.lists(TEXT, min_size=1, max_size=4), max_size=3),
)


@given(BODIES)
def test_bodies(bodies: Bodies) -> None:
    rows = codec.content_rows(bodies) + codec.stream_rows(bodies.streams)
    rows += [
        (codec.SYSTEM, number, at, line) for number, lines in bodies.system.items() for at, line in enumerate(lines)
    ]
    assert len({row[:3] for row in rows}) == len(rows)
    assert codec.bodies_from_rows(sorted(rows)) == bodies


@given(st.builds(Tail, attempt=WHOLE, executor=WHOLE, stdout=TEXT, stderr=TEXT, stdout_bytes=WHOLE, stderr_bytes=WHOLE))
def test_tails(tail: Tail) -> None:
    assert codec.tail_from_json(codec.tail_to_json(tail)) == tail


def test_nothing_to_keep() -> None:
    assert codec.content_rows(None) == []
    assert codec.bodies_from_rows([]) == Bodies()


def test_what_is_asked_for() -> None:
    assert codec.asked(make_task()) == (0.0, 0.0)
    assert codec.asked(make_task(resources={})) == (0.0, 0.0)
    assert codec.asked(make_task(resources={"cpu_cores": 3, "ram_gb": 0.25})) == (3.0, 0.25)
