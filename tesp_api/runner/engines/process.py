"""A program of the node as an executor, for the engines that have no daemon."""

import os
import select
import signal
import subprocess
import time
from typing import Dict, List, Optional, Tuple

from .. import batch
from ..errors import CommandError
from ..logs import Stream
from . import Run, Setting, kill_groups, marked

_GRACE = 1.0  # seconds from SIGTERM to SIGKILL
_SETTLE = 0.2  # seconds that a signal for the whole job, which has ended the executor, may need to reach us
_DRAIN = 1.0  # seconds that output may still come after the end of the last process that we know


def execute(
    setting: Setting,
    run: Run,
    argv: List[bytes],
    env: Dict[bytes, bytes],
    cwd: Optional[bytes] = None,
    pass_fds: Tuple[int, ...] = (),
) -> int:
    """Run it in a session of its own until it ends, and nothing of it is left: its exit code, 128 + N for signal N."""
    setting.watch.check()
    process = _spawn(run, argv, env, cwd, pass_fds)
    setting.tell({"group": process.pid})
    hearing = _Hearing(process, run.stdout, run.stderr)
    try:
        with setting.watch.on_stop(lambda: _terminate(process)):
            while process.poll() is None:
                hearing.listen(0.05 if hearing.silent else 1.0)
    finally:
        kill_groups(setting.plan.job_id, [process.pid])
        process.wait()
        hearing.drain(_DRAIN)
        hearing.close()
    if batch.inside():
        setting.watch.wait(_SETTLE)
    code = 128 - process.returncode if process.returncode < 0 else process.returncode
    setting.watch.check(code)
    return code


def _spawn(
    run: Run, argv: List[bytes], env: Dict[bytes, bytes], cwd: Optional[bytes], pass_fds: Tuple[int, ...]
) -> "subprocess.Popen[bytes]":
    run.begin()
    try:
        return subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL if run.stdin is None else run.stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=pass_fds,
            restore_signals=True,
        )
    except FileNotFoundError as error:
        raise CommandError("%s: %s" % (argv[0].decode("utf-8", "replace"), error.strerror), 127)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise CommandError("%s: %s" % (argv[0].decode("utf-8", "replace"), text), 126)


def _terminate(process: "subprocess.Popen[bytes]") -> None:
    """Ask politely, then not. The group's number stays ours as long as its leader is not waited for."""
    deadline = time.monotonic() + _GRACE
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while process.returncode is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass  # it is gone


class _Hearing:
    """Reads both pipes of a process as they fill."""

    def __init__(self, process: "subprocess.Popen[bytes]", stdout: Stream, stderr: Stream) -> None:
        self._process = process
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018 - for mypy
        self._streams = {process.stdout.fileno(): stdout, process.stderr.fileno(): stderr}
        self._poll = select.poll()
        for fd in self._streams:
            os.set_blocking(fd, False)
            self._poll.register(fd, select.POLLIN)
        self._child = _pid_fd(process.pid)
        if self._child >= 0:
            self._poll.register(self._child, select.POLLIN)

    @property
    def silent(self) -> bool:
        """Whether nothing would wake us when the process ends."""
        return self._child < 0

    def listen(self, seconds: float) -> bool:
        """Take what is there, waiting up to `seconds` for it; whether there was anything."""
        heard = False
        for fd, _ in self._poll.poll(int(seconds * 1000)):
            stream = self._streams.get(fd)
            if stream is None:
                continue
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                continue
            if data:
                stream.write(data)
                heard = True
            else:
                self._poll.unregister(fd)
                del self._streams[fd]
        if not self._streams and self._child < 0:
            time.sleep(min(seconds, 0.02))
        return heard

    def drain(self, seconds: float) -> None:
        """Take the rest, until the pipes close or only strangers seem to hold them."""
        if self._child >= 0:
            self._poll.unregister(self._child)
        deadline = time.monotonic() + seconds
        while self._streams and time.monotonic() < deadline:
            self.listen(0.05)

    def close(self) -> None:
        """Close the pipes."""
        if self._child >= 0:
            os.close(self._child)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _pid_fd(pid: int) -> int:
    """A descriptor that becomes readable when the process ends, or -1 where there is no such thing."""
    try:
        return int(os.pidfd_open(pid))
    except (AttributeError, OSError):
        return -1


__all__ = ["execute", "marked"]
