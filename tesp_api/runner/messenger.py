"""A small Pulsar job that acts on the directories of other jobs of the same Pulsar, where that has no call for it.

It is sent alone, not in the zipapp, and lies in its own job's inputs directory next to its orders::

    {"errand": ID, "read": [[JOB, NAME, LIMIT], ...], "write": [[JOB, NAME, TEXT], ...], "remove": [JOB, ...],
     "install": [[HOME, NAME, SHA256, BASE64], ...]}

What became of each order, in the same order, is left in working/result.json, which Pulsar sends back. `read`: the file
as base64 of zlib, null if it is not there, is longer than LIMIT or no plain file, false if the answer has no room left
for it. The others: true, or a text that says why not. A removed job leaves a mark, so that a launch that comes after
the removal runs nothing. Names that are not exactly as expected are refused, and no link is followed.
"""

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
import zlib
from typing import Any, Callable, Dict, List, Optional

ROOM = 8 * 1024 * 1024
"""Bytes that the files of one answer may take; the first file has room in any case."""

JOB = re.compile(r"[A-Za-z0-9_-]{1,200}\Z")
HOME = re.compile(r"tes-runner-[0-9a-f]{64}\Z")
READABLE = ("progress.json", "result.json")
WRITABLE = ("answer.json",)
SHARD = 5  # as in jobdir.py, like the next one (a test compares them)
MARKED_FOR = 30 * 86400


class Refused(Exception):
    """An order that must not be carried out."""


class Messenger:
    """Carries out orders below `root`, the staging directory. `room`: see ROOM."""

    def __init__(self, root: str, room: int = ROOM) -> None:
        self._root = os.path.realpath(root)
        self._room = room

    def run(self, orders: Dict[str, Any]) -> Dict[str, Any]:
        """The answer to these orders. Each order is tried, whatever happens to the others."""
        return {
            "errand": orders["errand"],
            "write": [_outcome(self.write, each) for each in orders.get("write", [])],
            "install": [_outcome(self.install, each) for each in orders.get("install", [])],
            "remove": [_outcome(self.remove, [each]) for each in orders.get("remove", [])],
            "read": self.read_all(orders.get("read", [])),
        }

    def read_all(self, orders: List[Any]) -> List[Any]:
        """The files, as far as there is room."""
        found: List[Any] = []
        first = True
        for order in orders:
            data = self.read(*order)
            if data is None:
                found.append(None)
                continue
            text = base64.b64encode(zlib.compress(data, 6)).decode("ascii")
            if len(text) > self._room and not first:
                found.append(False)
                continue
            first = False
            self._room -= len(text)
            found.append(text)
        return found

    def read(self, job: str, name: str, limit: int) -> Optional[bytes]:
        """A document of the job's metadata directory, or None."""
        if name not in READABLE:
            return None
        try:
            path = os.path.join(self._job(job), "metadata", name)
            if os.path.realpath(path) != path:
                return None
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as stream:
                facts = os.fstat(fd)
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
                    return None
                data = stream.read(limit + 1)
        except (OSError, Refused):
            return None
        return data if len(data) <= limit else None

    def write(self, job: str, name: str, text: str) -> None:
        """Put a document into the job's directory, which is made if the job's launch is still to come.

        What is for a job that was removed meanwhile is for nobody: a directory made now would stay for ever.
        """
        if name not in WRITABLE:
            raise Refused("no such document")
        folder = self._job(job)
        if not os.path.isdir(folder):
            if self._is_buried(job):
                return
            os.mkdir(folder, 0o755)
        if os.path.realpath(folder) != folder:
            raise Refused("the job's directory is a link")
        _replace(os.path.join(folder, name), text.encode("ascii"))

    def install(self, home: str, name: str, sha256: str, data: str) -> None:
        """Put a program into its home, unless it is there already; it appears whole or not at all."""
        if not HOME.match(home) or name != "runner.pyz":
            raise Refused("no home of a runner")
        folder = os.path.join(self._root, home, "inputs")
        os.makedirs(folder, 0o755, exist_ok=True)
        path = os.path.join(folder, name)
        if _digest(path) != sha256:
            _replace(path, base64.b64decode(data))
        if _digest(path) != sha256:
            raise Refused("the runner did not arrive as it was sent")

    def remove(self, job: str) -> None:
        """Remove the job's directory, also what is closed to its owner; nothing there is fine."""
        path = self._job(job)
        self._bury(job)
        if os.path.islink(path):
            os.unlink(path)
            return
        shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):
            open_up(path)
            shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):
            raise OSError(errno.ENOTEMPTY, "something could not be removed")

    def _bury(self, job: str) -> None:
        """Mark the job as one that has run, in the home of each runner: the mark that runners make of jobs they take.

        A launch may lie in a queue for long. One that comes after its job was removed must not run. No runner drops old
        marks in the home of an earlier version, so whoever makes marks there does.
        """
        if job.startswith("tes-errand-"):
            return
        for mark in self._marks(job):
            shard = os.path.dirname(mark)
            try:
                is_new = not os.path.isdir(shard)
                os.makedirs(shard, 0o700, exist_ok=True)
                os.close(os.open(mark, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
                if is_new:
                    _drop_old(os.path.dirname(shard))
            except OSError:
                pass  # read-only, or full: then a late launch runs, as it does elsewhere

    def _is_buried(self, job: str) -> bool:
        return any(os.path.lexists(mark) for mark in self._marks(job))

    def _marks(self, job: str) -> List[str]:
        homes = [home for home in os.listdir(self._root) if HOME.match(home)]
        return [os.path.join(self._root, home, "ran", job[:SHARD], job) for home in homes]

    def _job(self, job: str) -> str:
        if not JOB.match(job) or HOME.match(job):
            raise Refused("no name of a job")
        return os.path.join(self._root, job)


def _outcome(act: Callable[..., None], order: List[Any]) -> Any:
    try:
        act(*order)
    except OSError as error:
        return error.strerror or "it failed"
    except Exception as error:  # one bad order must not keep the others waiting
        return str(error) or type(error).__name__
    return True


def _replace(path: str, data: bytes) -> None:
    temporary = "%s.%d" % (path, os.getpid())
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest()
    except FileNotFoundError:
        return ""


def _drop_old(marks: str) -> None:
    """Remove the shards in which nothing was marked for a long time; what cannot be removed stays."""
    for name in os.listdir(marks):
        shard = os.path.join(marks, name)
        try:
            if time.time() - os.stat(shard).st_mtime > MARKED_FOR:
                for mark in os.listdir(shard):
                    os.unlink(os.path.join(shard, mark))
                os.rmdir(shard)
        except OSError:
            pass


def open_up(name: str, folder: Optional[int] = None) -> None:
    """Let the owner into every directory of a tree, whose top is found by its path or its name in `folder`.

    A container that is not dead yet may put a link in a directory's place at any moment. So each is found by its name
    once, and held by a descriptor from then on.
    """
    try:
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return  # no directory any more
    try:
        held = "/proc/self/fd/%d" % fd
        os.chmod(held, 0o700)  # fchmod needs more than a path, and what is closed opens as no more
        for inner in [each.name for each in os.scandir(held) if each.is_dir(follow_symlinks=False)]:
            open_up(inner, fd)
    except (OSError, RecursionError):
        pass  # another user's, or deeper than anybody needs
    finally:
        os.close(fd)


def main() -> int:
    """Carry out the orders beside this file; the current directory is JOB/working."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "orders.json"), "rb") as stream:
        orders = json.loads(stream.read().decode("ascii"))
    answer = Messenger(os.path.join(os.getcwd(), os.pardir, os.pardir)).run(orders)
    _replace("result.json", json.dumps(answer).encode("ascii"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
