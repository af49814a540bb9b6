"""Pulsar's own documents, without any I/O: what it is sent to launch a job, and what it says of one.

The same for all carriers: REST puts the set-up into the query of one POST, AMQP and the relay send it as a message,
and all of them answer with the same status document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tesp_api.errors import SiteRefused
from tesp_api.runner.job import Plan, Progress
from tesp_api.sites import documents
from tesp_api.sites.pulsar import batch

JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")

UNSAFE_PATH: Final = re.compile(r"[^A-Za-z0-9_./:@+,=-]")
"""What Pulsar's job script, which quotes nothing, does not survive in the path of a staging directory."""

# Pulsar's types of files, for us the names of directories: inputs, metadata, outputs, and the job's own.
INPUT: Final = "input"
METADATA: Final = "metadata"
OUTPUT: Final = "output"
JOBDIR: Final = "jobdir"
OUTPUT_METADATA: Final = "output_metadata"  # the same as METADATA, but for downloads

PLAN: Final = "job.json"
PROGRESS: Final = "progress.json"
RESULT: Final = "result.json"
ANSWER: Final = "answer.json"

WAITING: Final = frozenset({"preprocessing", "queued"})
RUNNING: Final = frozenset({"running", "postprocessing"})
ENDED: Final = frozenset({"complete", "cancelled", "failed"})
LOST: Final = "lost"


@dataclass(frozen=True)
class File:
    """A text file that is in the job directory before the job starts; `kind` is one of Pulsar's types."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Launch:
    """One job, complete: what a carrier needs to have it run. `env` are lines for the head of Pulsar's job script."""

    job_id: str
    command_line: str
    files: Sequence[File]
    submit_params: Mapping[str, object] = field(default_factory=dict)
    env: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Status:
    """What Pulsar says of a job. `metadata` and `result` are known only once it has ended.

    `metadata` names the files in the metadata directory, None if Pulsar did not list them. `result` is the text of
    result.json if it came along. `stderr` is the job's own, where Pulsar's shell and python complain. `left` says that
    Pulsar lists something in the job's directory.
    """

    state: str
    returncode: int | None = None
    metadata: frozenset[str] | None = None
    result: str | None = None
    stderr: str = ""
    left: bool = False


@dataclass(frozen=True)
class Setup:
    """What Pulsar says after a set-up: the id that it gave to the job, where that lives, and its own version."""

    job_id: str
    job_directory: str
    version: str


def check_id(job_id: str) -> str:
    """The id, if it can be nothing but a plain name: Pulsar makes paths of it."""
    if not JOB_ID.fullmatch(job_id):
        raise SiteRefused(f"{job_id!r} cannot be a job id at a Pulsar: only letters, digits, '_' and '-' are safe.")
    return job_id


def launch(plan: Plan, command_line: str, *, batched: bool = False) -> Launch:
    """A plan as a job for Pulsar; `batched`: for one with a batch system behind it.

    The first progress.json is ours, so that there is something to download before the runner writes its own: a
    download of a missing file is an internal error with a traceback at Pulsar.
    """
    first = documents.dump(Progress(job_id=plan.job_id)).decode("ascii")
    text = documents.dump(plan).decode("ascii")
    files = (File(PROGRESS, METADATA, first), File(PLAN, INPUT, text))
    return Launch(
        job_id=check_id(plan.job_id),
        command_line=command_line,
        files=files,
        submit_params=batch.submit_params(plan) if batched else {},
        env=batch.ENV if batched else (),
    )


def staging(files: Sequence[File]) -> dict[str, object]:
    """Small text files as Pulsar's staging actions, which need no transfer."""
    return {
        "setup": [
            {"name": each.name, "type": each.kind, "action": {"action_type": "message", "contents": each.text}}
            for each in files
        ]
    }


DYNAMIC_SOURCES: Final = ({"path": RESULT, "type": "galaxy"},)
"""Pulsar sends this file of the working directory along with the final status."""


def setup_message(job: Launch) -> dict[str, object]:
    """The body of a set-up message, for carriers that send messages."""
    return {
        "job_id": job.job_id,
        "command_line": job.command_line,
        "setup_params": {"job_id": job.job_id},
        "remote_staging": staging(job.files),
        "dynamic_file_sources": list(DYNAMIC_SOURCES),
        "env": list(job.env),
        "submit_params": dict(job.submit_params),
        "dependencies_description": None,
        "touch_outputs": [],
        "token_endpoint": None,
    }


def submit_query(job: Launch, *, set_up: bool) -> dict[str, str]:
    """The query of a REST submit; with `set_up` it creates the job directory, too."""
    query = {
        "command_line": job.command_line,
        "remote_staging": _json(staging(job.files)),
        "dynamic_file_sources": _json(DYNAMIC_SOURCES),
    }
    if job.submit_params:
        query["params"] = _json(job.submit_params)
    if job.env:
        query["env"] = _json(job.env)
    if set_up:
        query["setup_params"] = _json({"job_id": job.job_id})
    return query


def read_status(document: object) -> Status | None:
    """A status document, or None if it is none. It comes from a node: nothing in it is taken on trust."""
    if not isinstance(document, dict) or not isinstance(document.get("status"), str):
        return None
    code = document.get("returncode")
    contents = document.get("metadata_directory_contents")
    stderr = document.get("job_stderr")
    return Status(
        state=document["status"],
        returncode=code if isinstance(code, int) and not isinstance(code, bool) and documents.is_code(code) else None,
        metadata=frozenset(each for each in contents if isinstance(each, str)) if isinstance(contents, list) else None,
        result=_dynamic_result(document.get("realized_dynamic_file_sources")),
        stderr=stderr if isinstance(stderr, str) else "",
        left=any(_lists(document, folder) for folder in ("metadata", "working", "outputs", "job")),
    )


def _lists(document: Mapping[str, Any], folder: str) -> bool:
    contents = document.get(f"{folder}_directory_contents")
    return isinstance(contents, list) and bool(contents)


def read_setup(document: object) -> Setup | None:
    """The answer to a set-up, or None if it is none."""
    if not isinstance(document, dict):
        return None
    values: Mapping[str, Any] = document
    job_id, directory = values.get("job_id"), values.get("job_directory")
    if not isinstance(job_id, str) or not isinstance(directory, str):
        return None
    return Setup(job_id=job_id, job_directory=directory, version=str(values.get("pulsar_version") or ""))


def _dynamic_result(sources: object) -> str | None:
    for each in sources if isinstance(sources, list) else ():
        if isinstance(each, dict) and each.get("path") == RESULT and isinstance(each.get("contents"), str):
            contents: str = each["contents"]
            return contents
    return None


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
