"""Reading what comes from a node: whatever is not exactly right is no document at all."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from tesp_api.runner import job

PROGRESS_BYTES: Final = 64 * 1024
"""Longest progress.json that is read."""

LONG: Final = 256 * 1024
"""Bytes from which on a document is read in a thread."""

PHASES: Final = frozenset({"waiting", "staging", "running", "uploading", "done"})
STATES: Final = frozenset({"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"})

NOT_BEGUN: Final = frozenset(
    {
        1,  # python's own code for a file that is no program
        job.EXIT_NO_RUNNER,
        job.EXIT_DAMAGED_RUNNER,
        job.EXIT_OLD_PYTHON,
        job.EXIT_BAD_PLAN,
        job.EXIT_NO_PYTHON,
    }
)
"""Exit codes which say that no executor was started; to be believed only of a job whose progress still waits."""

T = TypeVar("T")
_Document = TypeVar("_Document", job.Progress, job.Result, job.Report)


def dump(document: object) -> bytes:
    """A document of `runner.job` as compact ASCII JSON."""
    return json.dumps(job.to_document(document), separators=(",", ":")).encode("ascii")


def progress(data: bytes | None, job_id: str) -> job.Progress | None:
    """The progress of this job, or None if `data` is not that."""
    found = _read(data, job.Progress, PROGRESS_BYTES)
    return found if found is not None and _is_progress(found, job_id) else None


def result(data: bytes | None, job_id: str) -> job.Result | None:
    """The result of this job, or None if `data` is not that."""
    found = _read(data, job.Result, job.RESULT_BYTES)
    return found if found is not None and _is_result(found, job_id) else None


def report(data: bytes | None, job_id: str) -> job.Report | None:
    """What this job reports, or None if `data` is not that."""
    found = _read(data, job.Report, job.REPORT_BYTES)
    if found is None or not _is_progress(found.progress, job_id) or not 0 <= found.hold <= job.HOLD:
        return None
    return found if found.result is None or _is_result(found.result, job_id) else None


async def aside(read: Callable[[bytes | None, str], T], data: bytes | None, job_id: str) -> T:
    """What `read`, one of the above, makes of `data`; a long document is read in a thread, so that others go on."""
    if data is None or len(data) <= LONG:
        return read(data, job_id)
    return await asyncio.to_thread(read, data, job_id)


def _is_progress(found: job.Progress, job_id: str) -> bool:
    counts = (found.executor, found.beat, found.stdout_bytes, found.stderr_bytes)
    tails = (found.stdout, found.stderr)
    return (
        found.job_id == job_id
        and found.phase in PHASES
        and all(0 <= each < 1 << 63 for each in counts)
        and all(len(each) <= job.TAIL_BYTES for each in tails)
    )


def _is_result(found: job.Result, job_id: str) -> bool:
    return (
        found.job_id == job_id
        and found.state in STATES
        and all(is_code(each.exit_code) for each in found.executors)
        and all(0 <= each.size_bytes < 1 << 63 for each in found.outputs)
    )


def is_code(code: int) -> bool:
    """Whether this can be the exit code of a process; TES gives it 32 bits."""
    return -(1 << 31) <= code < 1 << 31


def begun(found: job.Progress | None) -> bool:
    """Whether a runner may have taken the job: without a progress that says "waiting" nobody can rule that out."""
    return found is None or found.phase != "waiting"


def surely_begun(found: job.Progress | None) -> bool:
    """Whether a runner has taken the job for sure."""
    return found is not None and begun(found)


def exit_code(code: int | None, found: job.Progress | None) -> int | None:
    """What the exit code of a job without a result means as a runner's.

    A code that claims that nothing was started is None when the progress says otherwise. A success that left no trace
    is an empty runner: an upload that broke off can leave that, and python runs it happily.
    """
    if code == job.EXIT_DONE and not begun(found):
        return job.EXIT_DAMAGED_RUNNER
    return None if code in NOT_BEGUN and begun(found) else code


def words(text: str, limit: int = 300) -> str:
    """The last line of foreign text, printable and short."""
    lines = [line for line in text[-4096:].splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    return "".join(each if each.isprintable() else "?" for each in last)[:limit]


_READERS: Final[Mapping[type, Callable[[Any], Any]]] = {
    job.Progress: job.read_progress,
    job.Result: job.read_result,
    job.Report: job.read_report,
}


def _read(data: bytes | None, kind: type[_Document], limit: int) -> _Document | None:
    if data is None or len(data) > limit:
        return None
    read = _READERS[kind]
    try:
        found: Any = read(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    return found if _conforms(found, kind) else None


def _conforms(value: object, hint: Any) -> bool:
    """Whether a value is of its annotated type, all the way down."""
    return _check(hint)(value)


@cache
def _check(hint: Any) -> Callable[[object], bool]:
    """What tells whether a value conforms to a hint: made once, since a result can have very many rows."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        choices = [_check(each) for each in arguments]
        return lambda value: any(fits(value) for fits in choices)
    if origin is list:
        row = _check(arguments[0])
        return lambda value: isinstance(value, list) and all(map(row, value))
    if origin is dict:
        entry = _check(arguments[1])
        return lambda value: isinstance(value, dict) and all(map(entry, value.values()))
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        return lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    if hasattr(hint, "_fields"):
        hints = get_type_hints(hint)
        fields = [_check(hints[name]) for name in hint._fields]
        return lambda value: (
            isinstance(value, hint) and all(fits(each) for fits, each in zip(fields, value, strict=True))
        )
    return lambda value: isinstance(value, hint)
