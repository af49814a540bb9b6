"""The vocabulary of TES 1.1: the published models, how a request is read, and the rules that it must keep.

The models say what a document looks like and read it leniently, as real clients write it (nulls, a missing `type`, a
single string for `zones`, ...). They judge nothing else, so that a stored task and another server's answer can be
read with them too. A request comes in through `read_task`, which takes out what only the server sets and then holds
the task against the rules of `faults`. Absent and null are the same: None, which is never written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import ErrorDetails, from_json

from tesp_api.errors import Detail, InvalidRequest

MAX_EXECUTORS: Final = 1_000
MAX_INPUTS: Final = 10_000
MAX_OUTPUTS: Final = 10_000
MAX_VOLUMES: Final = 1_000
MAX_PAIRS: Final = 1_000
"""Tags, backend parameters, and environment variables of one executor."""
MAX_ARGUMENTS: Final = 100_000
MAX_PATH: Final = 4_095
MAX_URL: Final = 65_536
MAX_IMAGE: Final = 1_024
MAX_CONTENT: Final = 8 << 20
"""Bytes in the `content` of one input."""
MAX_CONTENTS: Final = 16 << 20
"""Bytes in the `content` of all inputs together."""
MAX_DOCUMENT: Final = 8 << 20
"""Bytes of a request without its contents."""
MAX_GB: Final = 1e9
"""Of memory or disk: an exabyte is a slip of the pen."""
MAX_FAULTS: Final = 20
"""More faults than this are not listed."""

NO_IMAGE: Final = frozenset("\"#$&'()*;<>?[\\]^`{|}!")
"""Signs that no image has in its name, but that a shell would act on: a second wall, as nothing here is a shell."""

READ_ONLY: Final = ("id", "state", "logs", "creation_time")
"""Fields of a task that only the server sets."""

WILDCARDS: Final = frozenset("*?[")
"""Signs that make an output's path a pattern."""


# --- words ---------------------------------------------------------------------------------------------------------


class TesState(StrEnum):
    """Where a task stands; the server alone sets it.

    - `UNKNOWN`: nothing is known; what a reader should assume when the field is missing.
    - `QUEUED`: accepted, waiting for its turn.
    - `INITIALIZING`: given to a site, which prepares it, for example fetches the inputs.
    - `RUNNING`: the first executor has been started.
    - `PAUSED`: held by the system (this server never does that).
    - `COMPLETE`: all executors ended well and every output is in its place.
    - `EXECUTOR_ERROR`: an executor failed, as a rule with an exit code other than 0.
    - `SYSTEM_ERROR`: something other than an executor failed, for example a transfer.
    - `CANCELED`: stopped at the user's wish, and nothing of it is left running.
    - `PREEMPTED`: stopped by the system, which needed the place.
    - `CANCELING`: the user's wish to stop is known, but not all has been cleared away yet.
    """

    UNKNOWN = "UNKNOWN"
    QUEUED = "QUEUED"
    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    EXECUTOR_ERROR = "EXECUTOR_ERROR"
    SYSTEM_ERROR = "SYSTEM_ERROR"
    CANCELED = "CANCELED"
    PREEMPTED = "PREEMPTED"
    CANCELING = "CANCELING"


class TesFileType(StrEnum):
    """Whether an input or output is one file or a whole directory. The server takes FILE when nothing is said."""

    FILE = "FILE"
    DIRECTORY = "DIRECTORY"


class TesView(StrEnum):
    """How much of a task an answer shows.

    - `MINIMAL`: id and state only.
    - `BASIC`: everything but the long texts: what executors printed, input contents and system logs.
    - `FULL`: everything.
    """

    MINIMAL = "MINIMAL"
    BASIC = "BASIC"
    FULL = "FULL"


# --- lenient reading -----------------------------------------------------------------------------------------------


def _without_nulls(value: Any) -> Any:
    """A map without the keys whose value is null."""
    if isinstance(value, dict) and None in value.values():
        return {key: item for key, item in value.items() if item is not None}
    return value


def _file_type(value: Any) -> Any:
    """FILE for every way of saying nothing; case does not matter."""
    if value is None or value == "" or value == 0:
        return TesFileType.FILE
    return value.upper() if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _whole_up(value: Any) -> Any:
    """Fractions of a core become the next whole number."""
    return math.ceil(value) if isinstance(value, float) and math.isfinite(value) else value


Map = Annotated[dict[str, str], BeforeValidator(_without_nulls)]
FileType = Annotated[TesFileType, BeforeValidator(_file_type)]
Int64 = Annotated[
    int,
    Field(ge=0, le=2**63 - 1),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "format": "int64"}),
]
"""A number in Python, a string of digits in JSON, which has no 64 bit numbers."""


class Model(BaseModel):
    """Base of the models: frozen; unknown keys are dropped."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


# --- the task ------------------------------------------------------------------------------------------------------


class TesInput(Model):
    """One file or directory that is put into the containers before the first executor starts."""

    name: str | None = Field(default=None, description="A name for readers.", examples=["reads"])
    description: str | None = Field(default=None, description="A remark for readers.", examples=["Reads of sample 7"])
    url: str | None = Field(
        default=None,
        description=(
            "Where the data comes from. Needed unless `content` is given: http(s), ftp(s), s3 and file URLs, and "
            "absolute paths of the site."
        ),
        examples=["s3://bucket/reads.fq"],
    )
    path: str = Field(description="Absolute path in the containers.", examples=["/data/reads.fq"])
    type: FileType = Field(default=TesFileType.FILE, description="What `url` names; FILE when left out.")
    content: str | None = Field(
        default=None,
        description="The file's text itself, up to 8 MiB. When it is not empty, `url` is not used.",
        examples=["Hello\n"],
    )
    streamable: bool | None = Field(
        default=None, description="A hint that the data may be streamed instead of copied.", examples=[False]
    )

    @model_validator(mode="before")
    @classmethod
    def _no_content_beside_url(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("content") == "" and value.get("url"):
            return {key: item for key, item in value.items() if key != "content"}
        return value


class TesOutput(Model):
    """One file or directory, or a pattern of them, that is sent away after the last executor."""

    name: str | None = Field(default=None, description="A name for readers.", examples=["alignment"])
    description: str | None = Field(default=None, description="A remark for readers.", examples=["Sorted"])
    url: str = Field(
        description="Where the data goes; a directory if `path` is a pattern or `type` is DIRECTORY.",
        examples=["s3://bucket/result.bam"],
    )
    path: str = Field(
        description="Absolute path in the containers. May be a pattern with `*`, `?` and `[...]`, as in a shell.",
        examples=["/data/result.bam"],
    )
    path_prefix: str | None = Field(
        default=None,
        description=(
            "The part that is cut from the paths that match a pattern; the rest is added to `url`. Needed with a "
            "pattern, not used without one."
        ),
        examples=["/data"],
    )
    type: FileType = Field(default=TesFileType.FILE, description="What `path` names; FILE when left out.")


class TesResources(Model):
    """What a task asks of the machine."""

    cpu_cores: Annotated[int, BeforeValidator(_whole_up), Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None,
        description="CPU cores; fractions are rounded up.",
        examples=[4],
        json_schema_extra={"format": "int32"},
    )
    preemptible: bool | None = Field(
        default=None,
        description="Whether capacity will do that may be taken back at any time.",
        examples=[False],
    )
    ram_gb: Annotated[float, Field(ge=0, le=MAX_GB, allow_inf_nan=False)] | None = Field(
        default=None, description="Memory in gigabytes.", examples=[8], json_schema_extra={"format": "double"}
    )
    disk_gb: Annotated[float, Field(ge=0, le=MAX_GB, allow_inf_nan=False)] | None = Field(
        default=None, description="Disk space in gigabytes.", examples=[40], json_schema_extra={"format": "double"}
    )
    zones: Annotated[list[str], BeforeValidator(_one_or_many)] | None = Field(
        default=None, description="Zones of the backend in which the task may run.", examples=[["us-west-1"]]
    )
    backend_parameters: Map | None = Field(
        default=None,
        description=(
            "Settings of the backend beyond the standard, keys without regard to case. The service info lists those "
            "that this server knows; others are dropped with a line in the system logs."
        ),
        examples=[{"VmSize": "Standard_D64_v3"}],
    )
    backend_parameters_strict: bool | None = Field(
        default=None,
        description="Refuse the task instead of dropping a backend parameter that this server does not know.",
        examples=[False],
        json_schema_extra={"default": False},
    )


class TesExecutor(Model):
    """One command in one container. Executors run one after the other and see the same inputs and volumes."""

    image: str = Field(description="The container image.", examples=["ubuntu:20.04"])
    command: list[str] = Field(
        description="Program and arguments, handed over as they are: no shell reads them.",
        examples=[["/bin/md5", "/data/file1"]],
    )
    workdir: str | None = Field(
        default=None, description="Where the command starts; the image decides when left out.", examples=["/data/"]
    )
    stdin: str | None = Field(
        default=None, description="Absolute path of a file that the command reads as its input.", examples=["/data/in"]
    )
    stdout: str | None = Field(
        default=None, description="Absolute path of a file for what the command prints.", examples=["/data/out.log"]
    )
    stderr: str | None = Field(
        default=None, description="Absolute path of a file for the command's messages.", examples=["/data/err.log"]
    )
    env: Map | None = Field(
        default=None,
        description="Variables that are added to the image's environment.",
        examples=[{"BLASTDB": "/data/GRC38"}],
    )
    ignore_error: bool | None = Field(
        default=None, description="Go on with the next executor even if this one fails.", examples=[False]
    )


class TesExecutorLog(Model):
    """How one executor ended."""

    start_time: str | None = Field(
        default=None, description="When it started, RFC 3339.", examples=["2026-01-31T12:00:00.000000Z"]
    )
    end_time: str | None = Field(
        default=None, description="When it ended, RFC 3339.", examples=["2026-01-31T12:00:05.000000Z"]
    )
    stdout: str | None = Field(
        default=None,
        description="What it printed; the middle of a long text is left out. Ask for an output file to have it all.",
        examples=["Hello\n"],
    )
    stderr: str | None = Field(
        default=None, description="Its messages, shortened in the same way.", examples=["warning: no header\n"]
    )
    exit_code: int = Field(description="Its exit code.", examples=[0], json_schema_extra={"format": "int32"})


class TesOutputFileLog(Model):
    """One file that was sent to its place. Directories and patterns show up file by file."""

    url: str = Field(description="Where the file is now.", examples=["s3://bucket/result.bam"])
    path: str = Field(description="Where it was in the containers.", examples=["/data/result.bam"])
    size_bytes: Int64 = Field(
        description="Its size in bytes, as a string, since JSON has no 64 bit numbers.", examples=["1024"]
    )


class TesTaskLog(Model):
    """One attempt to run the task."""

    logs: list[TesExecutorLog] = Field(description="The executors that have ended, in order.")
    metadata: Map | None = Field(
        default=None, description="What else the server noted.", examples=[{"site": "cluster-a"}]
    )
    start_time: str | None = Field(
        default=None, description="When the attempt started, RFC 3339.", examples=["2026-01-31T12:00:00.000000Z"]
    )
    end_time: str | None = Field(
        default=None, description="When the attempt ended, RFC 3339.", examples=["2026-01-31T12:00:05.000000Z"]
    )
    outputs: list[TesOutputFileLog] = Field(description="The files that were sent away.")
    system_logs: list[str] | None = Field(
        default=None,
        description="What the system has to say, for example why it failed. In the FULL view only.",
        examples=[["inputs[0]: http://example.org/x answered 404"]],
    )


class TesTask(Model):
    """A task: inputs, commands in containers, outputs; and what became of it."""

    id: str | None = Field(
        default=None,
        description="The name that the server gave it.",
        examples=["01jz8y7m5q3v9c2k4n6t8w0xaf"],
        json_schema_extra={"readOnly": True},
    )
    state: TesState | None = Field(default=None, examples=["COMPLETE"])
    name: str | None = Field(default=None, description="A name for readers and for filters.", examples=["hello"])
    description: str | None = Field(default=None, description="A remark for readers.", examples=["Says hello"])
    inputs: list[TesInput] | None = Field(
        default=None,
        description="What is put into the containers.",
        examples=[[{"url": "s3://bucket/file1", "path": "/data/file1"}]],
    )
    outputs: list[TesOutput] | None = Field(
        default=None,
        description="What is sent away at the end.",
        examples=[[{"path": "/data/result", "url": "s3://bucket/result", "type": "FILE"}]],
    )
    resources: TesResources | None = Field(default=None)
    executors: list[TesExecutor] = Field(
        description="The commands, run in order; the first that fails ends the task, unless it has `ignore_error`."
    )
    volumes: list[str] | None = Field(
        default=None,
        description="Directories that are empty at the start and shared by all executors.",
        examples=[["/vol/A/"]],
    )
    tags: Map | None = Field(
        default=None,
        description="Any pairs of key and value, given back as they are, and usable in filters.",
        examples=[{"WORKFLOW_ID": "cwl-01234", "PROJECT_GROUP": "alice-lab"}],
    )
    logs: list[TesTaskLog] | None = Field(
        default=None,
        description="The attempts to run it: one as a rule, one more for every retry.",
        json_schema_extra={"readOnly": True},
    )
    creation_time: str | None = Field(
        default=None,
        description="When the server took it on, RFC 3339.",
        examples=["2026-01-31T12:00:00.000000Z"],
        json_schema_extra={"readOnly": True},
    )


# --- the other answers ---------------------------------------------------------------------------------------------


class TesCreateTaskResponse(Model):
    """The answer to a new task."""

    id: str = Field(
        description="The name under which the task can be asked for.", examples=["01jz8y7m5q3v9c2k4n6t8w0xaf"]
    )


class TesCancelTaskResponse(Model):
    """The answer to a cancel: an empty object."""


class TesListTasksResponse(Model):
    """One page of tasks, newest first."""

    tasks: list[TesTask] = Field(description="The tasks of this page, in the view that was asked for.")
    next_page_token: str | None = Field(
        default=None,
        description="Give it as `page_token` to get the next page; absent on the last one.",
        examples=["eyJhIjoiMDFqejh5In0"],
    )


class Organization(Model):
    """Who runs a service."""

    name: str = Field(description="The organization's name.", examples=["My organization"])
    url: str = Field(description="The organization's web page.", examples=["https://example.org"])


class ServiceType(Model):
    """Which API a service offers."""

    group: str = Field(description="Who defined the API, as a domain name backwards.", examples=["org.ga4gh"])
    artifact: str = Field(description="The API's name there.", examples=["tes"])
    version: str = Field(description="The version of the API, not of the server.", examples=["1.1.0"])


class TesServiceType(ServiceType):
    """TES's own entry among the APIs of GA4GH."""

    artifact: str = Field(description="Always `tes`.", examples=["tes"], json_schema_extra={"enum": ["tes"]})


class Service(Model):
    """What GA4GH wants every service to say of itself."""

    id: str = Field(description="A name for the service that is unique in the world.", examples=["org.example.tes"])
    name: str = Field(description="The service's name for readers.", examples=["TES of my organization"])
    type: ServiceType
    description: str | None = Field(default=None, description="What it is for.", examples=["Runs container tasks"])
    organization: Organization
    contact_url: str | None = Field(
        default=None,
        description="Whom to ask: a web page or `mailto:`.",
        examples=["mailto:tes@example.org"],
        validation_alias="contactUrl",
        serialization_alias="contactUrl",
    )
    documentation_url: str | None = Field(
        default=None,
        description="Where to read on.",
        examples=["https://example.org/tes"],
        validation_alias="documentationUrl",
        serialization_alias="documentationUrl",
    )
    created_at: str | None = Field(
        default=None,
        description="When the service was first offered, RFC 3339.",
        examples=["2026-01-31T12:00:00Z"],
        validation_alias="createdAt",
        serialization_alias="createdAt",
    )
    updated_at: str | None = Field(
        default=None,
        description="When it was last changed, RFC 3339.",
        examples=["2026-01-31T12:00:00Z"],
        validation_alias="updatedAt",
        serialization_alias="updatedAt",
    )
    environment: str | None = Field(default=None, description="What it is used for.", examples=["prod", "test"])
    version: str = Field(description="The version of the server.", examples=["1.0.0"])


class TesServiceInfo(Service):
    """What this server is and offers."""

    type: TesServiceType
    storage: list[str] | None = Field(
        default=None,
        description="Beginnings of URLs that tasks can read and write here; not all of them.",
        examples=[["file:///data", "s3://bucket"]],
    )
    backend_parameters: list[str] | None = Field(
        default=None,
        description="The keys of `resources.backend_parameters` that this server knows.",
        examples=[["VmSize"]],
        validation_alias="tesResources_backend_parameters",
        serialization_alias="tesResources_backend_parameters",
    )


# --- a request -----------------------------------------------------------------------------------------------------


def read_task(body: bytes) -> TesTask:
    """The task in the body of a request, checked against all rules, without what only the server sets.

    Raises InvalidRequest, whose details name every field at fault.
    """
    try:
        document = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object that describes a task.")
    for name in READ_ONLY:
        document.pop(name, None)
    _infer_types(document)
    try:
        task = TesTask.model_validate(document)
    except ValidationError as error:
        raise refusal([detail_of(item) for item in error.errors(include_url=False, include_input=True)]) from None
    found = []
    for fault in faults(task):
        found.append(fault)
        if len(found) > MAX_FAULTS:
            break
    if not found and b"\\u0000" in body:
        found = [Detail(field, "must not contain a NUL character") for field in _nul_fields(task.model_dump())]
    if not found and len(body) > MAX_DOCUMENT:
        found = _oversize(task, len(body))
    if found:
        raise refusal(found)
    return task


def _infer_types(document: dict[str, Any]) -> None:
    """Say DIRECTORY where no type is given and the task shows it: a slash at the end, or a declared path inside."""
    items = [
        item
        for name in ("inputs", "outputs")
        if isinstance(document.get(name), list)
        for item in document[name]
        if isinstance(item, dict) and isinstance(item.get("path"), str)
    ]
    untyped = [item for item in items if item.get("type") in (None, "", 0) and not item.get("content")]
    if not untyped:
        return
    parents = set()
    for path in _declared(document, items):
        while (path := path.rpartition("/")[0]) and path not in parents:
            parents.add(path)
    for item in untyped:
        url = item.get("url")
        slash = item["path"].endswith("/") or (isinstance(url, str) and url.endswith("/") and url[-3:] != "://")
        pattern = not WILDCARDS.isdisjoint(item["path"])
        if not pattern and (slash or _plain(item["path"]) in parents):
            item["type"] = TesFileType.DIRECTORY


def _declared(document: dict[str, Any], items: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The container paths of a task that has not been checked yet."""
    for item in items:
        yield _plain(item["path"])
    executors = document.get("executors")
    for executor in executors if isinstance(executors, list) else ():
        if isinstance(executor, dict):
            for name in ("stdin", "stdout", "stderr"):
                if isinstance(path := executor.get(name), str):
                    yield _plain(path)


def refusal(details: Sequence[Detail]) -> InvalidRequest:
    """The error for some faults: its message is about the first one."""
    first, rest = details[0], len(details) - 1
    more = "" if not rest else f" ({rest} more fault{'s' if rest > 1 else ''})"
    return InvalidRequest(f"{first.field} {first.message}{more}.", details[:MAX_FAULTS])


def faults(task: TesTask) -> Iterator[Detail]:
    """What is wrong with a task beyond its form, in the order of the document."""
    yield from _inputs(task.inputs or ())
    yield from _outputs(task.outputs or ())
    if task.resources:
        yield from _pairs("resources.backend_parameters", task.resources.backend_parameters)
        yield from _count("resources.zones", task.resources.zones, MAX_PAIRS)
    if not task.executors:
        yield Detail("executors", "must have at least one executor")
    yield from _count("executors", task.executors, MAX_EXECUTORS)
    for index, executor in enumerate(task.executors[:MAX_EXECUTORS]):
        yield from _executor(f"executors[{index}]", executor)
    yield from _count("volumes", task.volumes, MAX_VOLUMES)
    for index, path in enumerate(task.volumes or ()):
        if wrong := _path(path):
            yield Detail(f"volumes[{index}]", wrong)
    yield from _pairs("tags", task.tags)


def _inputs(inputs: Sequence[TesInput]) -> Iterator[Detail]:
    yield from _count("inputs", inputs, MAX_INPUTS)
    seen: dict[str, int] = {}
    total = 0
    for index, item in enumerate(inputs):
        if wrong := _path(item.path):
            yield Detail(f"inputs[{index}].path", wrong)
        elif (first := seen.setdefault(_plain(item.path), index)) != index:
            yield Detail(f"inputs[{index}].path", f"must differ from inputs[{first}].path, but both are {item.path!r}")
        if item.content is None:
            if not item.url:
                yield Detail(f"inputs[{index}].url", "is required, unless there is content")
        else:
            size = _bytes(item.content)
            total += size
            if size > MAX_CONTENT:
                yield Detail(f"inputs[{index}].content", f"must not be larger than {MAX_CONTENT} bytes, but has {size}")
            if item.type is TesFileType.DIRECTORY:
                yield Detail(f"inputs[{index}].content", "cannot be given for a DIRECTORY")
        if item.url and len(item.url) > MAX_URL:
            yield Detail(f"inputs[{index}].url", f"must not be longer than {MAX_URL} characters")
    if total > MAX_CONTENTS:
        yield Detail("inputs", f"must not have more than {MAX_CONTENTS} bytes of content together, but have {total}")


def _outputs(outputs: Sequence[TesOutput]) -> Iterator[Detail]:
    yield from _count("outputs", outputs, MAX_OUTPUTS)
    for index, item in enumerate(outputs):
        if wrong := _path(item.path):
            yield Detail(f"outputs[{index}].path", wrong)
        elif not WILDCARDS.isdisjoint(item.path) and (wrong := _prefix(item.path, item.path_prefix)):
            yield Detail(f"outputs[{index}].path_prefix", wrong)
        if not item.url:
            yield Detail(f"outputs[{index}].url", "must not be empty")
        elif len(item.url) > MAX_URL:
            yield Detail(f"outputs[{index}].url", f"must not be longer than {MAX_URL} characters")


def _executor(field: str, executor: TesExecutor) -> Iterator[Detail]:
    if wrong := _image(executor.image):
        yield Detail(f"{field}.image", wrong)
    if not executor.command:
        yield Detail(f"{field}.command", "must have at least one word, the program to run")
    yield from _count(f"{field}.command", executor.command, MAX_ARGUMENTS)
    if executor.workdir and (wrong := _path(executor.workdir, root=True)):
        yield Detail(f"{field}.workdir", wrong)
    for name in ("stdin", "stdout", "stderr"):
        path = getattr(executor, name)
        if path and (wrong := _path(path)):
            yield Detail(f"{field}.{name}", wrong)
    yield from _pairs(f"{field}.env", executor.env)
    for key in executor.env or ():
        if not key or "=" in key:
            yield Detail(f"{field}.env", f"must have names that are not empty and have no '=', but has {_short(key)}")


def _path(path: str, *, root: bool = False) -> str:
    """What is wrong with a container path, or an empty string; `root` allows `/` itself."""
    if not path.startswith("/"):
        return f"must be an absolute path, but is {_short(path)}" if path else "must not be empty"
    if len(path) > MAX_PATH:
        return f"must not be longer than {MAX_PATH} characters"
    if "/.." in path and ".." in path.split("/"):
        return f"must not contain '..', but is {_short(path)}"
    if not root and not path.strip("/."):
        return "must not be the root directory" if _plain(path) == "/" else ""
    return ""


def _prefix(path: str, prefix: str | None) -> str:
    """What is wrong with the prefix for a pattern, or an empty string."""
    if not prefix:
        return f"is required, because the path {_short(path)} is a pattern (it has '*', '?' or '[')"
    if not prefix.startswith("/"):
        return f"must be an absolute path, but is {_short(prefix)}"
    if not WILDCARDS.isdisjoint(prefix):
        return f"must not contain '*', '?' or '[', but is {_short(prefix)}"
    if not path.startswith(prefix):
        return f"must be the beginning of the path {_short(path)}, but is {_short(prefix)}"
    return ""


def _image(image: str) -> str:
    if not image:
        return "must not be empty"
    if len(image) > MAX_IMAGE:
        return f"must not be longer than {MAX_IMAGE} characters"
    if image.startswith("-"):
        return f"must not start with '-', but is {_short(image)}"
    if not image.isprintable() or " " in image:
        return f"must not contain spaces or control characters, but is {_short(image)}"
    if odd := sorted(set(image) & NO_IMAGE):
        return f"must not contain {' '.join(odd)}, but is {_short(image)}"
    return ""


def _count(field: str, items: Collection[object] | None, limit: int) -> Iterator[Detail]:
    if items and len(items) > limit:
        yield Detail(field, f"must not have more than {limit} items, but has {len(items)}")


def _pairs(field: str, pairs: Mapping[str, str] | None) -> Iterator[Detail]:
    return _count(field, pairs, MAX_PAIRS)


def _oversize(task: TesTask, size: int) -> list[Detail]:
    rest = size - sum(_bytes(item.content) for item in task.inputs or () if item.content)
    if rest <= MAX_DOCUMENT:
        return []
    return [Detail("the task", f"must not be larger than {MAX_DOCUMENT} bytes without its contents, but has {rest}")]


def _plain(path: str) -> str:
    """A path with one spelling: no empty and `.` components, no slash at the end."""
    if "//" not in path and "/./" not in path and not path.endswith(("/", "/.")):
        return path
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _nul_fields(value: Any, field: str = "") -> Iterator[str]:
    """The fields whose text has a NUL."""
    if isinstance(value, str):
        if "\0" in value:
            yield field
    elif isinstance(value, dict):
        for key, item in value.items():
            if "\0" in key:
                yield field
            yield from _nul_fields(item, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nul_fields(item, f"{field}[{index}]")


# --- errors of form, in our words ----------------------------------------------------------------------------------

_WORDS: Final = {
    "missing": "is required",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode text",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}
_KINDS: Final = {
    str: "a string",
    dict: "an object",
    list: "a list",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def detail_of(error: ErrorDetails) -> Detail:
    """One of pydantic's errors in our words."""
    context = error.get("ctx", {})
    match error["type"]:
        case "enum":
            message = f"must be one of {context['expected']}".replace("'", "").replace(" or ", ", ")
        case "greater_than_equal":
            message = f"must be {context['ge']:g} or more"
        case "less_than_equal":
            message = f"must be {context['le']} or less"
        case kind if kind in _WORDS:
            message = _WORDS[kind]
            if error["input"] is None:
                message += ", not null"
            elif kind.endswith("_type") and (given := _KINDS.get(type(error["input"]))):
                message += f", not {given}"
        case _:
            message = f"is wrong: {error['msg']}"
    return Detail(field_name(error["loc"]), message)


def field_name(location: Iterable[str | int]) -> str:
    """A pydantic location as `executors[0].image`."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or "the body"


# --- backend parameters --------------------------------------------------------------------------------------------


def drop_unsupported(spec: TesTask, supported: Collection[str]) -> tuple[TesTask, list[str]]:
    """The task without the backend parameters that are not among `supported`, and a line for each one dropped.

    Case does not matter in keys. A task with `backend_parameters_strict` raises InvalidRequest instead.
    """
    resources = spec.resources
    if resources is None or not resources.backend_parameters:
        return spec, []
    known = {key.lower() for key in supported}
    kept = {key: value for key, value in resources.backend_parameters.items() if key.lower() in known}
    dropped = [key for key in resources.backend_parameters if key not in kept]
    if not dropped:
        return spec, []
    names = ", ".join(sorted(supported)) or "none"
    if resources.backend_parameters_strict:
        raise refusal(
            [
                Detail(f"resources.backend_parameters.{key}", f"is not supported by this service (supported: {names})")
                for key in dropped
            ]
        )
    resources = resources.model_copy(update={"backend_parameters": kept or None})
    lines = [f"Backend parameter {_short(key)} is not supported by this service and was dropped." for key in dropped]
    return spec.model_copy(update={"resources": resources}), lines
