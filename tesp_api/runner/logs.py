"""The output of an executor: kept whole in a file when one is named, and bounded as text in any case."""

import codecs
import os
import threading
from typing import Optional, Tuple

codecs.register_error("tesp.question", lambda error: ("?" * (error.end - error.start), error.end))  # type: ignore


class BoundedLog:
    """The head and the tail of a stream, in constant memory however long it is."""

    def __init__(self, limit: int) -> None:
        self._head_limit = max(0, limit) // 4
        self._tail_limit = max(0, limit) - self._head_limit
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0
        self.size = 0

    def add(self, data: bytes) -> None:
        """Take in more of the stream."""
        self.size += len(data)
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

    def tail(self, limit: int) -> bytes:
        """The last bytes of the stream, `limit` at most."""
        if self._dropped or len(self._tail) >= limit:
            return bytes(self._tail[-limit:])
        return bytes((self._head + self._tail)[-limit:])

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
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Take in more output; `error` keeps the first failure to store it."""
        with self._lock:
            self._log.add(data)
        if self.fd is None or self.error is not None:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as error:
            self.error = error

    @property
    def size(self) -> int:
        """How many bytes were written."""
        return self._log.size

    def tail(self, limit: int) -> Tuple[str, int]:
        """The end of what was written, at most `limit` bytes, and how many bytes there were up to that end.

        The text takes as many bytes as it stands for: what is no UTF-8 becomes question marks. May be called beside
        `write`.
        """
        with self._lock:
            data, size = self._log.tail(limit), self._log.size
        end = len(data) - _unfinished(data)
        start = 0
        while len(data) < size and start < min(3, end) and data[start] & 0xC0 == 0x80:
            start += 1  # the rest of a character that was cut
        return data[start:end].decode("utf-8", "tesp.question"), size - len(data) + end

    def text(self) -> str:
        """The bounded text."""
        return self._log.text()

    def close(self) -> None:
        """Close the file."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _unfinished(data: bytes) -> int:
    """How many bytes at the end may belong to a character whose rest is still to come."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return back if length > back else 0
    return 0
