"""What a task looks like from outside, in its three views, and the response class for all answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json
from starlette.responses import JSONResponse

from tesp_api.task import ACTIVE, Attempt, Bodies, Tail, Task, rfc3339
from tesp_api.tes import TesState, TesView

Document = dict[str, Any]

_NOTHING = Bodies()
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Json(JSONResponse):
    """JSON in UTF-8. Text that UTF-8 cannot hold (a node may send anything) becomes question marks."""

    def render(self, content: Any) -> bytes:
        return _encode(content).encode("utf-8", "replace")


def show(task: Task, view: TesView, *, fold_canceling: bool = False, fold_attempts: bool = False) -> Document:
    """The task as a TES document; it must have been loaded in this view at least.

    `fold_canceling` shows CANCELING as RUNNING, for clients that do not know that word. `fold_attempts` shows only the
    last attempt, for clients that take the first log for the only one.
    """
    state = TesState.RUNNING if fold_canceling and task.state is TesState.CANCELING else task.state
    document: Document = {"id": task.id, "state": state.value}
    if view is TesView.MINIMAL:
        return document
    document.update(from_json(task.document))
    document["creation_time"] = rfc3339(task.created)
    attempts = task.tries[-1:] if fold_attempts else task.tries
    if view is TesView.BASIC:
        logs = [_basic_log(attempt) for attempt in attempts]
    else:
        bodies = task.bodies or _NOTHING
        for index, content in bodies.contents.items():
            document["inputs"][index]["content"] = content
        logs = _full_logs(attempts, bodies)
        if bodies.tail is not None and task.state in ACTIVE and attempts and attempts[-1].number == bodies.tail.attempt:
            logs[-1].setdefault("metadata", {}).update(_tail(bodies.tail))
    if logs:
        document["logs"] = logs
    return document


def _log(attempt: Attempt) -> Document:
    return attempt.log.model_dump(mode="json", exclude_none=True)


def _basic_log(attempt: Attempt) -> Document:
    log = _log(attempt)
    log.pop("system_logs", None)
    for executor in log["logs"]:
        executor.pop("stdout", None)
        executor.pop("stderr", None)
    return log


def _full_logs(attempts: Sequence[Attempt], bodies: Bodies) -> list[Document]:
    logs = []
    for attempt in attempts:
        log = _log(attempt)
        for index, executor in enumerate(log["logs"]):
            for name in ("stdout", "stderr"):
                text = bodies.streams.get((attempt.number, index, name))
                if text is not None:
                    executor[name] = text
        if lines := bodies.system.get(attempt.number):
            log["system_logs"] = [*log.get("system_logs", ()), *lines]
        logs.append(log)
    if early := bodies.system.get(0):  # said before there was any attempt
        if not logs:
            logs.append({"logs": [], "outputs": []})
        logs[0]["system_logs"] = [*early, *logs[0].get("system_logs", ())]
    return logs


def _tail(tail: Tail) -> Document:
    """What the running executor has said so far. TES has no place for that: an entry in `logs.logs` needs an exit
    code."""
    return {
        "executor": str(tail.executor),
        "stdout_tail": tail.stdout,
        "stdout_bytes": str(tail.stdout_bytes),
        "stderr_tail": tail.stderr,
        "stderr_bytes": str(tail.stderr_bytes),
    }
