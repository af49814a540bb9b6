"""The documents that the service and the runner exchange: the only contract between them.

A job directory (Pulsar's, or the local site's) looks like this, `JOB` being its root::

    JOB/inputs/job.json         Plan, written by the service before the start
    JOB/answer.json             Answer, uploaded by the service while the job runs
    JOB/metadata/progress.json  Progress, replaced by rename while the job runs (the service writes the first one)
    JOB/metadata/result.json    Result, written once by rename: the truth about the job
    JOB/working/result.json     a copy of it, which Pulsar brings back inside its final status
    JOB/tes/                    what the containers see: everything that a Mount's relative `at` names

Where the plan names a place to report to, the same Progress and Result are also sent there as a Report, and an Answer
comes back.

All documents are JSON objects in ASCII (other characters escaped), because Pulsar breaks on anything else.
Times are RFC 3339 in UTC with microseconds, such as `2026-01-31T12:00:00.000000Z`.
"""

from typing import Any, Dict, List, NamedTuple, Optional, cast

VERSION = 1
"""Version of the documents; a runner refuses a plan of another version."""

FILE = "FILE"
DIRECTORY = "DIRECTORY"

# Exit codes of the runner's process. 0: result.json is written (whatever it says). The others mean that no executor
# was started, so that the service may try again at once, under a new job id.
EXIT_DONE = 0
EXIT_UNREADABLE_RUNNER = 1  # python could not read the zipapp (cut off, damaged) or not begin: python's own code
EXIT_NO_RUNNER = 2  # python could not open the zipapp at all: python's own code for that
EXIT_NO_RESULT = 75  # the exception: executors may have run, but the result cannot be stored (yet)
EXIT_DAMAGED_RUNNER = 76  # the zipapp's hash is not the expected one
EXIT_OLD_PYTHON = 77  # this python cannot run the runner
EXIT_BAD_PLAN = 78  # job.json is missing or unreadable
EXIT_DUPLICATE = 79  # another runner has taken this job, now or long ago; that one writes the result, or has
EXIT_NO_PYTHON = 127  # the shell found no python3


class Input(NamedTuple):
    """One thing to put at `path` (a container path below some mount) before the first executor."""

    path: str
    kind: str = FILE
    url: Optional[str] = None
    content: Optional[str] = None


class Output(NamedTuple):
    """One thing to send to `url` after the last executor.

    With `prefix`, `path` is a pattern (POSIX 2.13: `*`, `?`, `[...]`, none of which matches a slash) and each match
    goes to `url` + the match without `prefix`; no match is fine. Without it, `path` must exist after a success.
    """

    path: str
    url: str
    kind: str = FILE
    prefix: Optional[str] = None


class Mount(NamedTuple):
    """`target` in the container is `at` on the node: relative to JOB/tes, or absolute for a live mount of a file root.

    `kind` is FILE or DIRECTORY. The runner creates what is relative: directories (mode 1777 for `/tmp`, else 0777,
    so that a container's user can write), and empty files.
    """

    target: str
    at: str
    kind: str = DIRECTORY
    read_only: bool = False


class Executor(NamedTuple):
    """One container to run; stdin, stdout and stderr are container paths below mounts."""

    image: str
    command: List[str]
    workdir: Optional[str] = None
    stdin: Optional[str] = None
    stdout: Optional[str] = None
    stderr: Optional[str] = None
    env: Dict[str, str] = {}  # read only by agreement, as all of a plan
    ignore_error: bool = False


class FileRoot(NamedTuple):
    """A directory of the node that `file:` URLs may name, links resolved; `write` also for outputs.

    `mount`: inputs below it are bind-mounted live instead of copied (the planner's concern, not the runner's).
    """

    path: str
    write: bool = True
    mount: bool = False


class Runtime(NamedTuple):
    """What runs the containers.

    `kind`: auto | docker | bubblewrap | host. `docker_host`: `unix:///path` or `tcp://host:port`, empty for the
    standard socket. `network`: the engine's network name, empty for its default. `hide`: directories of the node
    that bubblewrap must not show. `pull`: missing | never.
    """

    kind: str = "auto"
    docker_host: str = ""
    network: str = ""
    hide: List[str] = []
    pull: str = "missing"


class ReportTo(NamedTuple):
    """Where the runner tells how the job is, and hears of a cancel: POST `url` with the bearer `token`."""

    url: str
    token: str


RESULT_BYTES = 32 * 1024 * 1024
"""Longest result that the service reads."""


class Plan(NamedTuple):
    """All that the runner needs to know of one attempt of a task.

    `directories`: container paths below mounts that must be directories before the first executor starts.
    `report`: None where nobody is to be told over HTTP; the files in the job's directory are written in any case.
    `result_bytes`: the runner shortens a longer result, so that it is read.
    `time_limit`: seconds, and `queue`: a name, for a batch system in front of the runner, which enforces them.
    """

    job_id: str
    task_id: str
    executors: List[Executor]
    inputs: List[Input] = []
    outputs: List[Output] = []
    mounts: List[Mount] = []
    cpus: Optional[float] = None
    ram_bytes: Optional[int] = None
    runtime: Runtime = Runtime()
    file_roots: List[FileRoot] = []
    log_bytes: int = 131072
    directories: List[str] = []
    report: Optional[ReportTo] = None
    time_limit: Optional[int] = None
    queue: Optional[str] = None
    result_bytes: int = RESULT_BYTES
    version: int = VERSION


TAIL_BYTES = 4096
"""Longest tail of a stream in a progress, as UTF-8."""


class Progress(NamedTuple):
    """How far a job is.

    `phase`: waiting (written by the service) | staging | running | uploading | done. `executor`: index of the current
    one. `started`: when the first executor started. `beat`: grows while the runner lives, at least every 5 s.
    `stdout`, `stderr`: the end of what the current executor has written so far, at most TAIL_BYTES; `stdout_bytes` and
    `stderr_bytes`: how much that was altogether, up to the end of the tail. Each byte that is no UTF-8 is a `?`.
    """

    job_id: str
    phase: str = "waiting"
    executor: int = 0
    started: Optional[str] = None
    beat: int = 0
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    version: int = VERSION


class Answer(NamedTuple):
    """What the service tells a running job: `cancel` asks it to stop its containers and write its result.

    `pause`: seconds for which the job should not ask again.
    """

    cancel: bool = False
    pause: float = 0.0
    version: int = VERSION


class ExecutorResult(NamedTuple):
    """How one executor ended: exact exit code (128 + N for signal N), bounded logs as text."""

    exit_code: int
    start_time: str
    end_time: str
    stdout: str = ""
    stderr: str = ""


class OutputFile(NamedTuple):
    """One uploaded file; `size_bytes` counts what was sent."""

    url: str
    path: str
    size_bytes: int


class Result(NamedTuple):
    """What became of a job.

    `state`: COMPLETE | EXECUTOR_ERROR | SYSTEM_ERROR | CANCELED (words of TES). `executors` holds only those that
    ended, in order; the last one may have been stopped. `started` tells whether any executor was started, so that a
    retry may be known to be safe. `infrastructure`: the node or its engine failed, not the task, so that another try
    may help.
    """

    job_id: str
    state: str
    start_time: str
    end_time: str
    started: bool = False
    executors: List[ExecutorResult] = []
    outputs: List[OutputFile] = []
    system_logs: List[str] = []
    metadata: Dict[str, str] = {}
    infrastructure: bool = False
    version: int = VERSION


class Report(NamedTuple):
    """What a job sends by itself: its progress, in the end with the result unless that is too long.

    With `hold` the answer may take up to so many seconds: it comes as soon as there is a wish to be told.
    """

    progress: Progress
    result: Optional[Result] = None
    hold: float = 0.0
    version: int = VERSION


HOLD = 20.0
"""Longest `hold` in seconds."""

REPORT_BYTES = 1024 * 1024
"""Longest report."""


def has_failed(plan: Plan, results: List[ExecutorResult]) -> bool:
    """Whether an executor has failed by itself, which ends the task whatever happens after."""
    pairs = zip(plan.executors, results)  # noqa: B905 - `strict` is too new
    return any(result.exit_code != 0 and not executor.ignore_error for executor, result in pairs)


def to_document(value: Any) -> Any:
    """The JSON form of any of the above: objects without the keys that are None, lists, strings, numbers."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: to_document(getattr(value, name)) for name in value._fields if getattr(value, name) is not None}
    if isinstance(value, (list, tuple)):
        return [to_document(item) for item in value]
    if isinstance(value, dict):
        return {key: to_document(item) for key, item in value.items()}
    return value


def _rows(kind: Any, documents: Any) -> List[Any]:
    if not isinstance(documents, list):
        raise ValueError("%s: not in a list" % kind.__name__)
    return [_record(kind, document) for document in documents]


_NESTED: Dict[Any, Dict[str, Any]] = {
    Plan: {"executors": Executor, "inputs": Input, "outputs": Output, "mounts": Mount, "file_roots": FileRoot},
    Result: {"executors": ExecutorResult, "outputs": OutputFile},
}

_PARTS: Dict[Any, Dict[str, Any]] = {
    Plan: {"runtime": Runtime, "report": ReportTo},
    Report: {"progress": Progress, "result": Result},
}


def _record(kind: Any, document: Any) -> Any:
    """Build `kind` from a JSON object. Unknown keys are ignored; ValueError if it is not such an object."""
    if not isinstance(document, dict):
        raise ValueError("%s: not an object" % kind.__name__)
    if document.get("version", VERSION) != VERSION:
        raise ValueError("%s: version %r is not %r" % (kind.__name__, document.get("version"), VERSION))
    values = {name: document[name] for name in kind._fields if name in document}
    for name, row in _NESTED.get(kind, {}).items():
        if name in values:
            values[name] = _rows(row, values[name])
    for name, part in _PARTS.get(kind, {}).items():
        if name in values:
            values[name] = _record(part, values[name])
    try:
        return kind(**values)
    except TypeError as error:  # a required key is missing
        raise ValueError("%s: %s" % (kind.__name__, error))


def read_plan(document: Any) -> Plan:
    """A Plan from its JSON form; ValueError says what is wrong."""
    return cast(Plan, _record(Plan, document))


def read_progress(document: Any) -> Progress:
    """A Progress from its JSON form; ValueError says what is wrong."""
    return cast(Progress, _record(Progress, document))


def read_answer(document: Any) -> Answer:
    """An Answer from its JSON form; ValueError says what is wrong."""
    return cast(Answer, _record(Answer, document))


def read_result(document: Any) -> Result:
    """A Result from its JSON form; ValueError says what is wrong."""
    return cast(Result, _record(Result, document))


def read_report(document: Any) -> Report:
    """A Report from its JSON form; ValueError says what is wrong."""
    return cast(Report, _record(Report, document))
