"""A real image registry for tests, and a way to it that can be held up."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path

import bcrypt

from tests import engine
from tests.support import free_port, require


def docker(*arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> str:
    """What the docker client says, after a success."""
    done = subprocess.run(
        ["docker", *arguments], input=stdin, capture_output=True, timeout=60, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


class Registry:
    """Debian's docker-registry on a free loopback port, which engines may use without TLS."""

    def __init__(self, directory: Path, user: str = "", password: str = "") -> None:
        require(engine.docker_host(), "Docker with the image busybox is needed")
        program = shutil.which("docker-registry")
        require(program, "docker-registry is needed (Debian: docker-registry)")
        assert program is not None
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.config = directory / "client"  # for DOCKER_CONFIG: a login that works, if one is needed
        settings = f"""
            version: 0.1
            log: {{level: error, accesslog: {{disabled: true}}}}
            storage: {{filesystem: {{rootdirectory: {directory}/data}}}}
            http: {{addr: "127.0.0.1:{self.port}"}}
        """
        if user:
            salted = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
            (directory / "htpasswd").write_text(f"{user}:{salted}\n")
            settings += f"""auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}\n"""
        (directory / "registry.yml").write_text("\n".join(line.strip() for line in settings.splitlines()))
        self._log = (directory / "log").open("wb")
        self._process = subprocess.Popen(
            [program, "serve", str(directory / "registry.yml")],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        )
        self._images: list[str] = []
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/v2/")
            return connection.getresponse().status in (200, 401)
        except OSError:
            return False
        finally:
            connection.close()

    def push(self, config: str = "", port: int = 0) -> str:
        """Push a new image (busybox and a megabyte of its own), forget it locally: its name, as `port` sees it."""
        path = f"tesp-test/{uuid.uuid4().hex[:12]}:v1"
        name = f"127.0.0.1:{self.port}/{path}"
        env = {"DOCKER_CONFIG": config} if config else {}
        docker("import", "-", name, stdin=_root())
        try:
            docker("push", "-q", name, env=env)
        finally:
            docker("rmi", name)
        seen = f"127.0.0.1:{port or self.port}/{path}"
        self._images += [name, seen]
        return seen

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()
        for name in {name.rpartition(":")[0] for name in self._images}:
            for known in subprocess.run(["docker", "images", "-q", name], capture_output=True).stdout.split():
                subprocess.run(["docker", "rmi", "-f", known.decode()], capture_output=True)


def _root() -> bytes:
    """busybox's files as a tar, made different from every other image by a file of random bytes."""
    container = docker("create", engine.IMAGE)
    try:
        export = subprocess.run(["docker", "export", container], capture_output=True, check=True).stdout
    finally:
        docker("rm", container)
    with tempfile.TemporaryDirectory() as root:
        Path(root, "base.tar").write_bytes(export)
        Path(root, "unique").write_bytes(os.urandom(2_000_000))
        subprocess.run(["tar", "-C", root, "-rf", f"{root}/base.tar", "unique"], check=True)
        return Path(root, "base.tar").read_bytes()


class Throttle:
    """A way to a port of this machine that lets `limit` bytes of an answer through, and then no more until `open`."""

    def __init__(self, port: int, limit: int) -> None:
        self._target = port
        self._limit = limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.held = threading.Event()  # something is being held up
        self.open = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._there, args=(near, far), daemon=True).start()
            threading.Thread(target=self._back, args=(near, far), daemon=True).start()

    def _there(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for block in iter(lambda: near.recv(65536), b""):
                far.sendall(block)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _back(self, near: socket.socket, far: socket.socket) -> None:
        count = 0
        with contextlib.suppress(OSError), near, far:
            for block in iter(lambda: far.recv(16384), b""):
                count += len(block)
                if count > self._limit and not self.open.is_set():
                    self.held.set()
                    self.open.wait(60)
                near.sendall(block)
