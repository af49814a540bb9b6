"""This machine as a site: the runner as a child process, in the same job directories as at a Pulsar.

A job outlives the service. Whether it is alive is told by a lock (flock) on JOB/alive that its process inherits: the
kernel releases it when the last process that holds it is gone, whoever started it, and no process id can deceive.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tesp_api import __version__
from tesp_api.errors import SiteRefused, SiteUnavailable
from tesp_api.runner import job
from tesp_api.runner.bundle import FILE_NAME, Bundle, command, pseudo_job
from tesp_api.runner.messenger import open_up
from tesp_api.sites import SiteFacts, documents
from tesp_api.sites.processes import PASSED_ON, Process, replace
from tesp_api.sites.pulsar.messages import JOB_ID
from tesp_api.sites.watch import JobFiles, Watch
from tesp_api.task import Observation, Phase

log = logging.getLogger(__name__)

DIRECTORIES: Final = ("inputs", "metadata", "working", "outputs")

GONE_WITHIN: Final = 2.0
"""Seconds that a killed job has to clean up before its directory is taken away."""

NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
"""What a removal must wait for; any other error is there again the next time."""


class LocalSite:
    """Runs jobs below `directory` with the interpreter `python`."""

    def __init__(self, facts: SiteFacts, directory: Path, runner: Bundle, python: str = sys.executable) -> None:
        self.facts = facts
        self._directory = Path(directory).absolute()
        self._runner = runner
        self._argv = [python, *shlex.split(command(runner.sha256))[1:]]
        self._exits: dict[str, subprocess.Popen[bytes]] = {}
        self._reapers: dict[str, threading.Thread] = {}
        self._files = JobFiles(self._directory)
        self._watch = Watch(self._files)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._deliver)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close: the jobs live on."""

    def _deliver(self) -> None:
        folder = self._directory / pseudo_job(self._runner.sha256) / "inputs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = folder / FILE_NAME
        if not there.exists() or there.read_bytes() != self._runner.data:
            replace(there, self._runner.data)

    # Submit

    async def submit(self, plan: job.Plan) -> None:
        """See Site."""
        try:
            await asyncio.to_thread(self._submit, plan)
        except OSError as error:
            raise SiteUnavailable(f"The job could not be started: {error}") from error
        self._watch.add(plan.job_id)

    def _submit(self, plan: job.Plan) -> None:
        root = self._root(plan.job_id)
        for name in DIRECTORIES:
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        alive = _take(root / "alive", patience=1.0)
        if alive is None:
            if (root / "launched").exists():
                return  # it runs
            raise SiteUnavailable("The same job is being started by somebody else.")
        try:
            if (root / "launched").exists() or self._has_begun(plan.job_id):
                return  # it ran
            self._deliver()
            replace(root / "inputs" / "job.json", documents.dump(plan))
            replace(root / "metadata" / "progress.json", documents.dump(job.Progress(job_id=plan.job_id)))
            self._start(plan.job_id, alive)
        finally:
            os.close(alive)

    def _has_begun(self, job_id: str) -> bool:
        """Whether a runner ran although nobody noted its launch: the service died between the two."""
        progress = self._files.progress(job_id)
        return self._files.result(job_id) is not None or (progress is not None and documents.begun(progress))

    def _start(self, job_id: str, alive: int) -> None:
        root = self._root(job_id)
        with (root / "stdout").open("wb") as stdout, (root / "stderr").open("wb") as stderr:
            child = subprocess.Popen(
                self._argv,
                cwd=root / "working",
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=(alive,),
                start_new_session=True,
            )
        self._exits[job_id] = child
        reaper = threading.Thread(target=self._reap, args=(job_id, child), name=f"reap {job_id}", daemon=True)
        self._reapers[job_id] = reaper
        try:
            process = Process.of(child.pid) or Process(child.pid, 0)
            process.note(root / "launched")
        finally:
            reaper.start()  # not before: until a process is reaped, no other gets its id

    def _reap(self, job_id: str, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        with suppress(OSError):  # forgotten meanwhile
            replace(self._root(job_id) / "return_code", str(code).encode("ascii"))

    # Observe

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        """See Site. A job that cannot be looked at now is RUNNING without a sign of life."""
        observations = await asyncio.to_thread(lambda: [self._try_to_look(each) for each in job_ids])
        for seen in observations:
            if seen.phase is Phase.RUNNING:
                self._watch.add(seen.job_id)
            else:
                self._watch.drop(seen.job_id)
        return observations

    def freshen(self, job_ids: Sequence[str]) -> None:
        """See Site. It always is."""

    async def updates(self) -> AsyncIterator[Observation]:
        """See Site."""
        async for seen in self._watch.moves():
            yield seen

    def _try_to_look(self, job_id: str) -> Observation:
        try:
            return self._look(job_id)
        except OSError as error:
            detail = f"The job's files cannot be looked at: {error.strerror}"
            return Observation(job_id=job_id, phase=Phase.RUNNING, detail=detail)

    def _look(self, job_id: str) -> Observation:
        if not JOB_ID.fullmatch(job_id):
            return Observation(job_id=job_id, phase=Phase.UNKNOWN)
        root = self._root(job_id)
        alive = _is_taken(root / "alive")  # before the result is read: the last thing that a job does is to write it
        result, progress = self._files.result(job_id), self._files.progress(job_id)
        code = None if alive else self._exit_code(job_id)
        if result is not None:
            return Observation(job_id=job_id, phase=Phase.ENDED, progress=progress, result=result, exit_code=code)
        if alive:
            return Observation(job_id=job_id, phase=Phase.RUNNING, progress=progress)
        if not (root / "launched").exists():
            return Observation(job_id=job_id, phase=Phase.UNKNOWN)
        believed = documents.exit_code(code, progress)
        detail = "" if documents.begun(progress) else documents.words(_tail(root / "stderr"))
        return Observation(job_id=job_id, phase=Phase.ENDED, progress=progress, exit_code=believed, detail=detail)

    def _exit_code(self, job_id: str) -> int | None:
        child = self._exits.get(job_id)
        if child is not None and (code := child.poll()) is not None:
            return code
        try:
            return int((self._root(job_id) / "return_code").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    async def check(self) -> str:
        """See Site. It is this very machine."""
        return __version__

    # Cancel and forget

    async def cancel(self, job_id: str, *, force: bool = False) -> None:
        """See Site."""
        with _unavailable():
            await asyncio.to_thread(self._cancel, job_id, force)

    def _cancel(self, job_id: str, force: bool) -> None:
        root = self._root(job_id)
        with suppress(FileNotFoundError):
            replace(root / "answer.json", documents.dump(job.Answer(cancel=True)))
        if force and (process := Process.noted(root / "launched")) is not None:
            process.kill_tree()

    async def forget(self, job_id: str, *, force: bool = False) -> bool:
        """See Site."""
        with _unavailable():
            return await self._forget(job_id, self._root(job_id), force)

    async def _forget(self, job_id: str, root: Path, force: bool) -> bool:
        if _is_taken(root / "alive"):
            if not force:
                return False
            await asyncio.to_thread(self._cancel, job_id, True)
            deadline = time.monotonic() + GONE_WITHIN
            while _is_taken(root / "alive") and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.01)
        if (reaper := self._reapers.pop(job_id, None)) is not None:  # it still writes the exit code
            await asyncio.to_thread(reaper.join, GONE_WITHIN)
        await asyncio.to_thread(_remove, root)
        self._exits.pop(job_id, None)
        self._watch.drop(job_id)
        return True

    def _root(self, job_id: str) -> Path:
        if not JOB_ID.fullmatch(job_id):
            raise SiteRefused(f"{job_id!r} cannot be a job id: only letters, digits, '_' and '-' are safe.")
        return self._directory / job_id


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SiteUnavailable(f"The job's files cannot be used now: {error.strerror}") from error


def _take(path: Path, *, patience: float) -> int | None:
    """A descriptor with the lock on `path`, or None if a process keeps it. A mere look keeps it only for an instant."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if (path.parent / "launched").exists() or time.monotonic() > deadline:
                os.close(fd)
                return None
            time.sleep(0.005)
        else:
            return fd


def _is_taken(path: Path) -> bool:
    """Whether a process keeps the lock on `path`. OSError: that cannot be told now."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4096))
            return stream.read(4096).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _remove(root: Path) -> None:
    """Remove a tree in which executors may have left directories without write permission.

    OSError: there are no file descriptors to do it with, so it is still to be done.
    """
    open_up(str(root))
    for left in (2, 1, 0):  # what reaps the process may write its exit code into the vanishing directory
        try:
            shutil.rmtree(root)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in NO_DESCRIPTORS:
                raise
            if not left:
                log.warning("The directory of job %s cannot be removed: %s", root.name, error)
        else:
            return


__all__ = ["LocalSite"]
