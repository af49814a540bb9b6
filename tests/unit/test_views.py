"""The three views of a task."""

from __future__ import annotations

from typing import Any

import pytest

from tesp_api.api.views import Json, show
from tesp_api.task import Task
from tesp_api.tes import TesState, TesView
from tests.builders import make_attempt, make_bodies, make_task

LOGS = {
    "logs": [{"exit_code": 1, "start_time": "a", "end_time": "b"}, {"exit_code": 0}],
    "outputs": [{"url": "u", "path": "/p", "size_bytes": 5_000_000_000}],
    "metadata": {"site": "local"},
    "start_time": "a",
}
SHOWN = {**LOGS, "outputs": [{"url": "u", "path": "/p", "size_bytes": "5000000000"}]}
INPUTS = [{"path": "/a", "content": "text"}, {"path": "/b", "url": "u"}]


def ended(**record: Any) -> Task:
    record = {
        "state": TesState.EXECUTOR_ERROR,
        "attempts": (make_attempt("t", 1), make_attempt("t", 2, LOGS)),
        "bodies": make_bodies(
            {0: "text"},
            {(2, 0, "stdout"): "out", (2, 0, "stderr"): "", (2, 1, "stderr"): "err", (2, 2, "stdout"): "running"},
            {0: ("early",), 1: ("first",), 2: ("one", "two")},
        ),
        **record,
    }
    return make_task(inputs=INPUTS, tags={"a": "b"}, record=record)


def test_minimal() -> None:
    task = ended()
    assert show(task, TesView.MINIMAL) == {"id": task.id, "state": "EXECUTOR_ERROR"}


def test_minimal_needs_nothing_else() -> None:
    assert show(Task(id="x", document="", created=0.0), TesView.MINIMAL) == {"id": "x", "state": "QUEUED"}


def test_basic() -> None:
    task = ended()
    assert show(task, TesView.BASIC) == {
        "id": task.id,
        "state": "EXECUTOR_ERROR",
        "name": "hello",
        "inputs": [{"path": "/a", "type": "FILE"}, {"path": "/b", "url": "u", "type": "FILE"}],
        "executors": [{"image": "busybox", "command": ["echo", "hi"]}],
        "tags": {"a": "b"},
        "creation_time": "2025-06-15T15:06:40.000000Z",
        "logs": [{"logs": [], "outputs": []}, SHOWN],
    }


def test_basic_holds_back_texts_even_in_the_hot_record() -> None:
    log = {"logs": [{"exit_code": 0, "stdout": "o", "stderr": "e"}], "system_logs": ["s"]}
    task = make_task(record={"attempts": (make_attempt("t", 1, log),)})
    assert show(task, TesView.BASIC)["logs"] == [{"logs": [{"exit_code": 0}], "outputs": []}]
    assert show(task, TesView.FULL)["logs"] == [{**log, "outputs": []}]


def test_full() -> None:
    shown = show(ended(), TesView.FULL)
    assert shown["inputs"][0] == {"path": "/a", "type": "FILE", "content": "text"}
    assert "content" not in shown["inputs"][1]
    first, second = shown["logs"]
    assert first == {"logs": [], "outputs": [], "system_logs": ["early", "first"]}
    assert second["logs"] == [
        {"exit_code": 1, "start_time": "a", "end_time": "b", "stdout": "out", "stderr": ""},
        {"exit_code": 0, "stderr": "err"},
    ]
    assert second["system_logs"] == ["one", "two"]
    assert second["outputs"] == SHOWN["outputs"]


def test_full_before_any_attempt() -> None:
    assert "logs" not in show(make_task(), TesView.FULL)
    task = make_task(record={"bodies": make_bodies(system={0: ("early",)})})
    assert show(task, TesView.FULL)["logs"] == [{"logs": [], "outputs": [], "system_logs": ["early"]}]
    assert "logs" not in show(task, TesView.BASIC)


def test_only_the_last_attempt() -> None:
    """For clients that read the first log; what was said before any attempt has no other place."""
    whole = show(task := ended(), TesView.FULL)
    folded = show(task, TesView.FULL, fold_attempts=True)
    assert folded["logs"] == [{**whole["logs"][1], "system_logs": ["early", "one", "two"]}]
    assert {**folded, "logs": None} == {**whole, "logs": None}
    assert show(ended(), TesView.BASIC, fold_attempts=True)["logs"] == [SHOWN]
    task = make_task(record={"bodies": make_bodies(system={0: ("early",)})})
    assert show(task, TesView.FULL, fold_attempts=True) == show(task, TesView.FULL)
    assert "logs" not in show(make_task(), TesView.BASIC, fold_attempts=True)


def test_full_without_bodies() -> None:
    assert show(ended(bodies=None), TesView.FULL)["logs"][1] == SHOWN


@pytest.mark.parametrize("view", TesView)
def test_only_what_was_sent(view: TesView) -> None:
    assert not show(make_task(), view).keys() - {"id", "state", "name", "executors", "creation_time"}


@pytest.mark.parametrize(
    ("view", "attempt", "shown"),
    [
        (TesView.MINIMAL, None, "RUNNING"),
        (TesView.BASIC, {}, "RUNNING"),
        (TesView.BASIC, {"submitted": 1.0}, "RUNNING"),
        (TesView.FULL, {"log": {"logs": [{"exit_code": 0}]}}, "RUNNING"),
    ],
)
def test_canceling_folded(view: TesView, attempt: dict[str, Any] | None, shown: str) -> None:
    attempts = () if attempt is None else (make_attempt("t", 1, **attempt),)
    task = make_task(record={"state": TesState.CANCELING, "attempts": attempts})
    assert show(task, view, fold_canceling=True)["state"] == shown
    assert show(task, view)["state"] == "CANCELING"


@pytest.mark.parametrize("state", sorted(set(TesState) - {TesState.CANCELING}))
def test_other_states_are_never_folded(state: TesState) -> None:
    assert show(make_task(record={"state": state}), TesView.BASIC, fold_canceling=True)["state"] == state


def test_any_text_can_be_answered() -> None:
    assert Json({"a": "ü\ud800"}).body == '{"a":"ü?"}'.encode()
