"""Sites as an administrator sets them up, one class for each carrier: what settings.toml says, and what runs behind it.

Each part can be killed and started again. All that a place starts carries its `TMPDIR`, by which it is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import aio_pika

from tests.engine import docker_host
from tests.pulsars import PulsarMain, PulsarServer
from tests.rabbitmq import Broker, need_rabbitmq
from tests.running import Service, until
from tests.support import free_port, require


class Place:
    """One site, named after its carrier, of a service at `port`. `keys` are further lines of its section of
    settings.toml.

    The base is the local site, behind which there is nothing.
    """

    carrier = "local"
    lease = 3.5
    """Seconds; short, so that a test need not wait for a take-over."""

    patience = 25
    """Seconds of silence after which the crash suite gives an attempt up: more than what lies between may be away."""

    reports = False
    """Whether its jobs report over HTTP; else their tails come as files."""

    faults: tuple[str, ...] = ()
    """What the crash suite can do to it (tests/chaos.py)."""

    def __init__(self, directory: Path, port: int, **keys: object) -> None:
        self.directory, self.name = directory, self.carrier
        self.url = f"http://127.0.0.1:{port}"
        self.keys = {"name": self.name, "carrier": self.carrier, **keys}
        self.shared = directory / "shared"
        self.temporary = directory / "tmp"

    @property
    def staging(self) -> Path:
        """Where its jobs lie."""
        return self.directory / "data" / "sites" / self.name

    def start(self) -> None:
        """Start what stands behind it."""

    def stop(self) -> None:
        """End what stands behind it."""

    def pulsar(self) -> int | None:
        """The process group of its Pulsar, if that lives."""
        return None

    def processes(self) -> dict[str, list[int]]:
        """The processes of each part behind the site."""
        group = self.pulsar()
        return {"Pulsar": members(group)} if group is not None else {}

    def is_reached_by(self, peer: object) -> bool:
        """Whether a connection of the service whose other end is this leads to its Pulsar."""
        return False

    def kill_pulsar(self) -> bool:
        """kill -9 its Pulsar, but no job; whether there was one."""
        group = self.pulsar()
        with contextlib.suppress(ProcessLookupError):
            if group is not None:
                os.killpg(group, signal.SIGKILL)
                return True
        return False

    def start_pulsar(self) -> None:
        """Bring a killed Pulsar back, unless it comes by itself."""

    def kills(self) -> list[Callable[[], object]]:
        """Each part behind the site, killed with -9 and brought back."""
        return [self._kill_and_start_pulsar]

    def _kill_and_start_pulsar(self) -> None:
        self.kill_pulsar()
        self.start_pulsar()


class Embedded(Place):
    """The service's own Pulsar."""

    carrier = "embedded"
    faults = ("cut Pulsar", "kill Pulsar", "kill Pulsar's worker")

    @property
    def staging(self) -> Path:
        return super().staging / "staging"

    def is_reached_by(self, peer: object) -> bool:
        return str(peer).endswith("p.sock")

    def pulsar(self) -> int | None:
        try:
            pid: int = json.loads((self.staging.parent / "pulsar.pid").read_text())["pid"]
            return pid if os.getpgid(pid) == pid else None
        except (OSError, ValueError):
            return None


class Separate(Place):
    """A Pulsar of the administrator's."""

    server: PulsarServer | PulsarMain

    @property
    def staging(self) -> Path:
        return self.server.staging

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.kill_pulsar()

    def pulsar(self) -> int | None:
        process = self.server.process
        return process.pid if process is not None and process.poll() is None else None

    def kill_pulsar(self) -> bool:
        there = self.pulsar() is not None
        if self.server.process is not None:
            with contextlib.suppress(ProcessLookupError):  # what is left of a half-killed one goes too, for its port
                os.killpg(self.server.process.pid, signal.SIGKILL)
            self.server.process.wait()
        return there

    def start_pulsar(self) -> None:
        self.kill_pulsar()
        self.server.start()

    @property
    def variables(self) -> dict[str, str]:
        """What is added to Pulsar's environment."""
        return {"TMPDIR": str(self.temporary)}


class Rest(Separate):
    """A `pulsar-serve`."""

    carrier = "rest"
    faults = ("cut Pulsar", "kill Pulsar", "kill Pulsar's worker")

    def __init__(self, directory: Path, port: int, **keys: object) -> None:
        super().__init__(directory, port, **keys)
        require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
        self.server = server = PulsarServer(directory / self.name, variables=self.variables)
        self.keys |= {"url": server.url, "private_token": server.token}
        self._port = server.port

    def is_reached_by(self, peer: object) -> bool:
        return peer == ("127.0.0.1", self._port)


class Amqp(Separate):
    """A `pulsar-main` behind a RabbitMQ."""

    carrier = "amqp"
    lease = 20.0
    patience = 45
    faults = ("cut Pulsar", "kill Pulsar", "kill broker", "stop broker", "pause broker", "poison updates")

    def __init__(self, directory: Path, port: int, **keys: object) -> None:
        super().__init__(directory, port, **keys)
        need_rabbitmq()
        self.broker = Broker(directory / f"{self.name}-broker")
        self.server = server = PulsarMain(directory / self.name, "amqp/app.yml", AMQP_URL=self.broker.url + "/")
        server.variables |= self.variables
        self.keys |= {"amqp_url": self.broker.url}

    def start(self) -> None:
        self.broker.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self.broker.remove()

    def processes(self) -> dict[str, list[int]]:
        return {**super().processes(), "broker": members(self.broker.group)}

    def is_reached_by(self, peer: object) -> bool:
        return peer == ("127.0.0.1", self.broker.port)

    def kills(self) -> list[Callable[[], object]]:
        return [*super().kills(), self._kill_and_start_broker]

    def _kill_and_start_broker(self) -> None:
        self.broker.kill()
        self.broker.start()

    def poison(self, box: str) -> None:
        """Put letters into a queue of Pulsar's (`setup`, `status_update`, ...) that nobody can make sense of."""
        asyncio.run(_poison(self.broker.url, f"pulsar__{box}"))


class Relay(Separate):
    """A `pulsar-main` that calls the service's relay; it must know the service's port before."""

    carrier = "relay"
    lease = 20.0
    patience = 45
    reports = True
    faults = ("kill Pulsar",)

    def __init__(self, directory: Path, port: int, **keys: object) -> None:
        super().__init__(directory, port, **keys)
        require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
        password = secrets.token_urlsafe(16)
        names = {"RELAY_URL": self.url, "USER": self.name, "PASSWORD": password}
        self.server = server = PulsarMain(directory / self.name, "relay/app.yml", **names)
        server.variables |= self.variables
        self.keys |= {"relay_password": password}


POISON = (b"\xff\xfe", b"{", b"null", b"[]", b"7", b"{}", b'{"job_id": 7}', b'{"job_id": "../x", "status": []}')


async def _poison(url: str, queue: str) -> None:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        for body in POISON:
            letter = aio_pika.Message(body, content_type="application/json", delivery_mode=2)
            await channel.default_exchange.publish(letter, routing_key=queue)


PLACES: Mapping[str, type[Place]] = {each.carrier: each for each in (Place, Embedded, Rest, Amqp, Relay)}


def write_settings(path: Path, places: Sequence[Place], **sections: Mapping[str, object]) -> None:
    """A settings.toml with these sites, the engine of the tests, and `sections` of other keys."""
    sections = {"container": {"runtime": "docker", "docker_host": docker_host()}, **sections}
    if reporting := [place for place in places if place.reports]:
        sections["server"] = {"public_url": reporting[0].url}
    lines = []
    for name, keys in sections.items():
        lines += [f"[default.{name}]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    for place in places:
        root = {"path": str(place.shared), "mount": True}
        keys = {"file_roots": [root], **place.keys}
        lines += ["[[default.sites]]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines) + "\n")


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


class Carried:
    """A service with its places below `directory`. Leaving it ends all."""

    def __init__(self, directory: Path, *carriers: str, **keys: object) -> None:
        require(docker_host(), "no Docker engine with busybox")
        self.directory = directory
        self.shared, self.temporary = directory / "shared", directory / "tmp"
        for path in (self.shared, self.temporary):
            path.mkdir(parents=True)
            path.chmod(0o777)
        port = free_port()
        self.places = [PLACES[carrier](directory, port, **keys) for carrier in carriers]
        self.service = Service(directory, port=port, TMPDIR=str(self.temporary))
        self._stack = ExitStack()

    @property
    def place(self) -> Place:
        """The only place."""
        (place,) = self.places
        return place

    def __enter__(self) -> Self:
        write_settings(self.directory / "settings.toml", self.places)
        with ExitStack() as stack:
            for place in self.places:
                stack.callback(place.stop)
                place.start()
            stack.callback(self._remove_containers)
            stack.callback(self.service.stop)
            self.service.start()
            until(lambda: self.service.http.get("/readyz").is_success, 60, "the service is ready")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _remove_containers(self) -> None:
        remove_containers(self.shared)


def remove_containers(shared: Path) -> None:
    """Remove the containers of tasks which have this directory."""
    ours = ["--filter", "label=tesp.task", "--filter", f"volume={shared}"]
    left = subprocess.run(["docker", "ps", "-aq", *ours], capture_output=True, text=True).stdout.split()
    if left:
        subprocess.run(["docker", "rm", "-f", *left], capture_output=True)


def containers(task_id: str) -> list[str]:
    """The containers of a task."""
    command = ["docker", "ps", "-aq", "--filter", f"label=tesp.task={task_id}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(entry.name)) == group:
                found.append(int(entry.name))
    return found


class Gate:
    """A web server that keeps whoever comes waiting until it is opened: a transfer that is under way."""

    def __init__(self) -> None:
        gate = self
        self.came = threading.Event()
        self.opened = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                gate.came.set()
                gate.opened.wait()
                with contextlib.suppress(OSError):
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    self.send_response(200)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            do_GET = do_HEAD = do_PUT = do_POST = _serve

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/file"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
