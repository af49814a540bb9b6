"""HTTP/1.1 over a socket; importing `http.client` would cost more than a container."""

import json
import socket
from typing import Any, Dict, Iterator, Optional

BLOCK = 65536


class Exchange:
    """Requests and their answers on one connected socket, one after the other. OSError when the connection breaks."""

    def __init__(self, connected: socket.socket, host: str) -> None:
        self.socket = connected
        self.status = 0
        self.headers: Dict[str, str] = {}
        self._host = host
        self._buffer = b""

    def close(self) -> None:
        """Close it; a thread that waits for the answer gets an error."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()

    def send(self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None) -> None:
        """Send a request, its body as JSON."""
        data = b"" if body is None else json.dumps(body).encode("ascii")
        lines = ["%s %s HTTP/1.1" % (method, path), "Host: %s" % self._host, "Content-Length: %d" % len(data)]
        if body is not None:
            lines.append("Content-Type: application/json")
        lines.extend("%s: %s" % item for item in (headers or {}).items())
        self.socket.sendall("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + data)

    def receive(self) -> int:
        """Read the head of the answer: its status. The body is for `text` or `lines`."""
        first = self._line().split(" ", 2)
        if len(first) < 2 or not first[1].isdigit():
            raise ConnectionError("no HTTP answer: %r" % " ".join(first))
        self.status = int(first[1])
        self.headers = {}
        for line in iter(self._line, ""):
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        return self.status

    def text(self) -> str:
        """The whole body."""
        return b"".join(self._body()).decode("utf-8", "replace")

    def lines(self) -> Iterator[str]:
        """The body line by line, as it comes."""
        rest = b""
        for block in self._body():
            rest += block
            while b"\n" in rest:
                line, rest = rest.split(b"\n", 1)
                yield line.decode("utf-8", "replace")
        if rest:
            yield rest.decode("utf-8", "replace")

    def _body(self) -> Iterator[bytes]:
        if self.status in (204, 304):
            return
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                size = int(self._line().split(";")[0], 16)
                if not size:
                    return
                yield self._exactly(size)
                self._line()
        elif "content-length" in self.headers:
            yield self._exactly(int(self.headers["content-length"]))
        else:
            for block in iter(lambda: self._some(BLOCK), b""):
                yield block

    def _line(self) -> str:
        while b"\n" not in self._buffer:
            block = self.socket.recv(BLOCK)
            if not block:
                raise ConnectionError("the connection was closed in the middle of an answer")
            self._buffer += block
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.rstrip(b"\r").decode("latin-1")

    def _some(self, size: int) -> bytes:
        if not self._buffer:
            return self.socket.recv(size)
        block, self._buffer = self._buffer[:size], self._buffer[size:]
        return block

    def _exactly(self, size: int, or_end: bool = False) -> bytes:
        data = b""
        while len(data) < size:
            block = self._some(size - len(data))
            if not block:
                if or_end and not data:
                    return b""
                raise ConnectionError("the connection was closed in the middle of an answer")
            data += block
        return data
