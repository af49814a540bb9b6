"""HTTP/1.1 as spoken with a container engine on this machine; importing `http.client` would cost more than a container.

One connection per request: they are cheap on a unix socket, and a broken one then belongs to exactly one request.
"""

import json
import socket
from typing import Any, Dict, Iterator, Optional, Tuple

from ..errors import EngineError

_CONNECT = 10.0
_BLOCK = 65536


class Connection:
    """One request and its answer. OSError when the connection breaks."""

    def __init__(self, host: str) -> None:
        kind, address = parse_host(host)
        self.socket = socket.socket(kind, socket.SOCK_STREAM)
        self.status = 0
        self.headers: Dict[str, str] = {}
        self._buffer = b""
        self.socket.settimeout(_CONNECT)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        if kind != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket.settimeout(None)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
        lines = ["%s %s HTTP/1.1" % (method, path), "Host: docker", "Content-Length: %d" % len(data)]
        if body is not None:
            lines.append("Content-Type: application/json")
        lines.extend("%s: %s" % item for item in (headers or {}).items())
        self.socket.sendall("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + data)

    def receive(self) -> int:
        """Read the head of the answer: its status. The body is for `text`, `lines` or, after a hijack, `blocks`."""
        first = self._line().split(" ", 2)
        if len(first) < 2 or not first[1].isdigit():
            raise ConnectionError("no HTTP answer: %r" % " ".join(first))
        self.status = int(first[1])
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

    def blocks(self) -> Iterator[Tuple[int, bytes]]:
        """After a hijack: (1 for stdout or 2 for stderr, bytes), until the container's end."""
        while True:
            head = self._exactly(8, or_end=True)
            if not head:
                return
            left = int.from_bytes(head[4:8], "big")
            while left:
                block = self._some(min(left, _BLOCK))
                if not block:
                    return
                left -= len(block)
                yield head[0], block

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
            for block in iter(lambda: self._some(_BLOCK), b""):
                yield block

    def _line(self) -> str:
        while b"\n" not in self._buffer:
            block = self.socket.recv(_BLOCK)
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


def parse_host(host: str) -> Tuple[int, Any]:
    """The socket family and address of `unix:///path` or `tcp://host:port`."""
    if host.startswith("unix://"):
        return socket.AF_UNIX, host[len("unix://") :]
    if host.startswith("tcp://"):
        name, _, port = host[len("tcp://") :].rstrip("/").rpartition(":")
        if name and port.isdigit():
            if name.startswith("["):
                return socket.AF_INET6, (name.strip("[]"), int(port))
            return socket.AF_INET, (name, int(port))
    raise EngineError("runtime.docker_host: %r is neither unix:///path nor tcp://host:port." % host)


def call(
    host: str, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None, timeout: float = 600
) -> Tuple[int, Any]:
    """One short request: the status and the answer's JSON (its text if it is none)."""
    with Connection(host) as connection:
        connection.socket.settimeout(timeout)  # an engine under load may be slow, but not for ever
        connection.send(method, path, body, headers)
        status = connection.receive()
        text = connection.text()
    try:
        return status, json.loads(text) if text else None
    except ValueError:
        return status, text


def words(answer: Any) -> str:
    """The engine's own words in an error answer."""
    if isinstance(answer, dict) and answer.get("message"):
        return str(answer["message"]).strip()
    return str(answer).strip()
