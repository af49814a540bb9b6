"""Our record as plain JSON values and back, the same for every store. A round trip loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from itertools import chain
from typing import Any

from pydantic import TypeAdapter

from tesp_api.task import MANY, Attempt, Bodies, Tail, Task
from tesp_api.tes import TesOutputFileLog, TesTaskLog

_FILES = TypeAdapter(list[TesOutputFileLog])
_PLAIN = tuple(each.name for each in fields(Attempt) if each.name != "log")


def attempts_to_json(attempts: tuple[Attempt, ...]) -> str:
    """Attempts as JSON text."""
    return f"[{','.join(map(attempt_to_json, attempts))}]"


def attempt_to_json(attempt: Attempt) -> str:
    """One attempt as JSON text."""
    return json.dumps(_attempt_to_document(attempt), ensure_ascii=False, separators=(",", ":"))


def _attempt_to_document(attempt: Attempt) -> dict[str, Any]:
    document = {name: getattr(attempt, name) for name in _PLAIN}
    document["log"] = attempt.log.model_dump(mode="json", exclude_none=True)
    return document


def attempts_from_json(text: str) -> tuple[Attempt, ...]:
    """The attempts of `attempts_to_json`; keys of a newer version are ignored."""
    return tuple(_attempt(document) for document in json.loads(text))


def attempt_from_json(text: str | bytes) -> Attempt:
    """The attempt of `attempt_to_json`."""
    return _attempt(json.loads(text))


def _attempt(document: Mapping[str, Any]) -> Attempt:
    plain = {name: document[name] for name in _PLAIN if name in document}
    plain["tokens"] = tuple(plain.get("tokens", ()))
    return Attempt(**plain, log=_log(document["log"]))


def _log(document: Mapping[str, Any]) -> TesTaskLog:
    """The log of an attempt. Many output files are read in parts, since other threads stand still during each."""
    files = document["outputs"]
    parts = (_FILES.validate_python(files[at : at + MANY]) for at in range(0, len(files), MANY))
    return TesTaskLog.model_validate({**document, "outputs": list(chain.from_iterable(parts))})


# Bodies: each text has a key (kind, attempt number, index); system lines are counted by index.

CONTENT, STDOUT, STDERR, SYSTEM = "content", "stdout", "stderr", "system"


def content_rows(bodies: Bodies | None) -> list[tuple[str, int, int, str]]:
    """(kind, 0, input index, text) of each literal content."""
    return [] if bodies is None else [(CONTENT, 0, index, text) for index, text in bodies.contents.items()]


def stream_rows(streams: Mapping[tuple[int, int, str], str]) -> list[tuple[str, int, int, str]]:
    """(kind, attempt number, executor index, text) of each stream."""
    return [(name, number, index, text) for (number, index, name), text in streams.items()]


def bodies_from_rows(rows: Iterable[tuple[str, int, int, str]]) -> Bodies:
    """Bodies from rows (kind, attempt number, index, text) in ascending order of index."""
    contents: dict[int, str] = {}
    streams: dict[tuple[int, int, str], str] = {}
    system: dict[int, list[str]] = {}
    for kind, number, index, text in rows:
        if kind == CONTENT:
            contents[index] = text
        elif kind == SYSTEM:
            system.setdefault(number, []).append(text)
        else:
            streams[number, index, kind] = text
    return Bodies(contents=contents, streams=streams, system=system)


def tail_to_json(tail: Tail) -> str:
    """A tail as JSON text."""
    return json.dumps(asdict(tail), ensure_ascii=False, separators=(",", ":"))


def tail_from_json(text: str) -> Tail:
    """The tail of `tail_to_json`; keys of a newer version are ignored."""
    document = json.loads(text)
    return Tail(**{each.name: document[each.name] for each in fields(Tail) if each.name in document})


def asked(task: Task) -> tuple[float, float]:
    """CPU cores and GB of memory that a task asks for; 0 where it does not say."""
    resources = task.spec.resources
    if resources is None:
        return 0.0, 0.0
    return float(resources.cpu_cores or 0), float(resources.ram_gb or 0)


def ended_at(task: Task) -> float | None:
    """When a final task that comes from elsewhere ended, as far as can be told; None for others."""
    times = [each.ended for each in task.attempts if each.ended is not None]
    return max([task.created, *times]) if task.final else None
