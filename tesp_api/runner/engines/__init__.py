"""What runs the containers: one file per engine, all behind `Engine`."""

import os
import stat
from typing import Callable, Dict, List, NamedTuple, Optional

from .. import job
from ..errors import EngineError
from ..logs import Stream
from ..mounts import Bound
from ..watch import Watch

_MARK = "TESP_JOB"


class Setting(NamedTuple):
    """What every engine knows of the job. `note` adds a line to the system logs; `tell` speaks to the reaper."""

    plan: job.Plan
    bounds: List[Bound]
    root: str
    watch: Watch
    note: Callable[[str], None]
    tell: Callable[[Dict[str, object]], None]


class Run(NamedTuple):
    """One executor to run: `stdin` a descriptor or None for an empty one; `begin` is called right before the start."""

    number: int
    executor: job.Executor
    stdin: Optional[int]
    stdout: Stream
    stderr: Stream
    begin: Callable[[], None]


class Engine:
    """One way to run containers. Every method raises EngineError with one sentence when the engine is at fault."""

    kind = ""
    node_names = False  # whether the node's own paths are what the executors see

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def check(self) -> str:
        """The engine's version; EngineError says what to install or set when there is none."""
        raise NotImplementedError

    def run(self, run: Run) -> int:
        """Carry out one executor, its image fetched if it is missing: the exact exit code (128 + N for signal N).

        CommandError if its command cannot be executed. After the wish to stop, Stopped, with nothing left running
        and the code with which the executor ended, if it had begun.
        """
        raise NotImplementedError

    def adopt(self) -> None:
        """Make all that containers left behind ours to read, and to delete later: here, what has the modes against it.

        Nothing of the job runs any more, so what was looked at stays what it is.
        """
        if os.geteuid() != 0:
            for bound in self.setting.bounds:
                if not bound.live:
                    _open_up(bound.real)

    def close(self) -> None:
        """Wait until nothing of the job is left in the engine."""


def open_engine(setting: Setting) -> Engine:
    """The engine that the plan asks for."""
    kind = setting.plan.runtime.kind
    if kind in ("auto", "docker"):
        from .docker import Docker

        return Docker(setting)
    if kind == "bubblewrap":
        from .bubblewrap import Bubblewrap

        return Bubblewrap(setting)
    if kind == "host":
        from .host import Host

        return Host(setting)
    raise EngineError("runtime.kind: %r is none of auto, docker, bubblewrap, host." % kind)


def sweep(plan: job.Plan, patience: float) -> str:
    """Remove every container of a job; what went wrong, or nothing."""
    if plan.runtime.kind not in ("auto", "docker"):
        return ""
    from .docker import sweep as sweep_docker

    return sweep_docker(plan.runtime.docker_host, plan.job_id, patience)


def _open_up(path: str) -> None:
    """Let the owner read all files, and read and change all directories, below the path. Links are not followed."""
    todo = [os.fsencode(path)]
    while todo:
        at = todo.pop()
        try:
            mode = os.lstat(at).st_mode
            wanted = 0o700 if stat.S_ISDIR(mode) else 0o400 if stat.S_ISREG(mode) else 0
            if mode & wanted != wanted:
                os.chmod(at, stat.S_IMODE(mode) | wanted)
            if stat.S_ISDIR(mode):
                todo.extend(os.path.join(at, name) for name in os.listdir(at))
        except OSError:
            pass  # another user's, or a path too long; whoever needs it will say so


def kill_groups(job_id: str, groups: List[int]) -> None:
    """Kill the process groups, and every process that carries the job's mark, wherever it went."""
    import signal

    for pid in groups + marked(job_id):
        try:
            if pid in groups:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


def mark(job_id: str) -> Dict[str, str]:
    """The environment by which `marked` knows the processes of a job."""
    return {_MARK: job_id}


def marked(job_id: str) -> List[int]:
    """The processes of a job that run directly on the node."""
    wanted = ("%s=%s" % (_MARK, job_id)).encode("utf-8")
    found: List[int] = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not name.isdigit():
            continue
        try:
            with open("/proc/%s/environ" % name, "rb") as stream:
                if wanted in stream.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            pass
    return found
