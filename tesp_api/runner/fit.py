"""A result that is longer than what is read of it is shortened: the state and the exit codes are told in any case."""

import json
from typing import Any, List

from . import job
from .logs import BoundedLog

_WHY = "a result may take at most %d bytes"


def fitted(result: job.Result, limit: int) -> job.Result:
    """The result in at most `limit` bytes of JSON; its system logs say what is left out, and why.

    Whatever makes it too long is cut: what executors wrote to half of the limit, system logs to a quarter, and of the
    output files the first ones are kept that still fit. None of that happens to a result that is short enough.
    """
    if _size(result) > limit:
        result = _with_short_streams(result, limit)
    if _size(result) > limit:
        result = _with_first_lines(result, limit)
    if _size(result) > limit:
        result = _with_first_outputs(result, limit)
    return result


def _with_short_streams(result: job.Result, limit: int) -> job.Result:
    """Half as much of each stream, until they fit: the long ones are cut, the short ones stay whole."""
    executors, bound = result.executors, max([_longest(each) for each in result.executors] or [0])
    if _size(executors) <= limit // 2:
        return result
    while bound and _size(executors) > limit // 2:
        bound //= 2
        executors = [_cut(each, bound) for each in result.executors]
    line = "executors: of each stdout and stderr only %d bytes are kept: %s." % (bound, _WHY % limit)
    return result._replace(executors=executors, system_logs=[*result.system_logs, line])


def _with_first_lines(result: job.Result, limit: int) -> job.Result:
    lines = _first(result.system_logs, limit // 4)
    left = len(result.system_logs) - len(lines)
    if not left:
        return result
    line = "%d more system logs are left out: %s." % (left, _WHY % limit)
    return result._replace(system_logs=[*lines, line])


def _with_first_outputs(result: job.Result, limit: int) -> job.Result:
    sent = len(result.outputs)
    line = "outputs: %d of the %d files that were sent are not listed: " + _WHY % limit + "."
    bare = result._replace(outputs=[], system_logs=[*result.system_logs, line % (sent, sent)])
    outputs = _first(result.outputs, limit - _size(bare))
    lines = [*result.system_logs, line % (sent - len(outputs), sent)]
    return result._replace(outputs=outputs, system_logs=lines)


def _first(rows: List[Any], room: int) -> List[Any]:
    """As many of the first rows as fit into `room` bytes."""
    for count, row in enumerate(rows):
        room -= _size(row) + len(", ")
        if room < 0:
            return rows[:count]
    return rows


def _cut(executor: job.ExecutorResult, bound: int) -> job.ExecutorResult:
    return executor._replace(stdout=_bounded(executor.stdout, bound), stderr=_bounded(executor.stderr, bound))


def _bounded(text: str, bound: int) -> str:
    log = BoundedLog(bound)
    log.add(text.encode("utf-8", "replace"))
    return log.text()


def _longest(executor: job.ExecutorResult) -> int:
    return max(len(text.encode("utf-8", "replace")) for text in (executor.stdout, executor.stderr))


def _size(value: Any) -> int:
    return len(json.dumps(job.to_document(value)))
