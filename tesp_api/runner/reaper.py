"""A second process that cleans up when the runner is killed outright.

Pulsar's cancel is a SIGKILL of the whole process tree; the containers would go on. The reaper has left that tree
(forked twice, a session of its own) and waits at the end of a pipe: closed without a goodbye, the runner is dead.

What the runner says through the pipe, one JSON line each: `{"group": 123}` a process group to kill,
`{"executor": {...}}` the result of one that ended, `{"sweep": true}` a container that the engine could not be asked to
remove will be left, `{"bye": true}` nothing else is left to do.
"""

import json
import os
from typing import Any, Dict, List

from . import job
from .clock import now
from .jobdir import JobDirectory

_LOOKS = (0.0, 0.1, 0.3)  # a container may still come into being from the dead runner's last request
_LATE_LOOKS = (1.0, 3.0)
_KILLED = "The runner was killed (by someone, the batch system, for lack of memory) or could not store its result."
_PATIENCE = 60.0  # seconds for an engine that does not answer
_LATE_PATIENCE = 3600.0  # the same, when nobody waits for it any more


class Reaper:
    """The runner's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def start(cls, directory: JobDirectory, plan: job.Plan) -> "Reaper":
        """Fork it. To be called before any thread exists."""
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            _become_reaper(directory, plan, read_end)
        os.close(read_end)
        os.waitpid(child, 0)
        return cls(write_end)

    def tell(self, message: Dict[str, Any]) -> None:
        """Let the reaper know; if it is gone, so be it."""
        data = json.dumps(message).encode("ascii") + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            pass


def _become_reaper(directory: JobDirectory, plan: job.Plan, read_end: int) -> None:
    """Never returns."""
    try:
        start_time = now()
        os.setsid()
        if os.fork():
            os._exit(0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for fd in (1, 2):
            os.dup2(0, fd)
        keep = os.dup2(read_end, 3) if read_end != 3 else 3
        os.closerange(4, 1024)  # Pulsar waits until every holder of its pipes is gone
        os.chdir("/")
        _wait(directory, plan, keep, start_time)
    except BaseException:  # noqa: S110 - nobody could be told
        pass
    finally:
        os._exit(0)


def _wait(directory: JobDirectory, plan: job.Plan, fd: int, start_time: str) -> None:
    import signal

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # meant for the runner, whose pipe tells us the end
        signal.signal(number, signal.SIG_IGN)
    groups: List[int] = []
    executors: List[job.ExecutorResult] = []
    late = False
    with os.fdopen(fd, "rb") as stream:
        for line in stream:
            try:
                message = json.loads(line.decode("ascii"))
            except ValueError:
                continue  # cut off by the kill
            if "bye" in message:
                if late:
                    _sweep_late(plan)
                return
            if "sweep" in message:
                late = True
            if "group" in message:
                groups.append(message["group"])
            if "executor" in message:
                executors.append(job.ExecutorResult(**message["executor"]))
    _clean_up(directory, plan, groups, executors, start_time)


def _sweep_late(plan: job.Plan) -> None:
    """The engine is down: remove what it still holds when it comes back."""
    from .engines import sweep

    sweep(plan, _LATE_PATIENCE)


def _clean_up(
    directory: JobDirectory, plan: job.Plan, groups: List[int], executors: List[job.ExecutorResult], start_time: str
) -> None:
    import time

    from .engines import kill_groups, sweep

    kill_groups(plan.job_id, groups)
    lines: List[str] = []
    daemon = plan.runtime.kind in ("auto", "docker")  # without one, nothing can come into being any more
    for pause in _LOOKS if daemon else _LOOKS[:1]:
        time.sleep(pause)
        problem = sweep(plan, _PATIENCE)
        kill_groups(plan.job_id, groups)
        if problem:
            lines.append("The containers of the killed runner could not be removed: %s" % problem)
            break
    directory.release_reserve()
    deadline = time.monotonic() + _PATIENCE
    while os.path.isdir(directory.root) and not directory.has_result():
        try:
            _write(directory, plan, executors, list(lines), start_time)
        except OSError:  # a full disk
            if time.monotonic() > deadline:
                break
            time.sleep(1)
    for pause in _LATE_LOOKS if daemon else ():
        time.sleep(pause)
        sweep(plan, _LATE_PATIENCE if lines else 0)


def _write(
    directory: JobDirectory, plan: job.Plan, executors: List[job.ExecutorResult], lines: List[str], start_time: str
) -> None:
    wished = directory.cancel_asked()
    canceled = wished and not lines  # CANCELED promises that the containers are gone
    if not canceled:
        lines.insert(0, _KILLED)
    progress = directory.read_progress() or job.Progress(plan.job_id)
    directory.write_result(
        job.Result(
            job_id=plan.job_id,
            state="CANCELED" if canceled else "SYSTEM_ERROR",
            start_time=start_time,
            end_time=now(),
            started=progress.started is not None or bool(executors),
            executors=executors,
            system_logs=lines,
            infrastructure=not wished and not job.has_failed(plan, executors),
        ),
        plan.result_bytes,
    )
    directory.write_progress(progress._replace(phase="done", beat=progress.beat + 1))
