"""Our record around a TES task: what the store keeps and the dispatcher moves.

`Task` is what the store hands out, `Change` (in lifecycle) what it takes back; both are plain frozen values. The
nested TES models are not repeated here: TES is a published language and its models serve inside as well.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property

from tesp_api.runner import job
from tesp_api.tes import TesState, TesTask, TesTaskLog

FINAL = frozenset(
    {TesState.COMPLETE, TesState.EXECUTOR_ERROR, TesState.SYSTEM_ERROR, TesState.CANCELED, TesState.PREEMPTED}
)
"""States that have no way out."""

ACTIVE = frozenset({TesState.INITIALIZING, TesState.RUNNING, TesState.CANCELING})
"""States in which a task holds a place at a site."""


MANY = 1000
"""Output files of one attempt; more of them are gone through in a thread."""


def rfc3339(moment: float) -> str:
    """Seconds since the epoch as `2026-01-31T12:00:00.000000Z`."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Phase(StrEnum):
    """What a site can say of a job; TES states are none of its business."""

    UNKNOWN = "unknown"  # the site does not know the job (any more, or yet)
    WAITING = "waiting"  # accepted, the runner has not begun
    RUNNING = "running"
    ENDED = "ended"  # the job's process is over, with or without a result


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a site knows of one job at one moment. `exit_code` is the runner's, where the site tells it.

    `reported`: the job has sent this by itself, so it need not be asked often.
    """

    job_id: str
    phase: Phase
    progress: job.Progress | None = None
    result: job.Result | None = None
    exit_code: int | None = None
    detail: str = ""
    reported: bool = False

    @property
    def long(self) -> bool:
        """Whether its result has so many rows that others should not wait while they are gone through."""
        return self.result is not None and len(self.result.outputs) > MANY


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try of a task on one site. Times are seconds since the epoch by our clock.

    `submitted` is None until the site has confirmed the job; a job whose submit may be lost is submitted again under
    the same `job_id`. `heard` is when the job last showed that it is alive, `beat` the count that it showed then.
    `silence` is for how many seconds we have looked in vain for that since (or, once it is asked to stop, for its end),
    `vain` when we last did; time in which nobody looked is not in it.
    `looks` counts the looks at it since its last step. `cancels` counts our requests to stop that arrived, the first
    at `cancel_sent`; as long as none did, that is when we first tried. `ended` is when we saw it over, or gave it up;
    `abandoned` says the latter: something of it may still run. `forgotten`: nothing of it is left at the site.
    `withdrawn`: its site never heard of it, so that it is no attempt at all: the next one takes its place, and nobody
    is shown it.
    `tokens`: hashes of what the job may name itself with when it reports, one for each of the latest submits;
    `reported` is when a report was last noted here. `watched` is when somebody last wanted to see what the job does.
    `log` is TES's, without the texts that `Task.bodies` holds.
    """

    number: int
    job_id: str
    site: str
    assigned: float
    submitted: float | None = None
    heard: float | None = None
    beat: int = -1
    silence: float = 0.0
    vain: float | None = None
    looks: int = 0
    cancel_sent: float | None = None
    cancels: int = 0
    ended: float | None = None
    abandoned: bool = False
    forgotten: bool = False
    tokens: tuple[str, ...] = ()
    reported: float | None = None
    withdrawn: bool = False
    watched: float | None = None
    log: TesTaskLog = field(default_factory=lambda: TesTaskLog(logs=[], outputs=[]))


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The end of what the running executor has written so far, and how many bytes that was altogether.

    `attempt` is a number, `executor` an index.
    """

    attempt: int
    executor: int
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0


@dataclass(frozen=True)
class Bodies:
    """The long texts of a task, which live outside its hot record.

    `contents`: input index -> literal content. `streams`: (attempt number, executor index, "stdout" | "stderr") ->
    text. `system`: attempt number -> lines; number 0 holds what was said before any attempt. `tail`: what the executor
    that runs has said so far.
    """

    contents: Mapping[int, str] = field(default_factory=dict)
    streams: Mapping[tuple[int, int, str], str] = field(default_factory=dict)
    system: Mapping[int, Sequence[str]] = field(default_factory=dict)
    tail: Tail | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task as the store knows it.

    `document` is the client's task as cleaned JSON text (no nulls, no read-only fields, input contents taken out);
    `spec` is the same as a model. `due_at` (seconds since the epoch, or None) is queue, lease, poll timer and backoff
    in one. `version` grows with every change. `bodies` is None unless it was asked for.
    """

    id: str
    document: str
    created: float
    owner: str = ""
    state: TesState = TesState.QUEUED
    due_at: float | None = None
    version: int = 1
    attempts: tuple[Attempt, ...] = ()
    bodies: Bodies | None = None

    @cached_property
    def spec(self) -> TesTask:
        """The client's task, without read-only fields and input contents."""
        return TesTask.model_validate_json(self.document)

    @property
    def attempt(self) -> Attempt | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def tries(self) -> tuple[Attempt, ...]:
        """The attempts that count: all but a withdrawn one, which can only be the last."""
        return self.attempts[:-1] if self.attempts and self.attempts[-1].withdrawn else self.attempts

    @property
    def final(self) -> bool:
        """Whether the state can change no more."""
        return self.state in FINAL


def new_task(spec: TesTask, *, owner: str = "", now: float | None = None) -> Task:
    """A QUEUED task, due at once, around a validated request. Input contents move to `bodies`."""
    created = time.time() if now is None else now
    contents: dict[int, str] = {}
    inputs = []
    for index, item in enumerate(spec.inputs or []):
        if item.content is not None:
            contents[index] = item.content
            item = item.model_copy(update={"content": None})
        inputs.append(item)
    if contents:
        spec = spec.model_copy(update={"inputs": inputs})
    document = spec.model_dump_json(exclude_none=True, exclude=READ_ONLY)
    task = Task(
        id=new_id(created),
        document=document,
        created=created,
        owner=owner,
        due_at=created,
        bodies=Bodies(contents=contents),
    )
    task.__dict__["spec"] = spec  # it is at hand, so the cached property need not read the document again
    return task


READ_ONLY = {"id", "state", "logs", "creation_time"}
"""Fields of a TES task that only the server sets."""

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_last_id = 0
_id_lock = threading.Lock()
_bits: list[int] = []
_bits_of = 0  # the process that drew them: a fork must not use them as well


def new_id(now: float) -> str:
    """A task id: 26 characters of Crockford's base 32, 48 bits of milliseconds and 80 random bits.

    Ids sort by creation time, within one process strictly, so that newest first is descending id.
    """
    global _last_id
    with _id_lock:
        number = (int(now * 1000) << 80) | _random_bits()
        if number <= _last_id:  # the same millisecond, or the clock went back
            number = _last_id + 1 + (number & 0xFFFFFFFFFF)  # of the random bits, which went nowhere else
        _last_id = number
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -10, -10)])


def _random_bits() -> int:
    """80 random bits, drawn in stock: each draw lets go of the interpreter, which then has to be waited for."""
    global _bits_of
    if not _bits or _bits_of != os.getpid():
        stock = secrets.token_bytes(10 * 256)
        _bits[:] = [int.from_bytes(stock[at : at + 10]) for at in range(0, len(stock), 10)]
        _bits_of = os.getpid()
    return _bits.pop()


def job_id(task_id: str, number: int) -> str:
    """The id of attempt `number` (from 1) at its site; never used twice."""
    return f"{task_id}-{number}"


def task_of(job: str) -> tuple[str, int]:
    """Task id and attempt number of a job id; ValueError if it is none of ours."""
    task_id, _, number = job.rpartition("-")
    if not task_id:
        raise ValueError(f"{job!r} is not a job id")
    return task_id, int(number)


def tail_of(job_id: str, progress: job.Progress | None) -> Tail | None:
    """What a job's progress shows of its output; None if that is nothing."""
    if progress is None or progress.stdout_bytes + progress.stderr_bytes == 0:
        return None
    _, number = task_of(job_id)
    return Tail(
        attempt=number,
        executor=progress.executor,
        stdout=storable(progress.stdout),
        stderr=storable(progress.stderr),
        stdout_bytes=progress.stdout_bytes,
        stderr_bytes=progress.stderr_bytes,
    )


def storable(text: str) -> str:
    """Text from a node or an error, without the lone surrogates that no store takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def token_hash(token: str) -> str:
    """What is kept of a token. A plain hash will do: nobody guesses 32 random bytes."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def put_attempt(attempts: tuple[Attempt, ...], attempt: Attempt) -> tuple[Attempt, ...]:
    """`attempts` with `attempt` in its place: replaced by number, or appended when it is the next one."""
    at = attempt.number - 1
    if at > len(attempts) or at < 0:
        raise ValueError(f"attempt {attempt.number} after {len(attempts)}")
    return (*attempts[:at], attempt, *attempts[at + 1 :])


__all__ = [
    "ACTIVE",
    "FINAL",
    "MANY",
    "READ_ONLY",
    "Attempt",
    "Bodies",
    "Observation",
    "Phase",
    "Tail",
    "Task",
    "job_id",
    "new_id",
    "new_task",
    "put_attempt",
    "replace",
    "rfc3339",
    "storable",
    "tail_of",
    "task_of",
    "token_hash",
]
