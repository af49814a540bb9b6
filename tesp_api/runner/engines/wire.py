"""HTTP/1.1 as spoken with a container engine on this machine.

One connection per request: they are cheap on a unix socket, and a broken one then belongs to exactly one request.
"""

import json
import socket
from typing import Any, Dict, Iterator, Optional, Tuple

from ..errors import EngineError
from ..wire import BLOCK, Exchange

_CONNECT = 10.0


class Connection(Exchange):
    """One request and its answer. OSError when the connection breaks."""

    def __init__(self, host: str) -> None:
        kind, address = parse_host(host)
        super().__init__(socket.socket(kind, socket.SOCK_STREAM), "docker")
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

    def blocks(self) -> Iterator[Tuple[int, bytes]]:
        """After a hijack: (1 for stdout or 2 for stderr, bytes), until the container's end."""
        while True:
            head = self._exactly(8, or_end=True)
            if not head:
                return
            left = int.from_bytes(head[4:8], "big")
            while left:
                block = self._some(min(left, BLOCK))
                if not block:
                    return
                left -= len(block)
                yield head[0], block


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
