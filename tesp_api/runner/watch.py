"""One thread beside the work: it shows progress and a heartbeat, and looks for the wish to stop."""

import os
import threading
import time
from typing import Callable, List, Optional, Tuple

from . import job
from .clock import now
from .errors import Stopped
from .jobdir import JobDirectory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .logs import Stream
    from .report import Reporter

LOOK = 0.1
LONGEST_LOOK = 0.5
"""Seconds between two looks for an answer: at first, and once the job is old. A node may hold hundreds of jobs."""

NAP = 0.02
"""Seconds from one look for the wish to stop to the next of somebody who only waits."""

CALM = 0.02
"""The part of its age for which an old job waits from one look to the next."""

BEAT = 3.0
"""Seconds between two heartbeats."""

TAILS = 1.0
"""Least seconds between two progresses that only show more output."""

STUCK = 2.0
"""Seconds that a transfer has to notice the wish to stop."""


class Watch:
    """Tells the service how far we are, and us that we shall stop. `check` is cheap: call it often."""

    def __init__(self, directory: JobDirectory, job_id: str, report: Optional[job.ReportTo] = None) -> None:
        self.progress = job.Progress(job_id, phase="staging")
        self.stopped = threading.Event()
        self.signal = 0  # the signal that made us stop, if it was one
        self._directory = directory
        self._lock = threading.Lock()
        self._hooks: List[Callable[[], None]] = []
        self._closed = threading.Event()
        self._wake = threading.Event()  # there is something to see at once
        self._stuck: Optional[Callable[[], None]] = None
        self._streams: Optional["Tuple[Stream, Stream]"] = None
        self._sizes = (0, 0)
        self._report = report
        self._reporter: Optional["Reporter"] = None

    def start(self, stuck: Callable[[], None]) -> None:
        """Write the first progress and begin to watch. `stuck` is called if staging does not heed the wish to stop."""
        self._stuck = stuck
        if self._report is not None:
            from .report import Reporter

            self._reporter = Reporter(self._report, self._hear)
        self._write()
        if self._directory.cancel_asked():
            self.stopped.set()  # before anything is started at all
        threading.Thread(target=self._loop, name="watch", daemon=True).start()

    def phase(self, phase: str, executor: Optional[int] = None) -> None:
        """Enter a phase; the progress is written before this returns."""
        with self._lock:
            started = self.progress.started
            if phase == "running" and started is None:
                started = now()
            index = self.progress.executor if executor is None else executor
            self.progress = self.progress._replace(phase=phase, executor=index, started=started)
            if phase == "running":  # what the executor before wrote is told by the result
                self._streams = None
                self.progress = self.progress._replace(stdout="", stderr="", stdout_bytes=0, stderr_bytes=0)
        self._write()

    def follow(self, stdout: "Stream", stderr: "Stream") -> None:
        """Show the tails of these streams from now on, as long as the job runs."""
        self._sizes = (0, 0)
        self._streams = stdout, stderr

    def check(self, exit_code: Optional[int] = None) -> None:
        """Raise Stopped if the job shall stop; with the exit code of the executor, if one has just ended."""
        if self.stopped.is_set():
            raise Stopped(exit_code)

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until the wish to stop, which raises Stopped."""
        if self.wait(seconds):
            raise Stopped()

    def wait(self, seconds: float) -> bool:
        """Wait, but not longer than until the wish to stop; whether that is there.

        Not in the event's own wait: a signal on this thread in the middle of it would wait for the event's lock for
        ever, which only this thread could give back.
        """
        end = time.monotonic() + seconds
        while not self.stopped.is_set():
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, NAP))
        return True

    def on_stop(self, hook: Callable[[], None]) -> "Hook":
        """`with watch.on_stop(hook):` hook is called once, in a thread of its own, if the wish comes meanwhile."""
        return Hook(self, hook)

    def stop_for_signal(self, number: int) -> None:
        """Stop because the node's system wants it."""
        self.signal = self.signal or number
        self.stopped.set()

    def close(self, result: job.Result) -> None:
        """Stop watching and say `done`: `result` is written."""
        self._closed.set()
        self._wake.set()
        self._streams = None
        with self._lock:
            self.progress = self.progress._replace(phase="done", stdout="", stderr="", stdout_bytes=0, stderr_bytes=0)
        reporter, self._reporter = self._reporter, None
        self._write()
        if reporter is not None:
            reporter.finish(self.progress, result)

    def _hear(self, answer: job.Answer) -> None:
        """The service answered a report."""
        if answer.cancel and not self.stopped.is_set():
            self._directory.note_cancel()
            self.stopped.set()
            self._wake.set()

    def _take_tails(self) -> bool:
        """Put the ends of the streams into the progress; whether there is more in them."""
        streams = self._streams
        sizes = (streams[0].size, streams[1].size) if streams else self._sizes
        if streams is None or sizes == self._sizes:
            return False
        self._sizes = sizes
        stdout, stdout_bytes = streams[0].tail(job.TAIL_BYTES)
        stderr, stderr_bytes = streams[1].tail(job.TAIL_BYTES)
        with self._lock:
            if self.progress.phase != "running" or streams is not self._streams:
                return False
            self.progress = self.progress._replace(
                stdout=stdout, stderr=stderr, stdout_bytes=stdout_bytes, stderr_bytes=stderr_bytes
            )
        return True

    def _write(self) -> None:
        with self._lock:
            self.progress = self.progress._replace(beat=self.progress.beat + 1)
            if self._reporter is not None:
                self._reporter.show(self.progress)
            try:
                self._directory.write_progress(self.progress)
            except OSError:
                pass  # a full disk: the service sees a silent job, the result will say more

    def _loop(self) -> None:
        began = beat = time.monotonic()
        tails = beat - TAILS
        while True:
            self._wake.wait(min(max(LOOK, CALM * (time.monotonic() - began)), LONGEST_LOOK))
            if self._closed.is_set():
                break
            if not self.stopped.is_set() and self._directory.cancel_asked():
                self.stopped.set()
            if self.stopped.is_set():
                break
            more = time.monotonic() - tails >= TAILS and self._take_tails()
            if more:
                tails = time.monotonic()
            if more or time.monotonic() - beat >= BEAT:
                beat = time.monotonic()
                self._write()
        self._end(beat)

    def _end(self, beat: float) -> None:
        """The wish is there: call the hooks, also those that come late, until the work has heard it."""
        since = time.monotonic()
        while not self._closed.is_set():
            with self._lock:
                hooks, self._hooks = self._hooks, []
                stuck = self.progress.phase in ("staging", "uploading") and time.monotonic() - since > STUCK
            for hook in hooks:
                threading.Thread(target=hook, daemon=True).start()
            if stuck and not hooks and self._stuck is not None:
                self._stuck()
            if time.monotonic() - beat >= BEAT:
                beat = time.monotonic()
                self._write()
            self._closed.wait(LOOK)


class Hook:
    """A registration with `Watch.on_stop`."""

    def __init__(self, watch: Watch, hook: Callable[[], None]) -> None:
        self._watch = watch
        self._hook = hook

    def __enter__(self) -> None:
        self._watch.check()
        with self._watch._lock:
            self._watch._hooks.append(self._hook)

    def __exit__(self, *exception: object) -> None:
        with self._watch._lock:
            if self._hook in self._watch._hooks:
                self._watch._hooks.remove(self._hook)


def last_resort() -> None:
    """End the process now, whatever other threads are at."""
    os._exit(job.EXIT_DONE)
