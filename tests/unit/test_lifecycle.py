"""The state machine: every step, every race that can be told with plain values and a hand clock."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tesp_api import lifecycle
from tesp_api.lifecycle import KEEP, NO_PYTHON, TRANSITIONS, Change, Policy
from tesp_api.runner import job
from tesp_api.store.codec import attempts_from_json, attempts_to_json
from tesp_api.task import ACTIVE, FINAL, Attempt, Observation, Phase, Task, job_id, put_attempt, rfc3339
from tesp_api.tes import TesState
from tests.builders import NOW, make_attempt, make_task

S = TesState
POLICY = Policy(lease=30, patience=300, poll_interval=5, cancel_grace=10, max_attempts=3, backoff=5)
ONCE = replace(POLICY, max_attempts=1)


def applied(task: Task, change: Change | None) -> Task:
    """What the store makes of a change."""
    assert change is not None
    assert change.version == task.version
    return replace(
        task,
        version=task.version + 1,
        state=change.state or task.state,
        due_at=task.due_at if change.due_at is KEEP else change.due_at,  # type: ignore[arg-type]
        attempts=put_attempt(task.attempts, change.attempt) if change.attempt else task.attempts,
    )


def task_in(state: S, **attempt: Any) -> Task:
    """A task in a state, with one attempt if such a task has one."""
    task = make_task(record={"state": state})
    if state is S.QUEUED and not attempt:
        return task
    values = {"assigned": NOW, "heard": NOW, "submitted": NOW, **attempt}
    return replace(task, attempts=(make_attempt(task.id, **values),))


def seen(task: Task, phase: Phase = Phase.RUNNING, *, beat: int | None = None, **fields: Any) -> Observation:
    assert task.attempt is not None
    if beat is not None:
        fields["progress"] = job.Progress(
            task.attempt.job_id, "running", beat=beat, started=fields.pop("started", None)
        )
    return Observation(job_id=task.attempt.job_id, phase=phase, **fields)


def result(task: Task, state: str = "COMPLETE", **fields: Any) -> Observation:
    assert task.attempt is not None
    times = {"start_time": "2026-01-31T12:00:00.000000Z", "end_time": "2026-01-31T12:00:05.000000Z"}
    made = job.Result(job_id=task.attempt.job_id, state=state, **{**times, **fields})
    return Observation(job_id=task.attempt.job_id, phase=Phase.ENDED, result=made)


def last(task: Task) -> Attempt:
    assert task.attempt is not None
    return task.attempt


# The table

ALLOWED = {
    (S.QUEUED, S.INITIALIZING),
    (S.QUEUED, S.CANCELED),
    (S.QUEUED, S.SYSTEM_ERROR),
    (S.INITIALIZING, S.RUNNING),
    (S.INITIALIZING, S.QUEUED),
    (S.INITIALIZING, S.COMPLETE),
    (S.INITIALIZING, S.EXECUTOR_ERROR),
    (S.INITIALIZING, S.SYSTEM_ERROR),
    (S.INITIALIZING, S.CANCELING),
    (S.RUNNING, S.QUEUED),
    (S.RUNNING, S.COMPLETE),
    (S.RUNNING, S.EXECUTOR_ERROR),
    (S.RUNNING, S.SYSTEM_ERROR),
    (S.RUNNING, S.CANCELING),
    (S.CANCELING, S.CANCELED),
    (S.CANCELING, S.SYSTEM_ERROR),
}


@pytest.mark.parametrize("before", S)
@pytest.mark.parametrize("after", S)
def test_every_pair_of_states(before: S, after: S) -> None:
    assert (after in TRANSITIONS.get(before, ())) == ((before, after) in ALLOWED)
    task = task_in(before)
    if (before, after) in ALLOWED or before is after:
        assert lifecycle._change(task, after).state is after
    else:
        with pytest.raises(AssertionError, match="is no step"):
            lifecycle._change(task, after)


@pytest.mark.parametrize("state", sorted(FINAL))
def test_nothing_moves_a_final_task(state: S) -> None:
    task = task_in(state, ended=NOW)
    number = last(task).number
    for change in (
        lifecycle.assign(task, "x", NOW, POLICY),
        lifecycle.confirmed(task, number, NOW, POLICY),
        lifecycle.refused(task, number, NOW, "no"),
        lifecycle.observed(task, result(task), NOW, POLICY),
        lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + 1e6, POLICY),
        lifecycle.cancel(task, NOW),
        lifecycle.asked_to_stop(task, NOW),
    ):
        assert change is None
    assert lifecycle.must_stop(task, NOW, POLICY) is None


# The way forward


@pytest.mark.parametrize("state", sorted(set(S) - {S.QUEUED}))
def test_only_queued_tasks_are_assigned(state: S) -> None:
    assert lifecycle.assign(task_in(state), "x", NOW, POLICY) is None


def test_assign_notes_the_job_id_before_any_submit() -> None:
    task = applied(task := make_task(), lifecycle.assign(task, "x", NOW, POLICY))
    attempt = last(task)
    assert (task.state, task.due_at) == (S.INITIALIZING, NOW + 30)
    assert (attempt.number, attempt.job_id, attempt.site, attempt.submitted) == (1, f"{task.id}-1", "x", None)
    assert attempt.log.start_time
    assert attempt.log.metadata == {"site": "x"}


def test_confirmed_once_and_only_the_current_attempt() -> None:
    task = task_in(S.INITIALIZING, submitted=None)
    assert lifecycle.confirmed(task, 2, NOW, POLICY) is None
    task = applied(task, lifecycle.confirmed(task, 1, NOW + 1, POLICY))
    assert (last(task).submitted, task.due_at) == (NOW + 1, pytest.approx(NOW + 1 + POLICY.first_look))
    assert lifecycle.confirmed(task, 1, NOW, POLICY) is None
    assert lifecycle.confirmed(task_in(S.QUEUED, submitted=None, ended=NOW), 1, NOW, POLICY) is None


def test_running_begins_with_the_first_executor() -> None:
    task = task_in(S.INITIALIZING)
    staging = applied(task, lifecycle.observed(task, seen(task, beat=1), NOW + 1, POLICY))
    assert staging.state is S.INITIALIZING
    running = applied(staging, lifecycle.observed(staging, seen(staging, beat=2, started="t"), NOW + 2, POLICY))
    assert running.state is S.RUNNING
    again = applied(running, lifecycle.observed(running, seen(running, beat=3), NOW + 3, POLICY))
    assert again.state is S.RUNNING, "never back"


@pytest.mark.parametrize("state", ["COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR"])
@pytest.mark.parametrize("before", [S.INITIALIZING, S.RUNNING])
def test_the_result_is_the_truth(before: S, state: str) -> None:
    task = task_in(before, log={"metadata": {"site": "here"}})
    executor = job.ExecutorResult(3, "a", "b", "out", "")
    output = job.OutputFile("s3://x", "/x", 5)
    change = lifecycle.observed(
        task,
        result(
            task,
            state,
            executors=[executor],
            outputs=[output],
            system_logs=["l"],
            metadata={"runtime": "docker", "site": "elsewhere"},
        ),
        NOW,
        POLICY,
    )
    done = applied(task, change)
    assert change is not None
    assert (done.state, done.due_at) == (S(state), NOW)
    assert change.streams == {(1, 0, "stdout"): "out"}
    assert (change.system, change.system_of) == (("l",), 1)
    log = last(done).log
    assert (log.logs[0].exit_code, log.outputs[0].size_bytes, log.end_time) == (3, 5, "2026-01-31T12:00:05.000000Z")
    assert log.metadata == {"runtime": "docker", "site": "here"}
    assert not last(done).abandoned


def test_a_stop_that_nobody_wished_is_an_error() -> None:
    task = task_in(S.RUNNING)
    change = lifecycle.observed(task, result(task, "CANCELED"), NOW, POLICY)
    assert applied(task, change).state is S.SYSTEM_ERROR
    assert change is not None
    assert "not by a cancel" in change.system[-1]


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "DONE"},
        {"state": None},
        {"state": []},
        {"executors": None},
        {"executors": [job.ExecutorResult(None, "", "")]},  # type: ignore[arg-type]
        {"executors": [job.ExecutorResult("x", "", "")]},  # type: ignore[arg-type]
        {"executors": [3]},
        {"outputs": [job.OutputFile("u", "p", -1)]},
        {"outputs": [job.OutputFile("u", "p", float("inf"))]},  # type: ignore[arg-type]
        {"outputs": [job.OutputFile("u", None, 1)]},  # type: ignore[arg-type]
        {"outputs": {"a": 1}},
        {"metadata": ["a"]},
        {"metadata": None},
        {"system_logs": 5},
        {"end_time": 7},
    ],
)
@pytest.mark.parametrize("before", [S.RUNNING, S.CANCELING])
def test_garbage_in_a_result_ends_the_task_and_says_so(before: S, fields: dict[str, Any]) -> None:
    task = task_in(before, cancel_sent=NOW if before is S.CANCELING else None)
    change = lifecycle.observed(task, result(task, **fields), NOW, POLICY)
    assert change is not None
    assert change.state is S.SYSTEM_ERROR
    assert "cannot be read" in change.system[0] or "stopped at the site" in change.system[-1]
    assert "\n" not in change.system[0]


def test_lone_surrogates_from_a_node_can_be_stored() -> None:
    task = task_in(S.RUNNING)
    bad = "a\udcffb"
    change = lifecycle.observed(
        task,
        result(
            task,
            executors=[job.ExecutorResult(0, bad, bad, bad, bad)],
            outputs=[job.OutputFile(bad, bad, 1)],
            system_logs=[bad],
            metadata={bad: bad},
            end_time=bad,
        ),
        NOW,
        POLICY,
    )
    assert change is not None
    assert change.state is S.COMPLETE
    assert change.attempt is not None
    texts = [*change.streams.values(), *change.system, change.attempt.log.outputs[0].path]
    assert texts == ["a?b"] * 4
    assert attempts_from_json(attempts_to_json((change.attempt,)).encode().decode()) == (change.attempt,)
    change = lifecycle.silent(task_in(S.RUNNING), NOW, bad, POLICY)
    assert change.system == ("a?b",)


@pytest.mark.parametrize("time", ["", "s", "2026-01-31", "a\udcff", "2026-01-31T12:00:00Z\n", "9" * 100])
def test_a_time_that_is_none_is_left_out_and_the_rest_of_the_result_is_taken(time: str) -> None:
    good = "2026-01-31T12:00:01.5+01:00"
    task = task_in(S.RUNNING)
    executors = [job.ExecutorResult(0, time, good), job.ExecutorResult(3, good, time)]
    change = lifecycle.observed(task, result(task, "EXECUTOR_ERROR", executors=executors, end_time=time), NOW, POLICY)
    assert change is not None
    assert change.state is S.EXECUTOR_ERROR
    assert change.attempt is not None
    log = change.attempt.log
    assert [(each.exit_code, each.start_time, each.end_time) for each in log.logs] == [(0, None, good), (3, good, None)]
    assert log.end_time == rfc3339(NOW), "when we heard of it"


# Races


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_an_observation_of_an_old_attempt_is_ignored(state: S) -> None:
    task = task_in(state)
    old = result(task)
    task = replace(task, attempts=(*task.attempts, make_attempt(task.id, 2)))
    assert lifecycle.observed(task, old, NOW, POLICY) is None
    assert lifecycle.observed(task, replace(old, result=None), NOW + 1e6, POLICY) is None
    assert lifecycle.refused(task, 1, NOW, "no") is None
    assert lifecycle.confirmed(task, 1, NOW, POLICY) is None


def test_lost_then_running_then_a_result() -> None:
    """A false `lost` starts the grace; what runs again has not ended, and its end has the whole grace."""
    task = task_in(S.RUNNING, beat=5)
    task = applied(task, lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + 10, POLICY))
    assert (task.state, last(task).ended) == (S.RUNNING, NOW + 10)
    task = applied(task, lifecycle.observed(task, seen(task, Phase.RUNNING), NOW + 12, POLICY))
    assert last(task).ended is None
    task = applied(task, lifecycle.observed(task, seen(task, Phase.ENDED), NOW + 100, POLICY))
    assert task.state is S.RUNNING, "the result may be a moment away"
    task = applied(task, lifecycle.observed(task, result(task), NOW + 101, POLICY))
    assert task.state is S.COMPLETE


def test_a_site_that_forgets() -> None:
    task = task_in(S.RUNNING, beat=5)
    task = applied(task, lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + 1, POLICY))
    change = lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + 11.5, ONCE)
    assert change is not None
    assert change.state is S.SYSTEM_ERROR
    assert "does not know the job" in change.system[0]
    assert change.attempt is not None
    assert change.attempt.abandoned, "it may still run there"


def test_a_job_that_ends_without_a_result_is_never_a_success() -> None:
    task = task_in(S.RUNNING, beat=5)
    for code in (0, None, 137, -9):
        first = applied(task, lifecycle.observed(task, seen(task, Phase.ENDED, exit_code=code), NOW + 1, POLICY))
        change = lifecycle.observed(first, seen(first, Phase.ENDED, exit_code=code), NOW + 12, ONCE)
        assert change is not None
        assert change.state is S.SYSTEM_ERROR
        assert "without a result" in change.system[0]


def test_a_duplicate_start_says_nothing_but_does_not_wait_for_ever() -> None:
    task = task_in(S.INITIALIZING)
    observation = seen(task, Phase.ENDED, exit_code=job.EXIT_DUPLICATE)
    task = applied(task, lifecycle.observed(task, observation, NOW + 1, POLICY))
    assert task.state is S.INITIALIZING
    task = in_vain(task)
    assert applied(task, lifecycle.observed(task, observation, NOW + 302, POLICY)).state is S.QUEUED
    assert applied(task, lifecycle.observed(task, observation, NOW + 302, ONCE)).state is S.SYSTEM_ERROR


@pytest.mark.parametrize("code", sorted(lifecycle.NEVER_STARTED))
def test_a_runner_that_could_not_start_is_tried_again(code: int) -> None:
    task = task_in(S.INITIALIZING)
    jobs = [last(task).job_id]
    for number in (2, 3):
        change = lifecycle.observed(task, seen(task, Phase.ENDED, exit_code=code), NOW, POLICY)
        task = applied(task, change)
        assert (task.state, task.due_at) == (S.QUEUED, NOW)
        assert change is not None
        assert str(code) in change.system[0]
        task = applied(task, lifecycle.assign(task, "x", NOW, POLICY))
        assert last(task).number == number
        jobs.append(last(task).job_id)
    assert len(set(jobs)) == 3
    task = applied(task, lifecycle.observed(task, seen(task, Phase.ENDED, exit_code=code), NOW, POLICY))
    assert task.state is S.SYSTEM_ERROR
    assert [each.number for each in lifecycle.unforgotten(task)] == [1, 2, 3]


@pytest.mark.parametrize("code", sorted(lifecycle.NEVER_STARTED))
def test_what_has_started_is_never_tried_again(code: int) -> None:
    running = task_in(S.RUNNING)
    change = lifecycle.observed(running, seen(running, Phase.ENDED, exit_code=code), NOW, POLICY)
    assert change is not None
    assert change.state is None
    fresh = task_in(S.INITIALIZING)
    change = lifecycle.observed(fresh, seen(fresh, Phase.ENDED, exit_code=code, beat=3, started="t"), NOW, POLICY)
    assert change is not None
    assert change.state is None


@pytest.mark.parametrize("code", sorted(NO_PYTHON))
def test_no_python_is_the_fault_of_the_site(code: int) -> None:
    single = replace(POLICY, max_attempts=1)
    for state, policy, end in (
        (S.INITIALIZING, POLICY, S.QUEUED),
        (S.INITIALIZING, single, S.SYSTEM_ERROR),
        (S.CANCELING, POLICY, S.CANCELED),
    ):
        task = task_in(state)
        change = lifecycle.observed(task, seen(task, Phase.ENDED, exit_code=code), NOW, policy)
        assert change is not None
        assert change.state is end
        assert "python3" in change.system[0]


def test_unassign() -> None:
    """The site has never heard of it: no attempt is used up, nobody is shown one, and the next takes its place."""
    queued = make_task()
    change = lifecycle.assign(queued, "a", NOW, POLICY)
    assert change is not None
    task = applied(queued, change)
    change = lifecycle.unassign(task, task, NOW, "It is down.")
    assert change is not None
    assert (change.state, change.due_at, change.system, change.system_of) == (S.QUEUED, NOW, ("It is down.",), 0)
    back = applied(task, change)
    assert (back.tries, len(back.attempts)) == ((), 1)
    assert lifecycle.unforgotten(back) == lifecycle.running_on(back) == ()
    change = lifecycle.assign(back, "b", NOW, POLICY)
    assert change is not None
    assert change.attempt is not None
    assert (change.attempt.number, change.attempt.site, change.attempt.withdrawn) == (1, "b", False)
    ended = lifecycle.give_up(back, NOW, "No.")
    assert (ended.state, ended.attempt, ended.due_at, ended.system_of) == (S.SYSTEM_ERROR, None, None, 0)


@pytest.mark.parametrize("state", [each for each in S if each is not S.INITIALIZING])
def test_unassign_only_what_is_as_it_was_assigned(state: S) -> None:
    task = task_in(S.INITIALIZING)
    assert lifecycle.unassign(replace(task, version=task.version + 1), task, NOW) is None
    assert lifecycle.unassign(replace(task, state=state), task, NOW) is None


def test_refused() -> None:
    for state, end in ((S.INITIALIZING, S.SYSTEM_ERROR), (S.CANCELING, S.CANCELED)):
        change = lifecycle.refused(task_in(state, submitted=None), 1, NOW, "The site says no.")
        assert change is not None
        assert (change.state, change.system) == (end, ("The site says no.",))
    assert lifecycle.refused(task_in(S.QUEUED, ended=NOW), 1, NOW, "late") is None


def test_a_site_that_cannot_tell_does_not_confirm_a_submit() -> None:
    """Else a lost submit would never be repeated."""
    task = task_in(S.INITIALIZING, submitted=None)
    task = applied(task, lifecycle.observed(task, seen(task, Phase.RUNNING), NOW + 1, POLICY))
    assert last(task).submitted is None
    for observation in (seen(task, Phase.WAITING), seen(task, Phase.RUNNING, beat=0), seen(task, Phase.ENDED)):
        assert last(applied(task, lifecycle.observed(task, observation, NOW + 1, POLICY))).submitted == NOW + 1


def test_the_clock_goes_back() -> None:
    """An hour back; the task must not wait that hour."""
    task = task_in(S.RUNNING, beat=5, ended=NOW + 3600, heard=NOW + 3600)
    task = applied(task, lifecycle.observed(task, seen(task, Phase.ENDED), NOW, POLICY))
    assert task.due_at is not None
    assert NOW < task.due_at <= NOW + 1
    task = applied(task, lifecycle.observed(task, seen(task, Phase.ENDED), NOW + 11, ONCE))
    assert task.state is S.SYSTEM_ERROR
    assert lifecycle.next_look(make_attempt("t", submitted=NOW + 99), NOW, POLICY) > NOW


# Another attempt


def in_vain(task: Task) -> Task:
    """The task after looks in vain for 300 s."""
    return replace(task, attempts=(*task.attempts[:-1], replace(last(task), silence=300, vain=NOW + 300)))


def silence(task: Task, policy: Policy) -> Change | None:
    return lifecycle.silent(in_vain(task), NOW + 301, "connection refused", policy)


def no_sign_of_life(task: Task, policy: Policy) -> Change | None:
    return lifecycle.observed(in_vain(task), seen(task), NOW + 301, policy)


def no_result(task: Task, policy: Policy) -> Change | None:
    task = replace(task, attempts=(*task.attempts[:-1], replace(last(task), ended=NOW)))
    return lifecycle.observed(task, seen(task, Phase.ENDED, exit_code=137), NOW + 301, policy)


def lost(task: Task, policy: Policy) -> Change | None:
    task = replace(task, attempts=(*task.attempts[:-1], replace(last(task), ended=NOW)))
    return lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + 301, policy)


def no_such_site(task: Task, policy: Policy) -> Change | None:
    return lifecycle.unreachable(task, NOW + 301, "The site is not configured any more.", policy)


def broken_node(task: Task, policy: Policy) -> Change | None:
    seen = result(task, "SYSTEM_ERROR", infrastructure=True, system_logs=["The runner was killed."])
    return lifecycle.observed(task, seen, NOW + 301, policy)


FAILURES = [silence, no_sign_of_life, no_result, lost, no_such_site, broken_node]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("before", [S.INITIALIZING, S.RUNNING])
def test_a_failure_of_the_infrastructure_is_followed_by_another_attempt(before: S, failure: Any) -> None:
    task = task_in(before, looks=9)
    change = failure(task, POLICY)
    task = applied(task, change)
    assert (task.state, task.due_at) == (S.QUEUED, NOW + 301 + 5)
    assert (change.system_of, bool(change.system[0])) == (1, True)
    first = last(task)
    assert (first.ended, first.abandoned, first.looks, bool(first.log.end_time)) == (NOW + 301, True, 0, True)
    assert lifecycle.observed(task, result(task), NOW + 302, POLICY) is None, "too late"
    task = applied(task, lifecycle.assign(task, "y", NOW + 306, POLICY))
    assert [(each.number, each.site) for each in task.attempts] == [(1, "local"), (2, "y")]
    assert lifecycle.running_on(task) == (first,)
    task = applied(task, lifecycle.observed(task, result(task), NOW + 310, POLICY))
    assert task.state is S.COMPLETE
    assert [each.number for each in lifecycle.unforgotten(task)] == [1, 2]


@pytest.mark.parametrize("failure", FAILURES)
def test_attempts_are_used_up(failure: Any) -> None:
    task = task_in(S.RUNNING)
    pauses = []
    for _ in range(2):
        task = applied(task, failure(task, POLICY))
        assert task.due_at is not None
        pauses.append(task.due_at - NOW - 301)
        task = applied(task, lifecycle.assign(task, "x", NOW, POLICY))
    assert pauses == [5, 10]
    change = failure(task, POLICY)
    assert (change.state, change.due_at, change.system_of) == (S.SYSTEM_ERROR, NOW + 301, 3)
    assert change.system, "the last reason"
    assert [each.number for each in lifecycle.unforgotten(applied(task, change))] == [1, 2, 3]
    assert failure(task_in(S.RUNNING), ONCE).state is S.SYSTEM_ERROR


@pytest.mark.parametrize("failure", FAILURES)
def test_a_task_that_is_cancelled_gets_no_other_attempt(failure: Any) -> None:
    change = failure(task_in(S.CANCELING, cancel_sent=NOW), POLICY)
    assert change.state is (S.CANCELED if failure in (no_result, lost, broken_node) else S.SYSTEM_ERROR)


def test_the_backoff_doubles_up_to_its_limit() -> None:
    policy = replace(POLICY, max_attempts=100)
    task = task_in(S.RUNNING)
    pauses = []
    for _ in range(99):
        task = applied(task, silence(task, policy))
        assert task.due_at is not None
        pauses.append(task.due_at - NOW - 301)
        task = applied(task, lifecycle.assign(task, "x", NOW, policy))
    assert pauses == [5, 10, 20, 40, 80, 160, *[lifecycle.LONGEST_BACKOFF] * 93]


def test_what_an_attempt_has_left_stays_its_own() -> None:
    """The log of a failed attempt: executors that ended, outputs, streams and words."""
    task = task_in(S.RUNNING)
    left = {
        "executors": [job.ExecutorResult(0, "a", "b", "out", "err")],
        "outputs": [job.OutputFile("u", "/p", 5)],
        "metadata": {"runtime": "docker"},
        "system_logs": ["one", "two"],
    }
    change = lifecycle.observed(task, result(task, "SYSTEM_ERROR", infrastructure=True, **left), NOW, POLICY)
    assert change is not None
    assert (change.state, change.system, change.system_of) == (S.QUEUED, ("one", "two"), 1)
    assert change.streams == {(1, 0, "stdout"): "out", (1, 0, "stderr"): "err"}
    log = last(applied(task, change)).log
    assert ([each.exit_code for each in log.logs], [each.path for each in log.outputs]) == ([0], ["/p"])
    assert (log.end_time, log.metadata) == ("2026-01-31T12:00:05.000000Z", {"runtime": "docker"})


@pytest.mark.parametrize("state", ["COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"])
def test_what_the_task_itself_brought_about_is_final(state: str) -> None:
    """Whatever else a result claims, only a SYSTEM_ERROR can be the infrastructure's."""
    blamed = state != "SYSTEM_ERROR"
    task = task_in(S.RUNNING)
    change = lifecycle.observed(task, result(task, state, infrastructure=blamed and state != "CANCELED"), NOW, POLICY)
    assert change is not None
    assert change.state is (S.SYSTEM_ERROR if state == "CANCELED" else S(state))


def test_a_job_that_arrives_late() -> None:
    """Whose care is it? The task's, as long as that attempt is under way or its result is to be cleaned up."""
    task = task_in(S.RUNNING)
    assert not lifecycle.is_over(task, 1)
    assert lifecycle.left_behind(task, 1, NOW) is None
    assert not lifecycle.is_over(applied(task, lifecycle.observed(task, result(task), NOW, POLICY)), 1)
    again = applied(task, silence(task, POLICY))
    assert lifecycle.is_over(again, 1)
    second = applied(again, lifecycle.assign(again, "x", NOW, POLICY))
    assert lifecycle.is_over(second, 1)
    assert not lifecycle.is_over(second, 2)
    assert lifecycle.is_over(None, 1)
    done = task_in(S.COMPLETE, ended=NOW, forgotten=True)
    assert lifecycle.is_over(done, 1)
    noted = applied(done, lifecycle.left_behind(done, 1, NOW + 5))
    assert (noted.state, noted.due_at, len(lifecycle.unforgotten(noted))) == (S.COMPLETE, NOW + 5, 1)
    assert last(noted).abandoned


def test_waiting_for_room_is_no_look_at_the_attempt_before() -> None:
    task = task_in(S.QUEUED, ended=NOW, abandoned=True)
    assert last(applied(task, lifecycle.wait(task, NOW, "", pause=1))).looks == 0


# Silence

Look = Callable[[Task, float, Policy], Change | None]


def silence_at(task: Task, now: float, policy: Policy) -> Change | None:
    return lifecycle.silent(task, now, "connection refused", policy)


def no_sign_at(task: Task, now: float, policy: Policy) -> Change | None:
    return lifecycle.observed(task, seen(task, beat=4), now, policy)


def test_silence_is_noted_once_and_ends_with_patience() -> None:
    task = task_in(S.RUNNING)
    lines = []
    now = NOW
    while task.state is S.RUNNING:
        change = lifecycle.silent(task, now, "connection refused", ONCE)
        lines += change.system
        task = applied(task, change)
        assert task.due_at is not None
        assert now <= task.due_at <= now + POLICY.poll_interval
        now = max(task.due_at, now + 0.1)
    assert task.state is S.SYSTEM_ERROR
    assert 300 < now - NOW < 310
    assert [re.sub("[0-9]+ s", "T", line) for line in lines] == [
        "connection refused",
        "The site 'local' was silent for T: connection refused (given up after T)",
        "The site 'local' was silent for T: connection refused",
    ]


def test_a_failure_without_a_reason_says_so() -> None:
    task = task_in(S.RUNNING)
    change = lifecycle.observed(task, result(task, "SYSTEM_ERROR"), NOW, ONCE)
    assert change is not None
    assert (change.state, len(change.system)) == (S.SYSTEM_ERROR, 1)


def test_a_silence_that_passes_is_told_while_it_lasts() -> None:
    task, now, told = task_in(S.RUNNING, beat=4), NOW, list[str]()
    for beat in (4, 5):
        for _ in range(20):
            now += 10
            change = lifecycle.observed(task, seen(task, beat=beat), now, POLICY)
            assert change is not None
            told += change.system
            task = applied(task, change)
        task = applied(task, lifecycle.observed(task, seen(task, beat=beat + 1), now, POLICY))
    assert task.state is S.RUNNING
    line = r"The job showed no sign of life for 1[567]0 s\. \(given up after 300 s\)"
    assert [bool(re.fullmatch(line, each)) for each in told] == [True, True], told


def test_of_a_job_that_is_to_stop_no_silence_is_told() -> None:
    task = task_in(S.CANCELING, beat=4, cancel_sent=NOW)
    for now in range(10, 300, 10):
        change = lifecycle.observed(task, seen(task, beat=4), NOW + now, POLICY)
        assert change is not None
        assert change.system == ()
        task = applied(task, change)


def test_no_sign_of_life_ends_with_patience() -> None:
    task = task_in(S.RUNNING, beat=4)
    alive = applied(task, lifecycle.observed(task, seen(task, beat=5), NOW + 299, POLICY))
    assert last(alive).heard == NOW + 299
    still, now = alive, NOW + 299
    while still.state is S.RUNNING:
        now += 5
        change = lifecycle.observed(still, seen(still, beat=5), now, ONCE)
        still = applied(still, change)
    assert 300 < now - NOW - 299 <= 310
    assert still.state is S.SYSTEM_ERROR
    assert change is not None
    assert change.system == (f"The job showed no sign of life for {now - NOW - 299:.0f} s.",)
    waiting = task_in(S.INITIALIZING)
    assert applied(waiting, lifecycle.observed(waiting, seen(waiting, Phase.WAITING), NOW + 1e6, POLICY)).state is (
        S.INITIALIZING
    ), "a queue may be long"


@pytest.mark.parametrize("at_once", [True, False], ids=["nobody looked", "one look in vain, then nobody looked"])
@pytest.mark.parametrize("look", [silence_at, no_sign_at])
def test_time_in_which_nobody_looked_is_no_silence(look: Look, at_once: bool) -> None:
    """The service was down, its machine slept or its clock was set: the first look in vain says little."""
    task, now = task_in(S.RUNNING, beat=4), NOW + 5
    if not at_once:
        task = applied(task, look(task, now, ONCE))
    now += 3600
    task = applied(task, look(task, now, ONCE))
    assert task.state is S.RUNNING
    alive = applied(task, lifecycle.observed(task, seen(task, beat=5), now + 1, ONCE))
    assert (last(alive).silence, last(alive).vain, last(alive).heard) == (0, None, now + 1)
    back = now
    while task.state is S.RUNNING:
        now += 5
        task = applied(task, look(task, now, ONCE))
    assert 200 <= now - back <= 310, "one that is dead is given up all the same"


def test_looks_that_are_far_apart_end_it_too() -> None:
    task, looks = task_in(S.RUNNING), 0
    while task.state is S.RUNNING:
        looks += 1
        task = applied(task, silence_at(task, NOW + 1000 * looks, ONCE))
    assert looks == 5


def test_looks_are_quick_at_first_and_slow_later() -> None:
    pauses = [
        lifecycle.next_look(make_attempt("t", submitted=NOW), NOW + age, POLICY) - NOW - age for age in (0, 1, 10, 1e5)
    ]
    assert pauses == pytest.approx([0.5 * POLICY.first_look, 0.1, 1.0, 5.0], abs=1e-3)


# Reports


def report(task: Task, beat: int, phase: str = "running", started: str | None = "t") -> Observation:
    progress = job.Progress(last(task).job_id, phase, beat=beat, started=started)
    return Observation(job_id=last(task).job_id, phase=Phase.RUNNING, progress=progress, reported=True)


def test_a_report_is_noted_when_it_brings_news_or_none_was_for_a_while() -> None:
    task = task_in(S.INITIALIZING, submitted=None)
    task = applied(task, lifecycle.reported(task, report(task, 1, "staging", None), NOW + 1, POLICY))
    assert (task.state, last(task).submitted, last(task).reported) == (S.INITIALIZING, NOW + 1, NOW + 1)
    assert lifecycle.reported(task, report(task, 2, "staging", None), NOW + 2, POLICY) is None
    task = applied(task, lifecycle.reported(task, report(task, 3), NOW + 3, POLICY))
    assert (task.state, last(task).heard, last(task).beat) == (S.RUNNING, NOW + 3, 3)
    assert lifecycle.reported(task, report(task, 4), NOW + 4, POLICY) is None
    task = applied(task, lifecycle.reported(task, report(task, 9), NOW + 30, POLICY))
    assert last(task).heard == NOW + 30
    ended = replace(result(task), reported=True)
    assert applied(task, lifecycle.reported(task, ended, NOW + 31, POLICY)).state is S.COMPLETE


def test_a_report_of_the_end_without_the_result_has_it_fetched_at_once() -> None:
    task = task_in(S.RUNNING, reported=NOW)
    assert applied(task, lifecycle.reported(task, report(task, 5, "done"), NOW + 1, POLICY)).due_at == NOW + 1


@pytest.mark.parametrize("state", [*sorted(FINAL), S.QUEUED])
def test_a_report_that_comes_too_late(state: S) -> None:
    task = task_in(state, ended=NOW)
    assert lifecycle.reported(task, report(task, 5), NOW, POLICY) is None


def test_a_job_that_reports_is_looked_at_rarely_until_it_does_so_no_more() -> None:
    attempt = make_attempt("t", submitted=NOW, reported=NOW)
    assert lifecycle.next_look(attempt, NOW + 1, POLICY) == NOW + 1 + 6 * POLICY.poll_interval
    short = replace(POLICY, patience=60)
    assert lifecycle.next_look(attempt, NOW + 1, short) == NOW + 1 + 20
    assert lifecycle.next_look(attempt, NOW + 61, POLICY) == NOW + 61 + POLICY.poll_interval
    canceled = replace(attempt, cancel_sent=NOW)
    assert lifecycle.next_look(canceled, NOW + 1, POLICY, canceling=True) < NOW + 2


def test_who_looks_at_a_running_task_has_its_job_looked_at() -> None:
    task = replace(task_in(S.RUNNING), due_at=NOW + 5)
    watched = applied(task, lifecycle.look_now(task, NOW))
    assert watched.due_at == NOW
    assert lifecycle.is_watched(last(watched), NOW + 1)
    assert not lifecycle.is_watched(last(watched), NOW + 60)
    assert not lifecycle.is_watched(last(task), NOW)
    soon = replace(task, due_at=NOW + 0.5)
    watched = applied(soon, lifecycle.look_now(soon, NOW))
    assert (watched.due_at, lifecycle.is_watched(last(watched), NOW + 0.5)) == (NOW + 0.5, True)
    assert lifecycle.look_now(watched, NOW + 0.2) is None, "it will be, soon"
    assert lifecycle.look_now(replace(task_in(S.RUNNING, reported=NOW), due_at=NOW + 5), NOW) is None
    for state in set(S) - {S.RUNNING}:
        assert lifecycle.look_now(replace(task_in(state), due_at=NOW + 5), NOW) is None


def test_any_of_the_latest_submits_may_be_the_one_that_reports() -> None:
    task = make_task()
    task = applied(task, lifecycle.assign(task, "a", NOW, POLICY, token="h0"))
    for number in range(1, 6):
        task = applied(task, lifecycle.with_token(task, 1, f"h{number}"))
    assert last(task).tokens == ("h2", "h3", "h4", "h5")
    assert lifecycle.with_token(task, 2, "x") is None
    assert lifecycle.with_token(task_in(S.CANCELED), 1, "x") is None


# Cancel


def test_cancel() -> None:
    queued = applied(task := make_task(), lifecycle.cancel(task, NOW))
    assert (queued.state, queued.due_at) == (S.CANCELED, None)
    retried = task_in(S.QUEUED, ended=NOW)
    assert applied(retried, lifecycle.cancel(retried, NOW)).due_at == NOW, "the first attempt is cleaned up"
    for state in (S.INITIALIZING, S.RUNNING):
        task = task_in(state)
        task = applied(task, lifecycle.cancel(task, NOW + 1))
        assert (task.state, task.due_at) == (S.CANCELING, NOW + 1)
        assert lifecycle.cancel(task, NOW) is None


def given_up(task: Task, now: float, **at: Any) -> tuple[float, Change]:
    """Look every five seconds at what does not stop until that is given up; when that is, and with which words."""
    while True:
        now += 5
        change = lifecycle.observed(task, seen(task, **at), now, POLICY)
        assert change is not None
        if change.state is not None:
            return now, change
        task = applied(task, change)


def test_a_cancel_is_gentle_then_firm_then_given_up() -> None:
    task = task_in(S.CANCELING, heard=NOW)
    assert lifecycle.must_stop(task, NOW, POLICY) is False
    task = applied(task, lifecycle.asked_to_stop(task, NOW))
    assert lifecycle.must_stop(task, NOW + 9, POLICY) is None
    assert lifecycle.must_stop(task, NOW + 10.1, POLICY) is True
    task = applied(task, lifecycle.asked_to_stop(task, NOW + 10.1))
    assert lifecycle.must_stop(task, NOW + 11, POLICY) is None
    assert lifecycle.must_stop(task, NOW + 20.1, POLICY) is True
    for phase in (Phase.RUNNING, Phase.WAITING):
        now, change = given_up(task, NOW + 10.1, phase=phase)
        assert 300 < now - NOW <= 310, "that it lives on is no comfort"
        assert change.state is S.SYSTEM_ERROR
        assert "not confirmed the cancel" in change.system[0]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_job_that_stopped_while_nobody_looked_is_canceled(arrived: bool) -> None:
    task = task_in(S.CANCELING)
    task = applied(task, (lifecycle.asked_to_stop if arrived else lifecycle.could_not_stop)(task, NOW))
    task = applied(task, lifecycle.observed(task, seen(task), NOW + 1, POLICY))
    later = NOW + 3600
    assert applied(task, lifecycle.observed(task, result(task, "CANCELED"), later, POLICY)).state is S.CANCELED
    assert applied(task, lifecycle.observed(task, seen(task), later, POLICY)).state is S.CANCELING, "asked once more"
    assert applied(task, lifecycle.silent(task, later, "no answer", POLICY)).state is S.CANCELING
    for phase in (Phase.ENDED, Phase.UNKNOWN):
        over = applied(in_vain(task), lifecycle.observed(in_vain(task), seen(task, phase), later, POLICY))
        assert applied(over, lifecycle.observed(over, seen(over, phase), later + 11, POLICY)).state is S.CANCELED


def test_a_gentle_request_that_does_not_arrive_is_followed_by_a_kill() -> None:
    task = task_in(S.CANCELING)
    task = applied(task, lifecycle.could_not_stop(task, NOW))
    assert lifecycle.could_not_stop(task, NOW + 5) is None, "the first try counts"
    assert lifecycle.must_stop(task, NOW + 9, POLICY) is False
    assert lifecycle.must_stop(task, NOW + 10.1, POLICY) is True
    arrived = applied(task, lifecycle.asked_to_stop(task, NOW + 9))
    assert lifecycle.must_stop(arrived, NOW + 18, POLICY) is None, "the grace begins when the job has heard of it"
    assert lifecycle.must_stop(arrived, NOW + 19.1, POLICY) is True
    now, change = given_up(task, NOW)
    assert 300 < now - NOW <= 310
    assert "not confirmed the cancel" in change.system[0]
    assert lifecycle.could_not_stop(task_in(S.RUNNING), NOW) is None


@pytest.mark.parametrize("state", ["COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"])
def test_whatever_the_result_a_cancelled_task_is_canceled(state: str) -> None:
    task = task_in(S.CANCELING, cancel_sent=NOW)
    change = lifecycle.observed(task, result(task, state, executors=[job.ExecutorResult(0, "a", "b")]), NOW, POLICY)
    done = applied(task, change)
    assert done.state is S.CANCELED
    assert len(last(done).log.logs) == 1


def test_canceled_only_when_nothing_is_left() -> None:
    task = task_in(S.CANCELING, cancel_sent=NOW, beat=3)
    for observation in (seen(task, Phase.WAITING), seen(task, beat=4), seen(task), seen(task, Phase.ENDED)):
        change = lifecycle.observed(task, observation, NOW + 1, POLICY)
        assert change is not None
        assert change.state is None
    over = applied(task, lifecycle.observed(task, seen(task, Phase.ENDED), NOW + 1, POLICY))
    over = applied(over, lifecycle.observed(over, seen(over, Phase.ENDED), NOW + 12, POLICY))
    assert over.state is S.CANCELED


def test_a_cancel_during_the_submit_waits_for_the_submit() -> None:
    """The site does not know the job yet, but until the lease is over it may still arrive."""
    task = task_in(S.CANCELING, submitted=None)
    for after in (0.1, 12, 29):
        task = applied(task, lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + after, POLICY))
        assert task.state is S.CANCELING
    arrived = applied(task, lifecycle.observed(task, seen(task, Phase.WAITING), NOW + 29.5, POLICY))
    assert (arrived.state, last(arrived).ended) == (S.CANCELING, None)
    never = applied(task, lifecycle.observed(task, seen(task, Phase.UNKNOWN), NOW + 31, POLICY))
    assert never.state is S.CANCELED


# After the end


def test_clean_up_goes_on_until_all_is_forgotten() -> None:
    task = task_in(S.CANCELED, ended=NOW)
    task = replace(task, attempts=(*task.attempts, make_attempt(task.id, 2, ended=NOW, forgotten=False)))
    none = applied(task, lifecycle.forgotten(task, frozenset(), NOW, POLICY))
    assert none.due_at is not None
    assert none.due_at > NOW
    one = applied(task, lifecycle.forgotten(task, frozenset({2}), NOW, POLICY))
    assert [each.number for each in lifecycle.unforgotten(one)] == [1]
    assert one.due_at == NOW
    both = applied(task, lifecycle.forgotten(task, frozenset({1, 2}), NOW, POLICY))
    both = applied(both, lifecycle.forgotten(both, frozenset({1, 2}), NOW, POLICY))
    assert (lifecycle.unforgotten(both), both.due_at) == ((), None)
    late = applied(task, lifecycle.forgotten(task, frozenset(), NOW + lifecycle.CLEAN_UP_FOR + 1, POLICY))
    assert late.due_at is None
    young = replace(task, attempts=(task.attempts[0], replace(task.attempts[1], ended=NOW + 100)))
    change = lifecycle.forgotten(young, frozenset(), NOW + lifecycle.CLEAN_UP_FOR + 1, POLICY)
    assert applied(young, change).due_at is not None, "the last attempt has its week too"
    assert lifecycle.forgotten(task_in(S.RUNNING), frozenset({1}), NOW, POLICY) is None
    under_way = task_in(S.RUNNING, ended=NOW, abandoned=True)
    under_way = replace(under_way, attempts=(*under_way.attempts, make_attempt(task.id, 2, ended=NOW)))
    change = lifecycle.forgotten(under_way, frozenset({1, 2}), NOW, POLICY)
    assert change is not None
    assert (change.state, change.due_at) == (None, KEEP)
    assert [each.forgotten for each in applied(under_way, change).attempts] == [True, False]


# Any sequence


class AnyLife(RuleBasedStateMachine):
    """Whatever a site says and in whatever order: no way out of an end, every end has its reason."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.task = make_task()
        self.jobs: list[str] = []
        self.wished = self.over = False
        self.said: list[str] = []
        self.progressed: set[str] = set()

    def take(self, change: Change | None) -> None:
        if change is None:
            return
        before = self.task
        self.task = applied(before, change)
        self.said += change.system
        if change.state is not None and change.state is not before.state:
            assert before.state not in FINAL
        assert [each.number for each in self.task.attempts] == list(range(1, len(self.task.attempts) + 1))
        if self.task.attempts != before.attempts and len(self.task.attempts) > len(before.attempts):
            assert last(self.task).job_id not in self.jobs
            self.jobs.append(last(self.task).job_id)

    @initialize()
    def begin(self) -> None:
        self.jobs = []

    @rule(seconds=st.sampled_from([0.01, 1.0, 5.0, 11.0, 31.0, 299.0, 301.0, -50.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def assign(self) -> None:
        self.take(lifecycle.assign(self.task, "x", self.now, POLICY))

    @rule(number=st.integers(1, 3))
    def confirm(self, number: int) -> None:
        self.take(lifecycle.confirmed(self.task, number, self.now, POLICY))

    @rule(number=st.integers(1, 3))
    def refuse(self, number: int) -> None:
        self.take(lifecycle.refused(self.task, number, self.now, "refused"))

    @rule()
    def cancel(self) -> None:
        self.wished = True
        self.take(lifecycle.cancel(self.task, self.now))

    @precondition(lambda self: self.task.state is S.CANCELING)
    @rule()
    def ask_to_stop(self) -> None:
        if lifecycle.must_stop(self.task, self.now, POLICY) is not None:
            self.take(lifecycle.asked_to_stop(self.task, self.now))

    @rule()
    def somebody_looks(self) -> None:
        self.take(lifecycle.look_now(self.task, self.now))

    @rule(number=st.integers(1, 3))
    def submit_again(self, number: int) -> None:
        self.take(lifecycle.with_token(self.task, number, "hash"))

    @precondition(lambda self: self.task.state in ACTIVE)
    @rule()
    def silence(self) -> None:
        self.take(lifecycle.silent(self.task, self.now, "no answer", POLICY))

    @precondition(lambda self: self.jobs)
    @rule(
        number=st.integers(1, 3),
        phase=st.sampled_from(Phase),
        beat=st.none() | st.integers(0, 5),
        started=st.sampled_from([None, "t"]),
        code=st.sampled_from([None, 0, 1, 2, 76, 77, 78, 79, 127, 137]),
        state=st.sampled_from([None, None, None, "COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED", "?"]),
        blamed=st.booleans(),
        reported=st.booleans(),
    )
    def observe(
        self,
        number: int,
        phase: Phase,
        beat: int | None,
        started: str | None,
        code: int | None,
        state: str | None,
        blamed: bool,
        reported: bool,
    ) -> None:
        its = job_id(self.task.id, number)
        before = self.task
        observation = Observation(
            job_id=its,
            phase=phase,
            progress=None if beat is None else job.Progress(its, "running", beat=beat, started=started),
            result=None if state is None else job.Result(its, state, "a", "b", infrastructure=blamed),
            exit_code=code,
            reported=reported,
        )
        decide = lifecycle.reported if reported else lifecycle.observed
        self.take(decide(self.task, observation, self.now, POLICY))
        if self.task.state is S.COMPLETE and before.state is not S.COMPLETE:
            assert state == "COMPLETE"
        if self.task.state is S.EXECUTOR_ERROR and before.state is not S.EXECUTOR_ERROR:
            assert state == "EXECUTOR_ERROR"
        if self.task.state is S.CANCELED and before.state is S.CANCELING:
            assert state or phase in (Phase.ENDED, Phase.UNKNOWN) or code not in (None, 0, 137)
        if before.state is not S.QUEUED and self.task.state is S.QUEUED:
            assert before.state is not S.CANCELING
            assert state is None or (state == "SYSTEM_ERROR" and blamed), "what the task did itself is final"

    @invariant()
    def the_record_makes_sense(self) -> None:
        task = self.task
        if task.state is S.CANCELED:
            assert self.wished
        if task.state is S.SYSTEM_ERROR:
            assert self.said, "a system error has a reason"
        if task.state in ACTIVE:
            assert task.attempt is not None
            assert task.due_at is not None
        if task.final:
            assert lifecycle.cancel(task, self.now) is None
            assert all(each.ended is not None for each in task.attempts)
        assert len(task.attempts) <= POLICY.max_attempts


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
