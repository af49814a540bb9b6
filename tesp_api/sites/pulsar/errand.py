"""Errands: small jobs of our own that act on files at a Pulsar which can be reached by letters only. Without any I/O.

Pulsar has no call for files over a message queue, but its jobs lie side by side, so one job can see to the others. What
such a job does on the node is `tesp_api.runner.messenger`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final

from tesp_api.runner.bundle import FILE_NAME, Bundle, pseudo_job
from tesp_api.sites.pulsar import messages
from tesp_api.sites.pulsar.messages import INPUT, File, Launch

ERRAND_ID: Final = re.compile(r"tes-errand-[0-9a-f]{32}")

COMMAND: Final = "python3 -IS ../inputs/messenger.py"
"""The whole command line of an errand; nothing of anybody's is ever in it."""

MOST: Final = 500
"""Requests in one errand."""

MOST_BYTES: Final = 8 * 1024 * 1024
"""Bytes of programs and documents in one errand; the first request has room in any case."""


@dataclass(frozen=True)
class Read:
    """A document in the job's metadata directory, if it is not longer than `limit`."""

    job_id: str
    name: str
    limit: int


@dataclass(frozen=True)
class Write:
    """A document for the job's directory."""

    job_id: str
    name: str
    text: str


@dataclass(frozen=True)
class Remove:
    """The job's directory, away with it."""

    job_id: str


@dataclass(frozen=True)
class Install:
    """The runner, into its pseudo job."""

    runner: Bundle


Request = Read | Write | Remove | Install


@dataclass(frozen=True)
class Failed:
    """What the node says of a request that it could not fulfil."""

    reason: str


class NoRoom:
    """The answer was full before this request's turn; to be asked again."""


Outcome = bytes | None | Failed | NoRoom
"""bytes or None: the document, or that there is none to be had; None also for what was done."""


def new_id() -> str:
    """A name for a new errand, never used before."""
    return f"tes-errand-{secrets.token_hex(16)}"


def is_errand(job_id: str) -> bool:
    """Whether a job is an errand of some service's."""
    return ERRAND_ID.fullmatch(job_id) is not None


def fitting(requests: Iterable[Request]) -> list[Request]:
    """As many of the requests, from the first on, as go into one errand."""
    chosen: list[Request] = []
    room = MOST_BYTES
    for each in requests:
        room -= _size(each)
        if chosen and (room < 0 or len(chosen) == MOST):
            break
        chosen.append(each)
    return chosen


def launch(errand_id: str, requests: Sequence[Request], spent: Iterable[str] = ()) -> Launch:
    """The job that fulfils the requests, and removes the directories of the errands in `spent`."""
    orders = {
        "errand": errand_id,
        "read": [[each.job_id, each.name, each.limit] for each in requests if isinstance(each, Read)],
        "write": [[each.job_id, each.name, each.text] for each in requests if isinstance(each, Write)],
        "install": [_install(each.runner) for each in requests if isinstance(each, Install)],
        "remove": [each.job_id for each in requests if isinstance(each, Remove)]
        + [each for each in spent if is_errand(each)],
    }
    program = File("messenger.py", INPUT, _program())
    return Launch(
        job_id=messages.check_id(errand_id),
        command_line=COMMAND,
        files=(program, File("orders.json", INPUT, json.dumps(orders, separators=(",", ":")))),
    )


def outcomes(errand_id: str, text: str | None, requests: Sequence[Request]) -> Mapping[Request, Outcome] | None:
    """What became of each request by the errand's result.json, or None if that is no answer to them.

    It comes from a node: nothing in it is taken on trust, and what it unpacks to is bounded by what was asked for.
    """
    try:
        answer: Any = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or answer.get("errand") != errand_id:
        return None
    found: dict[Request, Outcome] = {}
    for kind, key in ((Read, "read"), (Write, "write"), (Remove, "remove"), (Install, "install")):
        asked = [each for each in requests if isinstance(each, kind)]
        told = answer.get(key)
        if not isinstance(told, list) or len(told) < len(asked):
            return None
        for request, what in zip(asked, told, strict=False):
            found[request] = _read(request, what) if isinstance(request, Read) else _done(what)
    return found


def _read(request: Read, what: object) -> Outcome:
    if what is False:
        return NoRoom()
    if not isinstance(what, str):
        return None
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(what, validate=True), request.limit + 1)
    except (binascii.Error, ValueError, zlib.error):
        return None
    return data if unpacker.eof and len(data) <= request.limit else None


def _done(what: object) -> Outcome:
    if what is True:
        return None
    return Failed(what if isinstance(what, str) else "the node does not say why")


def _size(request: Request) -> int:
    if isinstance(request, Install):
        return len(request.runner.data) * 4 // 3
    return len(request.text) if isinstance(request, Write) else 300


def _install(runner: Bundle) -> list[str]:
    return [pseudo_job(runner.sha256), FILE_NAME, runner.sha256, base64.b64encode(runner.data).decode("ascii")]


@cache
def _program() -> str:
    return files("tesp_api.runner").joinpath("messenger.py").read_text("ascii")
