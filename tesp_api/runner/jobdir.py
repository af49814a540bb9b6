"""The job's directory on the node: where each document lies, and how it is read and written."""

import json
import os
import time
from typing import Any, Optional

from . import job

_RESERVE = 1024 * 1024  # several executors' logs at the usual `log_bytes`
_HOME = "tes-runner-"  # how the directory of a delivered zipapp begins: bundle.pseudo_job (a test compares them)
_SHARD = 5  # of a job id: its task's time of creation to nine hours, so that old marks can go by the directory
_MARKED_FOR = 30 * 86400  # seconds


class JobDirectory:
    """`JOB` of job.py's description. Documents appear whole or not at all."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.tes = os.path.join(root, "tes")
        self._metadata = os.path.join(root, "metadata")
        self._working = os.path.join(root, "working")
        self._reserve = os.path.join(self._metadata, ".reserve")
        self._answer = os.path.join(root, "answer.json")
        self._lock = os.path.join(root, "tes-lock")
        self._locked = False
        self._seen: Optional[Any] = None
        self._cancel = False

    def take_lock(self) -> bool:
        """Whether this process is the first runner in this directory, ever. Pulsar wipes `working`: not there."""
        try:
            os.close(os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        self._locked = True
        return True

    def take_id(self, archive: str) -> bool:
        """Whether this is the first job of this id that the zipapp `archive` runs; to be asked once, under the lock.

        The lock goes with the job's directory. The mark `ran/<id>` beside the delivered zipapp stays, for a start that
        comes late, when that directory was cleaned away. Where no mark can be made, the lock must do.
        """
        home = os.path.dirname(os.path.dirname(archive))
        if not os.path.basename(home).startswith(_HOME) or os.path.basename(os.path.dirname(archive)) != "inputs":
            return True
        job_id = os.path.basename(self.root)
        marks = os.path.join(home, "ran")
        shard = os.path.join(marks, job_id[:_SHARD])
        try:
            is_new = _make_shard(shard)
            try:
                os.close(os.open(os.path.join(shard, job_id), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                return False
            if is_new:
                _drop_old(marks)
        except OSError:
            pass  # read-only, or full
        return True

    def read_plan(self) -> job.Plan:
        """The plan; OSError or ValueError if there is no usable one."""
        return job.read_plan(_load(os.path.join(self.root, "inputs", "job.json")))

    def write_progress(self, progress: job.Progress) -> None:
        """Replace the progress; readers see the old or the new one."""
        self._replace(self._metadata, "progress.json", _dump(progress), sync=False)

    def read_progress(self) -> Optional[job.Progress]:
        """What progress.json says, or None when it cannot be read."""
        try:
            return job.read_progress(_load(os.path.join(self._metadata, "progress.json")))
        except (OSError, ValueError):
            return None

    def cancel_asked(self) -> bool:
        """Whether an answer asks for a cancel. Half-written answers count for nothing; a wish once seen stays.

        Who removes the directory of a running job wants it no more, and can tell it in no other way.
        """
        if self._cancel:
            return True
        try:
            facts = os.stat(self._answer)
            mark = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if mark == self._seen:
                return False
            self._cancel = job.read_answer(_load(self._answer)).cancel is True
            self._seen = mark
        except FileNotFoundError:
            self._cancel = self._locked and not os.path.lexists(self._lock)
        except (OSError, ValueError):
            pass
        return self._cancel

    def note_cancel(self) -> None:
        """The service has asked for a cancel in another way: let all see it who look for an answer here."""
        self._cancel = True
        try:
            self._replace(self.root, "answer.json", _dump(job.Answer(cancel=True)), sync=False)
        except OSError:
            pass  # only the reaper would not know

    def keep_reserve(self) -> None:
        """Take the room that a result needs, so that there is some when a job has filled the disk."""
        try:
            if not os.path.isdir(self._metadata):
                os.mkdir(self._metadata)
            fd = os.open(self._reserve, os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                os.posix_fallocate(fd, 0, _RESERVE)
            finally:
                os.close(fd)
        except OSError:
            pass  # then without

    def release_reserve(self) -> None:
        """Give that room back, to be used now."""
        try:
            os.unlink(self._reserve)
        except OSError:
            pass

    def has_result(self) -> bool:
        """Whether the job's result is written."""
        return os.path.exists(os.path.join(self._metadata, "result.json"))

    def write_result(self, result: job.Result, limit: int) -> job.Result:
        """Write the truth about the job: on the disk before its name appears, first in metadata, then in working.

        What is longer than `limit` bytes would not be read, and is shortened; returns what was written.
        """
        data = _dump(result)
        if len(data) > limit:
            from .fit import fitted

            result = fitted(result, limit)
            data = _dump(result)
        self._replace(self._metadata, "result.json", data, sync=True)
        target = os.path.join(self._working, "result.json")
        temporary = "%s.%d" % (target, os.getpid())
        try:
            os.link(os.path.join(self._metadata, "result.json"), temporary)  # a second fsync would cost as much again
            os.rename(temporary, target)
        except OSError:
            try:
                self._replace(self._working, "result.json", data, sync=True)
            except OSError:
                pass  # the truth is in metadata; this copy only saves the service a question
        return result

    def _replace(self, folder: str, name: str, data: bytes, sync: bool) -> None:
        temporary = os.path.join(folder, ".%s.%d" % (name, os.getpid()))
        try:
            fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        except FileNotFoundError:
            os.mkdir(folder)  # not its parents: a job that was removed must not come back
            fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(data)
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
            os.rename(temporary, os.path.join(folder, name))
        except OSError:
            os.unlink(temporary)  # half a document takes the room that a shorter one may need
            raise


def _make_shard(path: str) -> bool:
    """Make the directory unless it is there; whether it was made."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    except FileNotFoundError:
        os.makedirs(path, 0o700, exist_ok=True)
    return True


def _drop_old(marks: str) -> None:
    """Remove the shards in which nothing was marked for a long time; what cannot be removed stays."""
    for name in os.listdir(marks):
        shard = os.path.join(marks, name)
        try:
            if time.time() - os.stat(shard).st_mtime > _MARKED_FOR:
                for mark in os.listdir(shard):
                    os.unlink(os.path.join(shard, mark))
                os.rmdir(shard)
        except OSError:
            pass


def _load(path: str) -> Any:
    with open(path, "rb") as stream:
        return json.loads(stream.read().decode("utf-8"))


def _dump(value: Any) -> bytes:
    return json.dumps(job.to_document(value)).encode("ascii")
