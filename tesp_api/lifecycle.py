"""The state machine: which state may follow which, and the only functions that decide it.

Each function looks at a task as it was read and returns a `Change`, or None when there is nothing to do. Nothing here
does I/O. The store applies a Change only if the task is still at the version that was read; whoever loses that race
reads again. Sources: TES 1.1 `tesState`; where it is silent, docs/state-machine.md says what we chose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from pydantic import ValidationError

from tesp_api.runner import job
from tesp_api.task import ACTIVE, FINAL, Attempt, Observation, Phase, Task, job_id, rfc3339, storable
from tesp_api.tes import TesExecutorLog, TesOutputFileLog, TesState, TesTaskLog

TRANSITIONS: Final[Mapping[TesState, frozenset[TesState]]] = {
    TesState.QUEUED: frozenset({TesState.INITIALIZING, TesState.CANCELED, TesState.SYSTEM_ERROR}),
    # A short job may begin and end between two looks, so RUNNING can be passed over. Back to QUEUED is a retry.
    TesState.INITIALIZING: frozenset(
        {
            TesState.RUNNING,
            TesState.QUEUED,
            TesState.COMPLETE,
            TesState.EXECUTOR_ERROR,
            TesState.SYSTEM_ERROR,
            TesState.CANCELING,
        }
    ),
    TesState.RUNNING: frozenset(
        {
            TesState.QUEUED,
            TesState.COMPLETE,
            TesState.EXECUTOR_ERROR,
            TesState.SYSTEM_ERROR,
            TesState.CANCELING,
        }
    ),
    TesState.CANCELING: frozenset({TesState.CANCELED, TesState.SYSTEM_ERROR}),
}
"""Every allowed step. Final states are not here: they have no way out. PAUSED, UNKNOWN, PREEMPTED are never written."""

NEVER_STARTED = frozenset({job.EXIT_NO_RUNNER, 1, job.EXIT_DAMAGED_RUNNER, job.EXIT_BAD_PLAN})
"""Exit codes of the runner which say that no executor was started and that another try may help."""

NO_PYTHON = {
    job.EXIT_NO_PYTHON: "The site has no python3 on the PATH of its Pulsar; the runner needs Python 3.6 or newer.",
    job.EXIT_OLD_PYTHON: "The python3 of the site is too old; the runner needs Python 3.6 or newer.",
}

LONGEST_BACKOFF: Final = 300.0
"""Most seconds between a failed attempt and the next one."""

LONGEST_CLEAN_UP_PAUSE: Final = 600.0
"""Most seconds from one try to remove a finished job to the next."""

CLEAN_UP_FOR: Final = 7 * 86400.0
"""Seconds for which we try to remove a finished job from a site that does not answer."""


MOST_TOKENS: Final = 4
"""Submits of one job of which any may be the one that arrives."""

REPORTS_FOR: Final = 60.0
"""Seconds after a noted report for which the job counts as one that reports by itself."""

NOTED_FOR: Final = 10.0
"""Seconds after a noted report in which another one that brings no news need not be noted."""

WATCHED_FOR: Final = 2.0
"""Seconds for which a look at a job is for one who wants to see what it does."""

SOON: Final = 1.0
"""Seconds within which the next look at a job is soon enough for one who wants to see what it does."""


_RFC3339 = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})")


class Keep(Enum):
    """The type of KEEP."""

    KEEP = auto()


KEEP: Final = Keep.KEEP
"""In a Change: leave this as it is."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What to write to a task, provided that it is still at `version`.

    `state` None and `due_at` KEEP leave those as they are. `attempt` replaces the attempt of its number, or is
    appended as the next. `streams` and `system` are added to the task's bodies: (attempt number, executor index,
    "stdout" | "stderr") -> text, and lines for `system_of`, an attempt number, 0 before any attempt.
    """

    version: int
    state: TesState | None = None
    due_at: float | Keep | None = KEEP
    attempt: Attempt | None = None
    streams: Mapping[tuple[int, int, str], str] = field(default_factory=dict)
    system: tuple[str, ...] = ()
    system_of: int = 0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Durations in seconds, and counts, that the decisions depend on.

    `lease`: how long a process keeps what it took. `patience`: how long a job or its site may be silent while we look.
    `first_look`, `poll_interval`: the shortest and the longest pause between two looks. `cancel_grace`: how long a
    job has to stop by itself, and how long an ended job may take to leave its result. `max_attempts`: tries of a task
    altogether. `backoff`: the pause before the second one, doubled for each later one.
    """

    lease: float = 30.0
    patience: float = 300.0
    first_look: float = 0.1
    poll_interval: float = 5.0
    cancel_grace: float = 10.0
    max_attempts: int = 3
    backoff: float = 5.0


def longest_pause(policy: Policy) -> float:
    """Most seconds by which `due_at` is ahead of now, whatever is decided; more is left if the clock was set back."""
    looks = max(policy.first_look, policy.poll_interval, policy.patience / 3)
    return max(policy.lease, looks, LONGEST_BACKOFF, LONGEST_CLEAN_UP_PAUSE)


def _change(
    task: Task,
    state: TesState | None = None,
    *,
    due_at: float | Keep | None = KEEP,
    attempt: Attempt | None = None,
    streams: Mapping[tuple[int, int, str], str] | None = None,
    system: tuple[str, ...] = (),
) -> Change:
    if state is not None and state is not task.state and state not in TRANSITIONS.get(task.state, frozenset()):
        raise AssertionError(f"{task.state} -> {state} is no step of the state machine")
    number = attempt.number if attempt else len(task.tries)
    return Change(
        version=task.version,
        state=state,
        due_at=due_at,
        attempt=attempt,
        streams={key: storable(text) for key, text in (streams or {}).items()},
        system=tuple(storable(line) for line in system),
        system_of=number,
    )


# The way forward: QUEUED -> INITIALIZING -> RUNNING


def assign(task: Task, site: str, now: float, policy: Policy, *, token: str = "") -> Change | None:
    """Give a QUEUED task its next attempt at `site`. The job id is stored by this, before any submit.

    `token`: the hash of what the job names itself with when it reports; empty if it is not to report.
    """
    if task.state is not TesState.QUEUED:
        return None
    number = len(task.tries) + 1
    attempt = Attempt(
        number=number,
        job_id=job_id(task.id, number),
        site=site,
        assigned=now,
        heard=now,
        tokens=(token,) if token else (),
        log=TesTaskLog(logs=[], outputs=[], start_time=rfc3339(now), metadata={"site": site}),
    )
    return _change(task, TesState.INITIALIZING, due_at=now + policy.lease, attempt=attempt)


def with_token(task: Task, number: int, token: str) -> Change | None:
    """Attempt `number` is submitted again, with a token of this hash. Whichever of the submits arrives may report."""
    attempt = task.attempt
    if attempt is None or attempt.number != number or task.state not in ACTIVE:
        return None
    return _change(task, attempt=replace(attempt, tokens=(*attempt.tokens, token)[-MOST_TOKENS:]))


def unassign(task: Task, assigned: Task, now: float, *lines: str) -> Change | None:
    """Back to QUEUED, at its place there: the site has surely not heard of the job.

    `assigned` is the task as it was assigned. None if it has changed since: then another process may have sent the job.
    """
    attempt = task.attempt
    if task.version != assigned.version or task.state is not TesState.INITIALIZING or attempt is None:
        return None
    attempt = replace(attempt, withdrawn=True)
    change = _change(task, TesState.QUEUED, due_at=min(task.created, now), attempt=attempt, system=lines)
    return replace(change, system_of=len(task.attempts) - 1)


def confirmed(task: Task, number: int, now: float, policy: Policy) -> Change | None:
    """The site has taken the job of attempt `number`: look at it soon."""
    attempt = task.attempt
    if attempt is None or attempt.number != number or attempt.submitted is not None or task.state not in ACTIVE:
        return None
    attempt = replace(attempt, submitted=now, heard=now, silence=0.0, vain=None, looks=0)
    return _change(task, due_at=now + policy.first_look, attempt=attempt)


def next_look(attempt: Attempt, now: float, policy: Policy, *, canceling: bool = False) -> float:
    """When to look at a job again: after a tenth of its age, within bounds; often while it is cancelled.

    No container task is quicker than `first_look`, so half of that is the least pause. A job that reports by itself is
    only looked at for the case that it does so no more.
    """
    if reports(attempt, now) and not canceling:
        return now + max(policy.poll_interval, min(6 * policy.poll_interval, policy.patience / 3))
    age = now - (attempt.cancel_sent if canceling and attempt.cancel_sent else attempt.submitted or attempt.assigned)
    return now + min(max(0.1 * age, 0.5 * policy.first_look), policy.poll_interval)


def reports(attempt: Attempt, now: float) -> bool:
    """Whether the job tells by itself how it is."""
    return attempt.reported is not None and 0 <= now - attempt.reported < REPORTS_FOR


def look_now(task: Task, now: float) -> Change | None:
    """Somebody wants to see what a running task does. None: it is looked at soon anyway, or tells by itself.

    The next look may be near and yet not bring what somebody wants to see: where that is dear, only who is watched is
    looked at so closely.
    """
    attempt = task.attempt
    if task.state is not TesState.RUNNING or attempt is None or reports(attempt, now) or task.due_at is None:
        return None
    soon = task.due_at - now <= SOON
    if soon and is_watched(attempt, now):
        return None
    return _change(task, due_at=KEEP if soon else now, attempt=replace(attempt, watched=now))


def is_watched(attempt: Attempt, now: float) -> bool:
    """Whether somebody has just wanted to see what the job does."""
    return attempt.watched is not None and 0 <= now - attempt.watched < WATCHED_FOR


def wait(task: Task, now: float, reason: str, *, pause: float) -> Change:
    """Leave the task as it is and look again after `pause` seconds; `reason` is noted once, not at each look."""
    attempt = task.attempt if task.state in ACTIVE else None  # to wait for room is no look at the attempt before
    noted = attempt is None or attempt.looks > 0
    if attempt is not None:
        attempt = replace(attempt, looks=attempt.looks + 1)
    return _change(task, due_at=now + pause, attempt=attempt, system=() if noted or not reason else (reason,))


def hold(task: Task, now: float, line: str = "", *, pause: float = 0.0) -> Change | None:
    """Put a QUEUED task back at its place in the queue, or off for a pause; `line` says why it waits."""
    if task.state is not TesState.QUEUED:
        return None
    return _change(task, due_at=now + pause if pause else min(task.created, now), system=(line,) if line else ())


def refused(task: Task, number: int, now: float, reason: str) -> Change | None:
    """Attempt `number` cannot be had at its site: it has not begun, and will not."""
    attempt = task.attempt
    if attempt is None or attempt.number != number or task.state not in ACTIVE:
        return None
    return _over(task, attempt, now, reason)


def silent(task: Task, now: float, reason: str, policy: Policy) -> Change:
    """The site gave no usable answer about an active task: try later; when patience is over, the attempt has failed."""
    assert task.attempt is not None, "an active task has an attempt"
    attempt = _in_vain(task.attempt, now, policy)
    quiet = f"The site {attempt.site!r} was silent for {attempt.silence:.0f} s: {reason}"
    if (change := _given_up(task, attempt, now, quiet, policy)) is not None:
        return change
    lines = _warning(task.attempt, attempt, quiet, policy)
    task = replace(task, attempts=(*task.attempts[:-1], attempt))
    change = wait(task, now, reason, pause=min(0.2 * 2 ** min(attempt.looks, 10), policy.poll_interval))
    return replace(change, system=(*change.system, *lines))


def _in_vain(attempt: Attempt, now: float, policy: Policy) -> Attempt:
    """After one more look without a sign of life.

    Between two looks may lie more than their pause, as we, the store or the clock were away: that is no silence.
    """
    passed = now - attempt.vain if attempt.vain is not None else 0.0
    longest = max(policy.patience / 3, policy.poll_interval)
    return replace(attempt, vain=now, silence=attempt.silence + min(max(passed, 0.0), longest))


def _given_up(task: Task, attempt: Attempt, now: float, reason: str, policy: Policy) -> Change | None:
    """Once patience is over: the attempt has failed for `reason`, or its cancel, as CANCELED would claim too much."""
    if attempt.silence <= policy.patience:
        return None
    if attempt.cancel_sent is not None:
        return give_up(task, now, f"The site {attempt.site!r} has not confirmed the cancel.", attempt=attempt)
    return _failed(task, attempt, now, reason, policy)


def _warning(before: Attempt, after: Attempt, quiet: str, policy: Policy) -> tuple[str, ...]:
    """What is said of each silence once, as soon as half of patience is over; it may pass."""
    if after.cancel_sent is not None or not before.silence <= policy.patience / 2 < after.silence:
        return ()
    return (storable(f"{quiet} (given up after {policy.patience:g} s)"),)


def unreachable(task: Task, now: float, reason: str, policy: Policy) -> Change | None:
    """The site of an active task can be asked no more, for `reason`."""
    attempt = task.attempt
    if attempt is None or task.state not in ACTIVE:
        return None
    return _failed(task, attempt, now, reason, policy)


# Looking at a job


def observed(task: Task, seen: Observation, now: float, policy: Policy) -> Change | None:
    """What an observation of the current attempt's job means. None: it is about another attempt, or too late."""
    attempt = task.attempt
    if attempt is None or attempt.job_id != seen.job_id or task.state not in ACTIVE:
        return None
    if seen.result is not None:
        return _ended(task, seen.result, now, policy)
    before, attempt = attempt, _heard(attempt, seen, now, policy)
    if seen.exit_code != job.EXIT_DUPLICATE:  # a second start that stood back says nothing of the first
        if seen.exit_code in NO_PYTHON:
            reason = NO_PYTHON[seen.exit_code]
            last = _is_last(task, policy)
            return (
                _over(task, attempt, now, reason) if last else _again(task, attempt, now, reason, pause=policy.backoff)
            )
        if seen.exit_code in NEVER_STARTED and not _has_started(task, seen):
            reason = f"The runner could not start (exit code {seen.exit_code})."
            return _over(task, attempt, now, reason) if _is_last(task, policy) else _again(task, attempt, now, reason)
        if seen.phase in (Phase.ENDED, Phase.UNKNOWN):
            return _gone(task, attempt, seen, now, policy)
    quiet = f"The job showed no sign of life for {now - (attempt.heard or attempt.assigned):.0f} s."
    if (change := _given_up(task, attempt, now, quiet, policy)) is not None:
        return change
    so_far = f"The job showed no sign of life for {attempt.silence:.0f} s."
    return _going_on(task, attempt, seen, now, policy, lines=_warning(before, attempt, so_far, policy))


def reported(task: Task, seen: Observation, now: float, policy: Policy) -> Change | None:
    """What a job's own report means. None also if it brings nothing to be kept: most only show that the job lives."""
    change, attempt = observed(task, seen, now, policy), task.attempt
    if change is None or change.state is not None or attempt is None:
        return change
    if seen.progress is not None and seen.progress.phase == "done":  # its result was too long for a report
        return replace(change, due_at=now)
    if attempt.submitted is None or attempt.reported is None or not 0 <= now - attempt.reported < NOTED_FOR:
        return change
    return None


def _heard(attempt: Attempt, seen: Observation, now: float, policy: Policy) -> Attempt:
    attempt = replace(attempt, reported=now) if seen.reported else attempt
    attempt = replace(attempt, looks=attempt.looks + 1, submitted=attempt.submitted or _known_since(seen, now))
    beat = seen.progress.beat if seen.progress else -1
    lives = beat > attempt.beat or seen.phase is Phase.WAITING  # a queue may be long, and a waiting job has no pulse
    if lives or seen.phase is Phase.RUNNING:
        # `lost` can be taken back: what runs has not ended, and when it does, its result has the whole grace to appear.
        attempt = replace(attempt, ended=None)
    if lives:
        attempt = replace(attempt, beat=max(beat, attempt.beat), heard=now)
    if lives and attempt.cancel_sent is None:  # of what is to stop, life is not what we look for
        return replace(attempt, silence=0.0, vain=None)
    return _in_vain(attempt, now, policy)


def _known_since(seen: Observation, now: float) -> float | None:
    """A site that cannot tell says RUNNING; without a progress that does not show that the submit has arrived."""
    known = seen.progress is not None or seen.phase in (Phase.WAITING, Phase.ENDED)
    return now if known else None


def has_begun(seen: Observation) -> bool:
    """Whether a runner has taken the job."""
    return seen.result is not None or (seen.progress is not None and seen.progress.phase != "waiting")


def _has_started(task: Task, seen: Observation) -> bool:
    return task.state is TesState.RUNNING or (seen.progress is not None and seen.progress.started is not None)


def _going_on(
    task: Task, attempt: Attempt, seen: Observation, now: float, policy: Policy, *, lines: tuple[str, ...]
) -> Change:
    state = None
    if task.state is TesState.INITIALIZING and seen.progress is not None and seen.progress.started:
        state = TesState.RUNNING
    canceling = task.state is TesState.CANCELING
    due_at = next_look(attempt, now, policy, canceling=canceling)
    return _change(task, state, due_at=due_at, attempt=attempt, system=lines)


def _gone(task: Task, attempt: Attempt, seen: Observation, now: float, policy: Policy) -> Change:
    """The job is over or unknown, and there is no result: it may still come (or be found again), so wait a little."""
    attempt = replace(attempt, ended=min(attempt.ended or now, now))  # the clock may have gone back
    assert attempt.ended is not None
    grace = policy.cancel_grace
    if seen.phase is Phase.UNKNOWN:
        # A submit under way may yet land; and a Pulsar that starts can say `lost` of a job that it is about to run.
        grace = max(grace, attempt.assigned + policy.lease - attempt.ended) if attempt.submitted is None else grace
    if now - attempt.ended < grace:
        pause = min(max(0.05, 0.2 * (now - attempt.ended)), 1.0)
        return _change(task, due_at=now + pause, attempt=attempt)
    if task.state is TesState.CANCELING:
        return _over(task, attempt, now, _words(seen))
    return _failed(task, attempt, now, _words(seen), policy)


def _words(seen: Observation) -> str:
    if seen.phase is Phase.UNKNOWN:
        return "The site does not know the job any more" + (f": {seen.detail}" if seen.detail else ".")
    code = f" (exit code {seen.exit_code})" if seen.exit_code is not None else ""
    return f"The job ended without a result{code}" + (f": {seen.detail}" if seen.detail else ".")


# The ends


def _ended(task: Task, result: job.Result, now: float, policy: Policy) -> Change:
    attempt = task.attempt
    assert attempt is not None
    try:
        log, streams = _task_log(attempt, result)
        state = TesState(result.state)
        system = tuple(str(line) for line in result.system_logs)
    except (ValidationError, ValueError, TypeError, AttributeError, OverflowError) as error:
        return give_up(task, now, f"The job left a result that cannot be read: {_first_fault(error)}")
    may_help = state is TesState.SYSTEM_ERROR and result.infrastructure is True
    if task.state is TesState.CANCELING:
        state = TesState.CANCELED
    elif state is TesState.CANCELED or state not in FINAL:
        system = (*system, "The job was stopped at the site, not by a cancel of this task.")
        state = TesState.SYSTEM_ERROR
    if state is TesState.SYSTEM_ERROR and not system:
        system = ("The job failed at the site, and its result does not say why.",)
    attempt = replace(attempt, log=log)
    if may_help and not _is_last(task, policy):
        return _again(task, attempt, now, *system, pause=_backoff(attempt, policy), streams=streams)
    return _finish(task, state, attempt, now, system=system, streams=streams)


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
    return str(error).partition("\n")[0]


def _task_log(attempt: Attempt, result: job.Result) -> tuple[TesTaskLog, dict[tuple[int, int, str], str]]:
    streams: dict[tuple[int, int, str], str] = {}
    for index, executor in enumerate(result.executors):
        for name, text in (("stdout", executor.stdout), ("stderr", executor.stderr)):
            if text:
                streams[attempt.number, index, name] = str(text)
    logs = [
        TesExecutorLog(exit_code=each.exit_code, start_time=_time(each.start_time), end_time=_time(each.end_time))
        for each in result.executors
    ]
    outputs = [
        TesOutputFileLog(url=storable(each.url), path=storable(each.path), size_bytes=int(each.size_bytes))
        for each in result.outputs
    ]
    told = {storable(str(key)): storable(str(value)) for key, value in result.metadata.items()}
    metadata = {**told, **(attempt.log.metadata or {})}  # what we know is not for the node to say
    log = TesTaskLog(
        logs=logs,
        outputs=outputs,
        metadata=metadata,
        start_time=attempt.log.start_time,
        end_time=_time(result.end_time),
    )
    return log, streams


def _time(text: str) -> str | None:
    """A node's word for a time, or None: TES wants RFC 3339, and without a time the rest of a result is as good."""
    return text if _RFC3339.fullmatch(text) else None


def _finish(
    task: Task,
    state: TesState,
    attempt: Attempt,
    now: float,
    *,
    system: tuple[str, ...] = (),
    streams: Mapping[tuple[int, int, str], str] | None = None,
    abandoned: bool = False,
) -> Change:
    log = attempt.log
    if not log.end_time:
        log = log.model_copy(update={"end_time": rfc3339(now)})
    attempt = replace(attempt, log=log, ended=now, abandoned=abandoned, looks=0)
    return _change(task, state, due_at=now, attempt=attempt, system=system, streams=streams)


def give_up(task: Task, now: float, reason: str, *, attempt: Attempt | None = None) -> Change:
    """End the task as SYSTEM_ERROR for `reason`, a sentence. What may be left at the site is cleaned up after."""
    attempt = attempt or task.attempt
    if attempt is None or attempt.withdrawn:
        due_at = now if task.tries else None
        return _change(task, TesState.SYSTEM_ERROR, due_at=due_at, system=(reason,))
    return _finish(task, TesState.SYSTEM_ERROR, attempt, now, system=(reason,), abandoned=True)


def _over(task: Task, attempt: Attempt, now: float, reason: str) -> Change:
    """Nothing of the job runs and no other try would help: CANCELED if that was the wish, else SYSTEM_ERROR."""
    if task.state is TesState.CANCELING:
        return _finish(task, TesState.CANCELED, attempt, now, system=(reason,), abandoned=True)
    return give_up(task, now, reason, attempt=attempt)


# Another attempt


def _failed(task: Task, attempt: Attempt, now: float, reason: str, policy: Policy) -> Change:
    """The infrastructure has failed this attempt, which may still run: the next one after a pause, or the end."""
    if _is_last(task, policy):
        return give_up(task, now, reason, attempt=attempt)
    return _again(task, attempt, now, reason, pause=_backoff(attempt, policy))


def _is_last(task: Task, policy: Policy) -> bool:
    """Whether no attempt may follow: the user wants none, or all are used up."""
    return task.state is TesState.CANCELING or len(task.attempts) >= policy.max_attempts


def _backoff(attempt: Attempt, policy: Policy) -> float:
    return min(policy.backoff * 2.0 ** (attempt.number - 1), LONGEST_BACKOFF)


def _again(
    task: Task,
    attempt: Attempt,
    now: float,
    *reasons: str,
    pause: float = 0.0,
    streams: Mapping[tuple[int, int, str], str] | None = None,
) -> Change:
    """Back into the queue for the next attempt. This one keeps its log; what may be left of it is cleaned up later."""
    change = _finish(task, TesState.QUEUED, attempt, now, system=reasons, streams=streams, abandoned=True)
    return replace(change, due_at=now + pause)


# Cancel


def cancel(task: Task, now: float) -> Change | None:
    """The user's wish. None: the task is final or the wish is known. A QUEUED task is CANCELED at once."""
    if task.state is TesState.QUEUED:
        # Attempts that were given up may have left jobs to kill and clean up; due now then, never again otherwise.
        return _change(task, TesState.CANCELED, due_at=now if task.attempts else None)
    if task.state in (TesState.INITIALIZING, TesState.RUNNING):
        return _change(task, TesState.CANCELING, due_at=now)
    return None


def asked_to_stop(task: Task, now: float) -> Change | None:
    """The site has been asked once more to stop the job."""
    attempt = task.attempt
    if task.state is not TesState.CANCELING or attempt is None:
        return None
    if not attempt.cancels:  # one that did not arrive has asked for nothing
        attempt = replace(attempt, cancel_sent=now, silence=0.0, vain=now)
    attempt = replace(attempt, cancels=attempt.cancels + 1)
    return _change(task, due_at=next_look(attempt, now, Policy(), canceling=True), attempt=attempt)


def could_not_stop(task: Task, began: float) -> Change | None:
    """The request that was begun then has not arrived, as far as we know. Only the first of these is noted."""
    attempt = task.attempt
    if task.state is not TesState.CANCELING or attempt is None or attempt.cancel_sent is not None:
        return None
    return _change(task, attempt=replace(attempt, cancel_sent=began))


def must_stop(task: Task, now: float, policy: Policy) -> bool | None:
    """Whether to ask the site to stop the job now: None no, False gently, True by force.

    What is asked gently may need more of the site than a kill does, such as room for a small job that writes a file.
    """
    attempt = task.attempt
    if task.state is not TesState.CANCELING or attempt is None:
        return None
    if attempt.cancel_sent is None:
        return False
    if now - attempt.cancel_sent > policy.cancel_grace * max(1, attempt.cancels):
        return True
    return None if attempt.cancels else False


# After the end


def is_over(task: Task | None, number: int) -> bool:
    """Whether a job of attempt `number` that reaches its site only now is of no use to anyone, and nobody else's care.

    An attempt that left its result is not meant: its site has had the job, and the usual clean-up takes it.
    """
    attempt = task.attempt if task is not None else None
    if task is None or attempt is None or attempt.number != number:
        return True
    return task.state not in ACTIVE and (attempt.abandoned or attempt.forgotten)


def left_behind(task: Task, number: int, now: float) -> Change | None:
    """Something of the over attempt `number` is at its site, contrary to what was noted: clean up (again)."""
    found = [each for each in task.attempts if each.number == number]
    if not found or not is_over(task, number):
        return None
    attempt = replace(found[0], ended=found[0].ended or now, abandoned=True, forgotten=False, looks=0)
    return _change(task, due_at=now if task.final else KEEP, attempt=attempt)


def running_on(task: Task) -> tuple[Attempt, ...]:
    """Earlier attempts of which something may still run. The site of one may have been silent when the next began."""
    return tuple(each for each in task.attempts[:-1] if each.abandoned and not each.forgotten)


def unforgotten(task: Task) -> tuple[Attempt, ...]:
    """Ended attempts of which the site may still keep something."""
    return tuple(each for each in task.attempts if each.ended is not None and not each.forgotten)


def forgotten(task: Task, numbers: frozenset[int], now: float, policy: Policy) -> Change | None:
    """The site keeps nothing more of the attempts `numbers`; the rest is tried again later, for a week at most.

    One attempt is written at a time: to be repeated for each of them.
    """
    if not task.final:  # earlier attempts while a later one is under way
        gone = [each for each in running_on(task) if each.number in numbers]
        return _change(task, attempt=replace(gone[0], forgotten=True)) if gone else None
    left = [each for each in unforgotten(task) if each.number not in numbers]
    done = [each for each in task.attempts if each.number in numbers and not each.forgotten]
    attempt = replace(done[0], forgotten=True) if done else None
    if attempt is None and left:
        attempt = replace(left[0], looks=left[0].looks + 1)
        ended = max(each.ended or now for each in left)
        if now - ended > CLEAN_UP_FOR:
            return _change(task, due_at=None, attempt=attempt)
        pause = min(0.1 * 2 ** min(left[0].looks, 13), LONGEST_CLEAN_UP_PAUSE)
        return _change(task, due_at=now + pause, attempt=attempt)
    return _change(task, due_at=KEEP if len(done) > 1 else now if left else None, attempt=attempt)
