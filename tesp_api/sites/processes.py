"""Processes of this machine that outlive the service which started them (Linux's /proc)."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PASSED_ON = ("HOME", "PATH", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""Variables that a job's process may see; the service's own, with its secrets, stay with the service."""


@dataclass(frozen=True)
class Process:
    """A process by its id and its start time (clock ticks since boot), which tells it from a later one of that id.

    All but `gone` raise OSError when they cannot look now, for want of file descriptors say: that is no death.
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this id now, unless it is only waiting to be reaped."""
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields and fields[0] not in ("Z", "X") else None

    @classmethod
    def noted(cls, path: Path) -> Process | None:
        """The process noted in a file, if there is such a note and it is alive."""
        try:
            document = json.loads(path.read_bytes())
            noted = cls(int(document["pid"]), int(document["start"]))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return noted if noted.alive else None

    def note(self, path: Path) -> None:
        """Write down which process this is."""
        replace(path, json.dumps({"pid": self.pid, "start": self.start}).encode("ascii"))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self

    @property
    def gone(self) -> bool:
        """Whether it is known to run no more, for those who wait for that: they look again anyway."""
        try:
            return not self.alive
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Send it a signal, unless it is gone."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_tree(self) -> None:
        """Kill it and everything below it; nothing where not all of that can be seen.

        From above, since a parent that lives on for a moment would take the end of a child for the child's own.
        """
        if not self.alive:
            return
        for pid in _tree(self.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as stream:
        stream.write(data)
    temporary.rename(path)


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; nothing if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # the name in parentheses may hold anything


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names only
        with suppress(PermissionError):  # another user's, where /proc hides those
            if entry.isdigit() and (fields := _stat(int(entry))):
                children.setdefault(int(fields[1]), []).append(int(entry))
    tree = [root]
    for pid in tree:  # grows as it goes
        tree += children.get(pid, ())
    return tree
