"""Bubblewrap: a sandbox from the node's own programs, without a daemon and without images.

The sandbox's root is an empty tmpfs. The node's top directories appear in it read-only, mounts at their TES places; a
target inside a read-only directory of the node needs a mount point there, so that directory is rebuilt: made anew, with
the node's entries bound one by one. `/tmp`, `/dev`, `/proc`, `/run` are fresh; what the plan hides and the directory of
all jobs are empty. `/run` is not shown because a socket in it (Docker's!) works even through a read-only mount.
"""

import json
import os
from typing import Any, Dict, Iterable, List, NamedTuple, Set

from ..errors import EngineError, Problem
from ..mounts import Bound
from ..tree import decode, encode, reason
from . import Engine, Run, mark

_FRESH = ("/proc", "/dev", "/tmp", "/run")  # noqa: S108
_SETUP_FAILED = "bwrap: "


class Node:
    """What the arguments depend on of the node's file system; tests give another."""

    def names(self, path: str) -> List[str]:
        """The names in a directory, or none."""
        try:
            return sorted(decode(os.fsencode(name)) for name in os.listdir(encode(path)))
        except OSError:
            return []

    def link(self, path: str) -> str:
        """What a symbolic link says, or nothing."""
        try:
            return decode(os.readlink(encode(path)))
        except OSError:
            return ""

    def real(self, path: str) -> str:
        """The path without links."""
        return decode(os.path.realpath(encode(path)))

    def exists(self, path: str) -> bool:
        """Whether there is anything."""
        return os.path.exists(encode(path))

    def directory(self, path: str) -> bool:
        """Whether it is a directory."""
        return os.path.isdir(encode(path))


class _Goal(NamedTuple):
    place: str
    options: List[str]


class Bubblewrap(Engine):
    """See Engine. The image is ignored."""

    kind = "bubblewrap"

    def check(self) -> str:
        """See Engine."""
        import subprocess

        try:
            done = subprocess.run(["bwrap", "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise EngineError("bwrap cannot be run (%s): install bubblewrap on the node." % reason(error))
        self.setting.note("The executors ran in bubblewrap: images are ignored and no limits are enforced.")
        return done.stdout.decode("ascii", "replace").replace("bubblewrap", "").strip()

    def run(self, run: Run) -> int:
        """See Engine."""
        from .process import execute

        hide = [*self.setting.plan.runtime.hide, os.path.dirname(self.setting.root)]
        env = dict(mark(self.setting.plan.job_id), **run.executor.env)
        options = arguments(self.setting.bounds, hide, run.executor.workdir or "", env, Node())
        report, status = os.pipe()
        options_fd = _in_memory(b"".join(encode(option) + b"\0" for option in options))
        try:
            argv = [b"bwrap", b"--args", b"%d" % options_fd, b"--json-status-fd", b"%d" % status, b"--"]
            argv.extend(encode(word) for word in run.executor.command)
            # bwrap itself gets none of the executor's variables: LD_PRELOAD among them would be a way out.
            code = execute(self.setting, run, argv, _bare(), None, (options_fd, status))
            os.close(status)
            status = -1
            return self._judged(run, code, report)
        finally:
            for fd in (report, status, options_fd):
                if fd >= 0:
                    os.close(fd)

    def _judged(self, run: Run, code: int, report: int) -> int:
        """Tell the program's exit codes from bwrap's own: bwrap reports the former."""
        if _exit_code(report) is not None or code != 1:
            return code
        said = run.stderr.text()[-500:].strip().split("\n")[-1]
        if said.startswith("bwrap: execvp"):
            return 127 if "No such file" in said else 126
        if said.startswith(_SETUP_FAILED):
            raise EngineError("executors[%d]: bubblewrap cannot build the sandbox: %s" % (run.number, said))
        return code


def arguments(bounds: List[Bound], hide: Iterable[str], workdir: str, env: Dict[str, str], node: Node) -> List[str]:
    """bwrap's options, but for the command."""
    goals = [
        _Goal(_settled(bound.target, node), ["--ro-bind" if bound.read_only else "--bind", bound.real])
        for bound in bounds
    ]
    empty = {node.real(path) for path in [*hide, "/var/run", "/var/tmp"]}  # noqa: S108
    masks = [_Goal(place, ["--tmpfs"]) for place in sorted(empty) if _masked(place, node)]
    place = _settled(workdir, node) if workdir else ""
    made: List[_Goal] = []
    if place and not _covered(place, goals) and not node.directory(place):
        made.append(_Goal(place, ["--dir"]))
    options = ["--unshare-all", "--share-net", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    options += _picture("/", {goal.place for goal in goals + made}, node)
    options += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp", "--tmpfs", "/run"]  # noqa: S108
    options += _resolver(node)
    for goal in masks + made + sorted(goals, key=lambda goal: (goal.place.count("/"), goal.place)):
        options += [*goal.options, goal.place]
    defaults = {"PATH": os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"), "HOME": "/tmp"}  # noqa: S108
    for name, value in sorted(dict(defaults, **env).items()):
        options += ["--setenv", name, value]
    return [*options, "--chdir", place or "/"]


def _picture(folder: str, goals: Set[str], node: Node) -> List[str]:
    """Show a directory of the node: its entries whole, but those rebuilt that a goal needs a new place in."""
    options: List[str] = []
    for name in node.names(folder):
        path = folder.rstrip("/") + "/" + name
        if path in _FRESH or path in goals:
            continue
        link = node.link(path)
        below = {goal for goal in goals if goal.startswith(path + "/")}
        if link:
            options += ["--symlink", link, path]
        elif node.directory(path) and (any(not node.exists(goal) for goal in below)):
            options += ["--dir", path, *_picture(path, below, node)]
        else:
            options += ["--ro-bind-try", path, path]
    return options


def _settled(path: str, node: Node) -> str:
    """The path with the node's links followed as far as it exists there: a link cannot be mounted over."""
    steps = [step for step in path.split("/") if step]
    if not steps:
        raise Problem("bubblewrap cannot mount over /")
    if "/" + steps[0] in _FRESH:
        return "/" + "/".join(steps)
    for length in range(len(steps), 0, -1):
        begin = "/" + "/".join(steps[:length])
        if node.exists(begin):
            return "/".join([node.real(begin), *steps[length:]])
    return "/" + "/".join(steps)


def _covered(place: str, goals: List[_Goal]) -> bool:
    return any(place == goal.place or place.startswith(goal.place + "/") for goal in goals)


def _masked(place: str, node: Node) -> bool:
    """Whether a place to hide would be seen at all."""
    hidden = any(place == fresh or place.startswith(fresh + "/") for fresh in _FRESH)
    return place != "/" and not hidden and node.directory(place)


def _resolver(node: Node) -> List[str]:
    """The name server's file, when it lies in /run as with systemd."""
    place = node.real("/etc/resolv.conf")
    return ["--ro-bind", place, place] if place.startswith("/run/") and node.exists(place) else []


def _bare() -> Dict[bytes, bytes]:
    return {b"PATH": os.fsencode(os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"))}


def _in_memory(data: bytes) -> int:
    """A descriptor to read the data from, seen by nobody else: environments hold secrets."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("options")
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        return int(fd)
    import tempfile

    with tempfile.TemporaryFile() as stream:
        stream.write(data)
        stream.seek(0)
        return os.dup(stream.fileno())


def _exit_code(report: int) -> Any:
    """The exit code in bwrap's status report, None when the program was never begun."""
    os.set_blocking(report, False)
    try:
        text = os.read(report, 65536).decode("utf-8", "replace")
    except BlockingIOError:
        return None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "exit-code" in entry:
            return entry["exit-code"]
    return None
