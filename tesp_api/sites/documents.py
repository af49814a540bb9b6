"""Reading what comes from a node: whatever is not exactly right is no document at all."""

from __future__ import annotations

import json
import types
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from tesp_api.runner import job

PROGRESS_BYTES: Final = 64 * 1024
"""Longest progress.json that is read."""

RESULT_BYTES: Final = 32 * 1024 * 1024
"""Longest result.json that is read."""

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

_Document = TypeVar("_Document", job.Progress, job.Result)


def dump(document: object) -> bytes:
    """A document of `runner.job` as compact ASCII JSON."""
    return json.dumps(job.to_document(document), separators=(",", ":")).encode("ascii")


def progress(data: bytes | None, job_id: str) -> job.Progress | None:
    """The progress of this job, or None if `data` is not that."""
    found = _read(data, job.Progress, PROGRESS_BYTES)
    if found is None or found.job_id != job_id or found.phase not in PHASES or found.executor < 0 or found.beat < 0:
        return None
    return found


def result(data: bytes | None, job_id: str) -> job.Result | None:
    """The result of this job, or None if `data` is not that."""
    found = _read(data, job.Result, RESULT_BYTES)
    if found is None or found.job_id != job_id or found.state not in STATES:
        return None
    return found


def begun(found: job.Progress | None) -> bool:
    """Whether a runner may have taken the job: without a progress that says "waiting" nobody can rule that out."""
    return found is None or found.phase != "waiting"


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


def _read(data: bytes | None, kind: type[_Document], limit: int) -> _Document | None:
    if data is None or len(data) > limit:
        return None
    read = job.read_progress if kind is job.Progress else job.read_result
    try:
        found: Any = read(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    return found if _conforms(found, kind) else None


def _conforms(value: object, hint: Any) -> bool:
    """Whether a value is of its annotated type, all the way down."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_conforms(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(_conforms(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_conforms(each, arguments[1]) for each in value.values())
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, hint):
        return False
    if hasattr(hint, "_fields"):
        return all(_conforms(getattr(value, name), each) for name, each in get_type_hints(hint).items())
    return True
