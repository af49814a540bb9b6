"""The output of an executor: kept whole in a file when one is named, and bounded as text in any case."""

import os
from typing import Optional


class BoundedLog:
    """The head and the tail of a stream, in constant memory however long it is."""

    def __init__(self, limit: int) -> None:
        self._head_limit = max(0, limit) // 4
        self._tail_limit = max(0, limit) - self._head_limit
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        """Take in more of the stream."""
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._tail_limit + 65536:  # rarely, so that each byte is moved about once
            self._trim()

    def _trim(self) -> None:
        excess = len(self._tail) - self._tail_limit
        if excess > 0:
            del self._tail[:excess]
            self._dropped += excess

    def text(self) -> str:
        """What is kept, as text: UTF-8, anything else replaced; a mark tells how much was left out."""
        self._trim()
        if not self._dropped:
            return (self._head + self._tail).decode("utf-8", "replace")
        mark = "\n[... %d bytes left out ...]\n" % self._dropped
        return self._head.decode("utf-8", "replace") + mark + self._tail.decode("utf-8", "replace")


class Stream:
    """Where an engine puts what an executor writes. Never raises: an executor must not stall on our full disk."""

    def __init__(self, limit: int, fd: Optional[int] = None) -> None:
        self.fd = fd
        self.error: Optional[OSError] = None
        self._log = BoundedLog(limit)

    def write(self, data: bytes) -> None:
        """Take in more output; `error` keeps the first failure to store it."""
        self._log.add(data)
        if self.fd is None or self.error is not None:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as error:
            self.error = error

    def text(self) -> str:
        """The bounded text."""
        return self._log.text()

    def close(self) -> None:
        """Close the file."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
