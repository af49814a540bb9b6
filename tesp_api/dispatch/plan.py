"""From a task to the node's job document. Pure: the same task and site facts always give the same plan.

The heart is the choice of mounts, which golden files pin for each shape that real clients send. What must be a
directory of its own: volumes, DIRECTORY inputs and outputs, the parents of FILE outputs, of stdio files and of
patterns, and `/tmp` as soon as anything lies below it. Of nested ones only the outermost is mounted. A directory that
belongs to the image (`/`, `/etc`, `/usr`, ...) is never covered: then the single file is mounted. FILE inputs inside a
mounted directory are plain files there, others are mounted one by one. A `workdir` alone makes no mount.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from tesp_api.errors import PlanError
from tesp_api.parameters import read_wishes
from tesp_api.runner import job
from tesp_api.sites import SiteFacts
from tesp_api.task import Attempt, Task
from tesp_api.tes import WILDCARDS, TesFileType, TesInput, TesOutput, TesTask

IMAGE_TREES = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/sys", "/usr")
"""Whatever lies in these belongs to the image."""

IMAGE_DIRECTORIES = frozenset(
    {
        *("/", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/var"),
        *("/var/cache", "/var/lib", "/var/log", "/var/run", "/var/spool", "/var/tmp"),  # noqa: S108 - in containers
    }
)
"""These belong to the image, but directories inside may be the task's."""

TMP = "/tmp"  # noqa: S108 - a name in containers
GIB = 1 << 30


def plan(task: Task, facts: SiteFacts) -> job.Plan:
    """The plan of the task's current attempt; `task.bodies` must hold the input contents.

    PlanError names the field that the site cannot fulfil.
    """
    attempt = task.attempt
    if attempt is None:
        raise ValueError(f"task {task.id} has no attempt to plan")
    spec = task.spec
    contents = task.bodies.contents if task.bodies else {}
    _check_file_urls(spec, contents, facts)
    live = _live_inputs(spec, contents, facts)
    directories = _directories(spec, live)
    resources = spec.resources
    wishes = read_wishes(resources)
    return job.Plan(
        job_id=attempt.job_id,
        task_id=task.id,
        executors=[
            job.Executor(
                image=each.image,
                command=list(each.command),
                workdir=each.workdir,
                stdin=_clean(each.stdin),
                stdout=_clean(each.stdout),
                stderr=_clean(each.stderr),
                env=dict(each.env or {}),
                ignore_error=bool(each.ignore_error),
            )
            for each in spec.executors
        ],
        inputs=[_input(item, contents.get(index)) for index, item in enumerate(spec.inputs or ()) if index not in live],
        outputs=[
            job.Output(
                path=_path(each.path),
                url=each.url,
                kind=each.type,
                prefix=_path(each.path_prefix) if _is_pattern(each.path) and each.path_prefix else None,
            )
            for each in spec.outputs or ()
        ],
        mounts=_mounts(spec, directories, live),
        cpus=float(resources.cpu_cores) if resources and resources.cpu_cores else None,
        # GB is read as 2^30: clients differ, and a limit must not be tighter than what was asked for.
        ram_bytes=int(resources.ram_gb * GIB) if resources and resources.ram_gb else None,
        runtime=facts.runtime,
        file_roots=list(facts.file_roots),
        log_bytes=facts.log_bytes,
        directories=_inner_directories(spec, directories, live),
        time_limit=wishes.time_limit if facts.batch else None,
        queue=wishes.queue if facts.batch else None,
    )


def _path(path: str) -> str:
    """An absolute container path in its plain form: no doubled or trailing slashes."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _clean(path: str | None) -> str | None:
    return None if path is None else _path(path)


def _is_pattern(path: str) -> bool:
    return any(sign in WILDCARDS for sign in path)


def _is_below(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or lies in it."""
    return path == directory or directory == "/" or path.startswith(directory + "/")


def _belongs_to_image(directory: str) -> bool:
    return directory in IMAGE_DIRECTORIES or any(_is_below(directory, tree) for tree in IMAGE_TREES)


# Files of the node


def file_path(url: str) -> str | None:
    """The node's path that a `file:` URL or bare absolute path names; None for other URLs."""
    if url.startswith("/"):
        return _path(url)
    if url[:5].lower() != "file:":
        return None
    path = url[5:]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host.lower() not in ("", "localhost", "127.0.0.1"):
            return None  # the runner refuses it
        path = slash + rest
    return _path(unquote(path, errors="surrogateescape")) if path else None


def _check_file_urls(spec: TesTask, contents: Mapping[int, str], facts: SiteFacts) -> None:
    """A first look, for a clear message; the runner checks again on the node, links included."""
    named = [
        (f"inputs[{at}].url", each.url, False) for at, each in enumerate(spec.inputs or ()) if not contents.get(at)
    ]
    named += [(f"outputs[{at}].url", each.url, True) for at, each in enumerate(spec.outputs or ())]
    for field, url, write in named:
        path = file_path(url) if url else None
        if path is None or _root_of(path, facts.file_roots, write=write) is not None:
            continue
        roots = ", ".join(root.path for root in facts.file_roots if root.write or not write)
        allowed = f"only below {roots}" if roots else "none, as no file_roots are set"
        raise PlanError(f"{field}: {url} is not open to tasks; the site {facts.name!r} allows files {allowed}.")


def _root_of(path: str, roots: Sequence[job.FileRoot], *, write: bool) -> job.FileRoot | None:
    for root in roots:
        if _is_below(path, _path(root.path)) and (root.write or not write):
            return root
    return None


def _live_inputs(spec: TesTask, contents: Mapping[int, str], facts: SiteFacts) -> dict[int, job.Mount]:
    """Inputs that are not copied but mounted, because their root says so: input index -> mount."""
    live = {}
    for index, item in enumerate(spec.inputs or ()):
        path = file_path(item.url) if item.url and not contents.get(index) else None
        root = _root_of(path, facts.file_roots, write=False) if path else None
        if path and root and root.mount:
            live[index] = job.Mount(target=_path(item.path), at=path, kind=item.type, read_only=not root.write)
    return live


# Mounts


def _directories(spec: TesTask, live: dict[int, job.Mount]) -> list[str]:
    """The container directories to mount, outermost only, sorted."""
    wanted = _empty_at_start(spec)
    for index, item in enumerate(spec.inputs or ()):
        if item.type is TesFileType.DIRECTORY and index not in live:
            wanted.add(_whole(_path(item.path), f"inputs[{index}].path"))
    for index, each in enumerate(spec.outputs or ()):
        if each.type is TesFileType.DIRECTORY and not _is_pattern(each.path):
            wanted.add(_whole(_path(each.path), f"outputs[{index}].path"))
    everything = [*wanted, *(_path(item.path) for item in spec.inputs or ()), *_single_files(spec)]
    if any(_is_below(path, TMP) for path in everything):
        wanted.add(TMP)
    wanted = {path for path in wanted if not _is_live(path, live)}
    return sorted(path for path in wanted if not any(path != other and _is_below(path, other) for other in wanted))


def _empty_at_start(spec: TesTask) -> set[str]:
    """Directories that a program may count on: volumes, and where its files, stdio and patterns belong.

    Not DIRECTORY outputs: many a program insists on making its result directory itself.
    """
    wanted = {_whole(_path(volume), f"volumes[{index}]") for index, volume in enumerate(spec.volumes or ())}
    for index, each in enumerate(spec.outputs or ()):
        if _is_pattern(each.path):
            wanted.add(_whole(_literal_parent(_path(each.path)), f"outputs[{index}].path"))
    parents = {posixpath.dirname(path) for path in _single_files(spec)}
    return wanted | {parent for parent in parents if not _belongs_to_image(parent)}


def _inner_directories(spec: TesTask, mounted: Sequence[str], live: dict[int, job.Mount]) -> list[str]:
    """Those of the directories to be there at the start that are not mounts themselves, but lie in one."""
    return sorted(path for path in _empty_at_start(spec) if path not in mounted and not _is_live(path, live))


def _is_live(path: str, live: dict[int, job.Mount]) -> bool:
    """Whether a path lies in a directory that is mounted live; what it needs is there already."""
    return any(mount.kind == job.DIRECTORY and _is_below(path, mount.target) for mount in live.values())


def _whole(directory: str, field: str) -> str:
    """A directory that the task names itself. It may cover the image's, but not what every program needs."""
    if directory == "/" or any(_is_below(directory, tree) for tree in IMAGE_TREES):
        raise PlanError(f"{field}: {directory} belongs to the image and cannot be a directory of the task.")
    return directory


def _literal_parent(pattern: str) -> str:
    """The directory of the first component with a wildcard."""
    parts = pattern.split("/")
    at = next(index for index, part in enumerate(parts) if _is_pattern(part))
    return "/".join(parts[:at]) or "/"


def _single_files(spec: TesTask) -> list[str]:
    """FILE outputs and stdio files, in the order of the task; a stdin that is an input is left to the inputs."""
    files = [
        _path(each.path)
        for each in spec.outputs or ()
        if each.type is not TesFileType.DIRECTORY and not _is_pattern(each.path)
    ]
    given = {_path(item.path) for item in spec.inputs or ()}
    for executor in spec.executors:
        if executor.stdin and _path(executor.stdin) not in given:
            files.append(_path(executor.stdin))
        files += [_path(path) for path in (executor.stdout, executor.stderr) if path]
    return list(dict.fromkeys(files))


def _mounts(spec: TesTask, directories: list[str], live: dict[int, job.Mount]) -> list[job.Mount]:
    mounts = [job.Mount(target=path, at=f"directories/{at}") for at, path in enumerate(directories)]
    files = [
        _path(item.path)
        for index, item in enumerate(spec.inputs or ())
        if item.type is not TesFileType.DIRECTORY and index not in live
    ]
    live_targets = {mount.target for mount in live.values()}
    single = [
        path
        for path in dict.fromkeys([*files, *_single_files(spec)])
        if not any(_is_below(path, directory) for directory in (*directories, *live_targets))
    ]
    _check_overlaps(spec, directories, live)
    mounts += [job.Mount(target=path, at=f"files/{at}", kind=job.FILE) for at, path in enumerate(single)]
    mounts += list(live.values())
    return sorted(mounts, key=lambda mount: mount.target.count("/") if mount.target != "/" else 0)


def _check_overlaps(spec: TesTask, directories: Sequence[str], live: dict[int, job.Mount]) -> None:
    """A path cannot be a file and a directory."""
    files = {path: f"executors: {path}" for path in _single_files(spec)}
    folders = dict.fromkeys(directories, "")
    folders.update((_path(volume), "") for volume in spec.volumes or ())
    for index, item in enumerate(spec.outputs or ()):
        if not _is_pattern(item.path):
            _note_kind(item, f"outputs[{index}].path", files, folders)
    for index, given in enumerate(spec.inputs or ()):
        _note_kind(given, f"inputs[{index}].path", files, folders)
        if index not in live and _is_live(_path(given.path), live):
            raise PlanError(f"inputs[{index}].path: {given.path} lies in an input that is mounted live, not copied.")
    for path in [*files, *folders]:
        parent = path if path in folders else posixpath.dirname(path)
        while parent != "/":
            if parent in files:
                because = folders.get(parent, f", because of {path}")
                raise PlanError(f"{files[parent]} would have to be both a file and a directory{because}.")
            parent = posixpath.dirname(parent)


def _note_kind(item: TesInput | TesOutput, field: str, files: dict[str, str], folders: dict[str, str]) -> None:
    path = _path(item.path)
    if item.type is TesFileType.DIRECTORY:
        folders[path] = f", because of {field}"
    else:
        files[path] = f"{field}: {path}"


def _input(item: TesInput, content: str | None) -> job.Input:
    path = _path(item.path)
    if content or not item.url:
        return job.Input(path=path, kind=job.FILE, content=content or "")
    return job.Input(path=path, kind=item.type, url=item.url)


__all__ = ["Attempt", "file_path", "plan"]
