"""The runner's story: take the job, stage in, run the executors in order, stage out, write the result."""

import os
import sys
import threading
import time
from typing import Callable, Dict, List, Optional, Tuple

from . import batch, job
from .clock import now
from .errors import CommandError, EngineError, EngineLost, Problem, Stopped
from .jobdir import JobDirectory
from .reaper import Reaper
from .watch import Watch, last_resort


def main() -> int:
    """Carry out the job whose directory JOB/working is the current one; the exit code (see job.py)."""
    try:
        directory = JobDirectory(os.path.dirname(os.getcwd()))
        if not directory.take_lock() or not directory.take_id(sys.path[0]):  # boot has put the zipapp there
            return _refuse(job.EXIT_DUPLICATE, "This job has been taken by another runner.")
    except OSError as error:
        return _refuse(job.EXIT_UNREADABLE_RUNNER, "The job's directory cannot be used: %s" % ascii(str(error)))
    try:
        plan = directory.read_plan()
    except (OSError, ValueError) as error:
        return _refuse(job.EXIT_BAD_PLAN, "The plan cannot be used: %s" % ascii(str(error)))
    try:
        _fall_silent(directory)
    except OSError as error:
        return _refuse(job.EXIT_UNREADABLE_RUNNER, "The job's directory cannot be used: %s" % ascii(str(error)))
    directory.keep_reserve()
    reaper = Reaper.start(directory, plan)  # first of all: it is forked, so there may be no threads yet
    try:
        Attempt(directory, plan, reaper).carry_out()
    except BaseException as error:
        _last_line(error)
        os._exit(job.EXIT_NO_RESULT)  # without a goodbye, so that the reaper goes on trying to write one
    reaper.tell({"bye": True})
    os._exit(job.EXIT_DONE)  # nothing is left to do, and no stray thread may delay the end


class Attempt:
    """One carrying out of a plan."""

    def __init__(self, directory: JobDirectory, plan: job.Plan, reaper: Reaper) -> None:
        self._directory = directory
        self._plan = plan
        self._reaper = reaper
        self._watch = Watch(directory, plan.job_id, plan.report)
        self._start_time = now()
        self._began = time.monotonic()
        self._logs: List[str] = []
        self._executors: List[job.ExecutorResult] = []  # that ended by themselves
        self._stopped: List[job.ExecutorResult] = []  # the one that did not, if any
        self._outputs: List[job.OutputFile] = []
        self._metadata: Dict[str, str] = {}
        self._infrastructure = False  # whether the node or its engine made us fail
        self._finishing = threading.Lock()

    def carry_out(self) -> None:
        """Do all of it; afterwards the result is written, whatever happened."""
        _heed_signals(self._watch)
        self._watch.start(self._abandon)
        try:
            state = self._work()
        except Stopped:
            state = self._stopped_state()
        except Problem as problem:
            self.note(str(problem))
            self._infrastructure = isinstance(problem, EngineLost)
            state = "SYSTEM_ERROR"
        except BaseException as error:  # a mistake in the runner must not cost the job its result
            self.note("The runner failed unexpectedly: %s" % _last_line(error))
            state = "SYSTEM_ERROR"
        self._finish(state)

    def note(self, line: str) -> None:
        """Add a line to the system logs."""
        self._logs.append(line.encode("utf-8", "replace").decode("utf-8"))

    def _work(self) -> str:
        from .engines import Setting, open_engine
        from .mounts import prepare, tree
        from .staging import Staging

        self._watch.check()
        bounds = prepare(self._plan.mounts, self._directory.tes, self._plan.file_roots)
        engine = open_engine(
            Setting(self._plan, bounds, self._directory.root, self._watch, self.note, self._reaper.tell)
        )
        if engine.kind != "docker":  # Docker's first answer tells the same, one question earlier
            self._metadata["runtime_version"] = engine.check()
        self._metadata["runtime"] = engine.kind
        visible = tree(bounds, engine.node_names)
        staging = Staging(self._plan, bounds, tree(bounds, staging=True), visible, self._watch, self.note)
        self._outputs = staging.sent
        try:
            staging.fetch_all()
            try:
                succeeded = self._run_all(Runs(engine, visible, self))
            finally:
                self._adopt(engine)
            self._watch.phase("uploading")
            problems = staging.send_all(succeeded)
        finally:
            engine.close()  # no final state before the containers are gone
        for problem in problems:
            self.note(problem)
        if not succeeded:
            return "EXECUTOR_ERROR"
        return "SYSTEM_ERROR" if problems else "COMPLETE"

    def _run_all(self, runs: "Runs") -> bool:
        """Run the executors in order; whether all went well, ignored failures counting as well."""
        for index, executor in enumerate(self._plan.executors):
            result = runs.one(index, executor)
            self._executors.append(result)
            failed = job.has_failed(self._plan, self._executors)
            if failed or index + 1 < len(self._plan.executors):
                self._reaper.tell({"executor": job.to_document(result)})
            if failed:
                return False
        return True

    def _adopt(self, engine: "Engine") -> None:
        try:
            engine.adopt()
        except (OSError, EngineError) as error:
            self.note("Files of other users may be left in the job's directory: %s" % error)

    def keep(self, stopped: job.ExecutorResult) -> None:
        """An executor was stopped: what it had written until then is worth as much as an ended one's."""
        self._stopped = [stopped]

    def begin(self, index: int) -> None:
        """An executor is about to start: say so first, so that `started` is never too late."""
        self._watch.phase("running", index)

    @property
    def watch(self) -> Watch:
        """Progress and the wish to stop."""
        return self._watch

    @property
    def plan(self) -> job.Plan:
        """What to do."""
        return self._plan

    def _stopped_state(self) -> str:
        if not self._watch.signal or self._directory.cancel_asked():
            return "CANCELED"
        if batch.limit_reached(self._plan.time_limit, time.monotonic() - self._began):
            self.note("The time limit of the job was reached.")  # another try would end the same way
        else:
            self.note("The node told the runner to stop (signal %d)." % self._watch.signal)
            self._infrastructure = True
        return "SYSTEM_ERROR"

    def _abandon(self) -> None:
        """A transfer does not heed the wish to stop: end without it."""
        if self._watch.progress.phase in ("staging", "uploading"):
            self._finish(self._stopped_state())
            last_resort()  # without a goodbye: the reaper removes what a request under way may still create

    def _finish(self, state: str) -> None:
        """Write the result, once; progress says `done` after it."""
        with self._finishing:
            if self._directory.has_result():
                return
            wished = self._directory.cancel_asked()
            result = job.Result(
                job_id=self._plan.job_id,
                state=state,
                start_time=self._start_time,
                end_time=now(),
                started=self._watch.progress.started is not None,
                executors=self._executors + self._stopped,
                outputs=list(self._outputs),
                system_logs=self._logs,
                metadata=self._metadata,
                infrastructure=self._infrastructure and not wished and not job.has_failed(self._plan, self._executors),
            )
            self._directory.release_reserve()
            try:
                result = self._directory.write_result(result, self._plan.result_bytes)
            except OSError as error:  # a full disk, most likely; the short form may still fit
                self.note("The result could not be stored whole: %s" % error)
                result = result._replace(state="SYSTEM_ERROR", executors=[], outputs=[], system_logs=self._logs[-5:])
                result = self._directory.write_result(result, self._plan.result_bytes)
            self._watch.close(result)


class Runs:
    """Runs single executors, their streams connected to the files that the plan names."""

    def __init__(self, engine: "Engine", tree: "Tree", attempt: Attempt) -> None:
        self._engine = engine
        self._tree = tree
        self._attempt = attempt

    def one(self, index: int, executor: job.Executor) -> job.ExecutorResult:
        """Run one executor; Problem if it could not be run, or its streams not be stored."""
        from .engines import Run

        self._attempt.watch.check()
        stdin, stdout, stderr = self._open(index, executor)
        started = [now()]

        def begin() -> None:
            self._attempt.begin(index)
            self._attempt.watch.follow(stdout, stderr)
            started[0] = now()

        try:
            code = self._engine.run(Run(index, executor, stdin, stdout, stderr, begin))
        except CommandError as error:
            code = error.exit_code
            stderr.write((str(error) + "\n").encode("utf-8", "replace"))
        except Stopped as stop:
            if stop.exit_code is not None:
                self._attempt.keep(_ended(stop.exit_code, started[0], stdout, stderr))
            raise
        except EngineError:
            self._attempt.watch.check()  # stopped in the middle, an engine may complain; that is not what matters
            raise
        finally:
            if stdin is not None:
                os.close(stdin)
            stdout.close()
            stderr.close()
        for name, stream in (("stdout", stdout), ("stderr", stderr)):
            if stream.error is not None:
                raise Problem("executors[%d].%s could not be stored: %s" % (index, name, stream.error.strerror))
        return _ended(code, started[0], stdout, stderr)

    def _open(self, index: int, executor: job.Executor) -> Tuple[Optional[int], "Stream", "Stream"]:
        from .logs import Stream

        fds: List[Optional[int]] = []
        opens: "List[Opening]" = [("stdin", executor.stdin, self._tree.open_read)]
        opens += [
            ("stdout", executor.stdout, self._tree.open_write),
            ("stderr", executor.stderr, self._tree.open_write),
        ]
        for name, path, opened in opens:
            try:
                fds.append(opened(path) if path else None)
            except (OSError, Problem) as error:
                for fd in fds:
                    if fd is not None:
                        os.close(fd)
                raise Problem("executors[%d].%s: %s" % (index, name, _reason(error)))
        limit = self._attempt.plan.log_bytes
        return fds[0], Stream(limit, fds[1]), Stream(limit, fds[2])


Opening = Tuple[str, Optional[str], Callable[[str], int]]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .engines import Engine
    from .logs import Stream
    from .tree import Tree


def _ended(code: int, started: str, stdout: "Stream", stderr: "Stream") -> job.ExecutorResult:
    return job.ExecutorResult(code, started, now(), stdout.text(), stderr.text())


def _refuse(code: int, sentence: str) -> int:
    sys.stderr.write(sentence + "\n")
    return code


def _fall_silent(directory: JobDirectory) -> None:
    """From here on nothing may reach Pulsar's streams: one byte that is no UTF-8 there, and it loses the job."""
    path = os.path.join(directory.root, "tes-runner.log")
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null > 0:
        os.close(null)


def _heed_signals(watch: Watch) -> None:
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: watch.stop_for_signal(got))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _reason(error: BaseException) -> str:
    from .tree import reason

    return reason(error)


def _last_line(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = " (%s:%s)" % (os.path.basename(frames[-1].filename), frames[-1].lineno) if frames else ""
    try:
        traceback.print_exception(type(error), error, error.__traceback__)  # to tes-runner.log
    except Exception:  # noqa: S110 - a full disk; above all, nothing may hinder the end
        pass
    return "%s: %s%s" % (type(error).__name__, error, where)
