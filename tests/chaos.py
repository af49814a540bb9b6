"""What the crash suite is made of: several services on one store and one site, and the faults that befall them.

A fault is chosen by the seed: what happens, when (at how many ended tasks), to whom and for how long. Nothing but
SIGKILL, SIGSTOP and cut connections is done, and only to processes that carry this cluster's mark.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from tesp_api.sites.processes import Process
from tests.carried import PLACES, Amqp, Place, remove_containers, write_settings
from tests.mongod import Mongod, ReplicaSet
from tests.rabbitmq import Broker
from tests.running import Service, until
from tests.support import free_port

MAX_ATTEMPTS = 10

SETTINGS = {
    "TESP_DISPATCH__TAKE_OVER": "2",
    "TESP_RETRY__BACKOFF": "0.5",
    "TESP_RETRY__MAX_ATTEMPTS": str(MAX_ATTEMPTS),
}

OF_THE_SITE: dict[str, object] = {
    "max_jobs": 4,
    "cancel_grace": 4.0,
}
"""Further keys of the site."""

ON_REPLICAS = ("kill replica", "pause replica", "kill all replicas", "be away till all jobs end", "cut clients")
ON_JOBS = ("kill runner", "kill job group", "pause runner", "cut Docker")
ON_STORE = ("kill primary", "pause primary", "cut store")

COSTS_AN_ATTEMPT = frozenset({"kill runner", "kill job group", "pause runner", "cut Docker"})
"""Faults that hit one job: only its attempt may fail for them."""


# Processes and their connections


@dataclass(frozen=True)
class Seen:
    """A process as /proc shows it."""

    pid: int
    cwd: str
    command: str


def marked(mark: str) -> Iterator[Seen]:
    """The living processes whose environment holds `mark`, in order of their ids."""
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda each: int(each.name)):
        with suppress(OSError):  # gone meanwhile, or a zombie
            if mark.encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:
                    yield Seen(int(entry.name), str((entry / "cwd").readlink()), command)


def cut(pid: int, chosen: Callable[[socket.socket], bool]) -> int:
    """Shut down the connections of another process that `chosen` picks; how many. Both of their ends see it at once.

    (A copy of the descriptor is taken by pidfd_getfd; what is done to it is done to the connection itself.)
    """
    count = 0
    with suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                count += _cut_one(process, entry, chosen)
        finally:
            os.close(process)
    return count


def _cut_one(process: int, entry: Path, chosen: Callable[[socket.socket], bool]) -> bool:
    with suppress(OSError):
        if str(entry.readlink()).startswith("socket:"):
            with socket.socket(fileno=_copy(process, int(entry.name))) as connection:
                if chosen(connection):
                    connection.shutdown(socket.SHUT_RDWR)
                    return True
    return False


def _copy(process: int, descriptor: int) -> int:
    number = 438  # pidfd_getfd, the same on all machines
    libc = ctypes.CDLL(None, use_errno=True)
    copy: int = libc.syscall(number, process, descriptor, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return copy


def _peer(connection: socket.socket) -> Any:
    """The other end: (address, port), a path, or None."""
    try:
        return connection.getpeername()
    except OSError:
        return None


# The cluster


class Replica(Service):
    """One of several services on one data directory."""

    def __init__(self, directory: Path, number: int, port: int, variables: Mapping[str, str]) -> None:
        super().__init__(directory, port=port, **variables)
        self.log = directory / f"replica{number}.log"
        self.number = number
        self.url: str | None = None
        self.paused = False

    def start(self, *options: str) -> None:
        super().start(*options)
        self.url = str(self.http.base_url)

    def kill(self) -> None:
        self.url, self.paused = None, False  # its port may be another's soon
        super().kill()

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)
        self.paused = False


class Cluster:
    """Replicas with one store and one site, below `directory`. Leaving it ends all that it ever started."""

    def __init__(
        self, directory: Path, store: str, replicas: int = 3, *, carrier: str = "embedded", **variables: str
    ) -> None:
        self.directory = directory
        self._ports = [free_port() for _ in range(replicas)]
        self.place = PLACES[carrier](directory, self._ports[0], **OF_THE_SITE)
        self.place.keys["status"] = {"poll_interval": 1.0, "max_polls": self.place.patience}
        self.shared = self.place.shared
        self.mark = f"TMPDIR={self.place.temporary}"
        self.set = ReplicaSet(directory / "mongo", 3) if store == "mongo" else None
        self._variables = variables
        self.replicas: list[Replica] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for path in (self.place.temporary, self.shared):
            path.mkdir(parents=True)
            path.chmod(0o777)
        self._stack.callback(self._end_all)
        variables = {**SETTINGS, "TMPDIR": str(self.place.temporary), **self._variables}
        variables["TESP_DISPATCH__LEASE"] = str(self.place.lease)
        if self.set is not None:
            self._stack.enter_context(self.set)
            variables["TESP_DB__MONGODB_URI"] = self.set.uri_of("tesp")
        self._stack.callback(self.place.stop)
        self.place.start()
        write_settings(self.directory / "settings.toml", [self.place])
        self.replicas = [Replica(self.directory, number, port, variables) for number, port in enumerate(self._ports)]
        for replica in self.replicas:
            replica.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _end_all(self) -> None:
        for replica in self.replicas:
            replica.kill()
        for seen in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(seen.pid, signal.SIGKILL)
        remove_containers(self.shared)

    def stop(self) -> None:
        """End the replicas politely."""
        for replica in self.replicas:
            replica.stop()

    # Asking

    def ask(self, method: str, path: str, *, timeout: float = 4.0, seconds: float = 120.0, **options: Any) -> Any:
        """The document that the first replica gives which answers; others are tried as long as there is none."""
        deadline, turn = time.monotonic() + seconds, random.randrange(len(self.replicas))
        while time.monotonic() < deadline:
            turn += 1
            url = self.replicas[turn % len(self.replicas)].url
            if url is not None:
                with suppress(httpx.TransportError):
                    answer = httpx.request(
                        method, f"{url}/ga4gh/tes/v1{path}", timeout=timeout, verify=False, **options
                    )
                    assert answer.status_code == 200 or answer.status_code >= 500, f"{path}: {answer.text}"
                    if answer.status_code == 200:
                        return answer.json()
            time.sleep(0.05)
        raise AssertionError(f"no replica answered {method} {path} within {seconds} s")

    def task(self, task_id: str, view: str = "FULL") -> dict[str, Any]:
        """A task as its document."""
        document: dict[str, Any] = self.ask("GET", f"/tasks/{task_id}", params={"view": view})
        return document

    def states(self) -> dict[str, str]:
        """The state of every stored task."""
        page = self.ask("GET", "/tasks", params={"page_size": "2000"}, timeout=8.0)
        assert "next_page_token" not in page
        return {task["id"]: task["state"] for task in page["tasks"]}

    # Looking at the node

    def runners(self) -> list[Seen]:
        """The living runners, one for each job."""
        return [
            seen
            for seen in marked(self.mark)
            if "runner.pyz" in seen.command
            and "python" in seen.command.split()[0]
            and seen.cwd.startswith(str(self.place.staging))
        ]

    def job_of(self, runner: Seen) -> str:
        """The id of the job that a runner carries out."""
        return Path(runner.cwd).parent.name


# Faults


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens after `at` tasks have ended and `delay` more seconds. `who` (0 to 1) picks among those who can be
    hit, and what was hit is whole again `pause` seconds later."""

    kind: str
    at: int
    delay: float
    who: float
    pause: float


def draw(seed: int, count: int, tasks: int, place: Place, others: tuple[str, ...]) -> list[Fault]:
    """`count` faults, each kind as often as any other or once more, those of the place before others; spread over nine
    tenths of the run."""
    first, kinds = place.faults, (*others, *place.faults)
    chance = random.Random(seed)
    drawn = [kind for _ in range(count // len(kinds)) for kind in kinds]
    drawn += chance.sample(first, min(len(first), count - len(drawn)))
    drawn += chance.sample(others, max(0, count - len(drawn)))
    chance.shuffle(drawn)
    places = sorted(chance.randrange(1, max(2, tasks * 3 // 4)) for _ in drawn)
    return [
        Fault(kind=kind, at=at, delay=chance.uniform(0, 0.6), who=chance.random(), pause=_pause(kind, chance, place))
        for kind, at in zip(drawn, places, strict=True)
    ]


def _pause(kind: str, chance: random.Random, place: Place) -> float:
    if kind == "pause replica":  # it must sleep through its lease
        return place.lease + chance.uniform(0.5, 3)
    if kind == "stop broker":
        return 20.0
    if kind == "pause broker":
        return chance.uniform(2, 12)
    if kind == "pause primary":
        return chance.uniform(2, 6)
    if kind == "pause runner":
        return chance.choice([chance.uniform(1, 5), place.patience + 5])
    return chance.choice([0.0, chance.uniform(0.5, 5)])


class Storm:
    """Carries out faults on a cluster, and the repairs that follow them by themselves. Leaving it waits for these."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pool = ThreadPoolExecutor(8)
        self._repairs: dict[str, Future[None]] = {}
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.victims: dict[str, str] = {}
        """Job ids that were hit on the node -> by what."""
        self.story: list[str] = []
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def befall(self, fault: Fault) -> None:
        """Carry out the fault. It waits for a repair that must come first."""
        happened = self._actions()[fault.kind](fault)
        (self.done if happened else self.missed)[fault.kind] += 1
        self._tell(f"{fault.kind}: {happened or 'nobody there'}, for {fault.pause:.1f} s, after {fault.at} tasks")

    def _actions(self) -> dict[str, Callable[[Fault], str]]:
        """What each kind does; it says whom it hit, or nothing."""
        return {
            "kill replica": self._kill_replica,
            "pause replica": self._pause_replica,
            "kill all replicas": self._kill_all,
            "be away till all jobs end": self._be_away,
            "cut clients": self._cut_clients,
            "cut Pulsar": self._cut_pulsar,
            "kill Pulsar": self._kill_pulsar,
            "kill Pulsar's worker": self._kill_worker,
            "kill runner": self._kill_runner,
            "kill job group": self._kill_group,
            "pause runner": self._pause_runner,
            "cut Docker": self._cut_docker,
            "kill broker": self._kill_broker,
            "stop broker": self._stop_broker,
            "pause broker": self._pause_broker,
            "poison updates": self._poison_updates,
            "kill primary": self._kill_primary,
            "pause primary": self._pause_primary,
            "cut store": self._cut_store,
        }

    def _tell(self, line: str) -> None:
        self.story.append(f"{time.monotonic() - self._began:6.1f} s  {line}")
        print(self.story[-1], flush=True)

    # Repairs

    def wait(self, what: str = "") -> None:
        """Until everything whose name begins so is whole again."""
        for name, repair in list(self._repairs.items()):
            if name.startswith(what):
                repair.result()

    def _later(self, pause: float, name: str, action: Callable[[], None]) -> None:
        def repair() -> None:
            time.sleep(pause)
            action()
            self._tell(f"{name} is whole again")

        self._repairs[name] = self._pool.submit(repair)

    # Services

    def _replica(self, fault: Fault) -> Replica:
        replica = self._cluster.replicas[int(fault.who * len(self._cluster.replicas))]
        self.wait(f"replica {replica.number}")
        return replica

    def _kill_replica(self, fault: Fault) -> str:
        replica = self._replica(fault)
        replica.kill()
        self._later(fault.pause, f"replica {replica.number}", replica.start)
        return f"replica {replica.number}"

    def _pause_replica(self, fault: Fault) -> str:
        replica = self._replica(fault)
        replica.pause()
        self._later(fault.pause, f"replica {replica.number}", replica.resume)
        return f"replica {replica.number}"

    def _kill_all(self, fault: Fault) -> str:
        self.wait("replica")
        for replica in self._cluster.replicas:
            replica.kill()
        for replica in self._cluster.replicas:
            self._later(fault.pause, f"replica {replica.number}", replica.start)
        return "all"

    def _be_away(self, fault: Fault) -> str:
        """Whatever the jobs report meanwhile, nobody of ours hears."""
        self.wait("replica")
        for replica in self._cluster.replicas:
            replica.kill()
        count = len(self._cluster.runners())
        _soon(lambda: not self._cluster.runners())
        for replica in self._cluster.replicas:
            self._later(fault.pause, f"replica {replica.number}", replica.start)
        return f"{count} jobs"

    def _cut_clients(self, fault: Fault) -> str:
        replica = self._replica(fault)
        port = replica.http.base_url.port
        return self._cut_when_there(
            replica,
            lambda link: link.family == socket.AF_INET and link.getsockname()[1] == port and _peer(link) is not None,
        )

    def _cut_pulsar(self, fault: Fault) -> str:
        place = self._cluster.place
        return self._cut_when_there(self._replica(fault), lambda link: place.is_reached_by(_peer(link)))

    def _cut_store(self, fault: Fault) -> str:
        assert self._cluster.set is not None
        ports = {node.port for node in self._cluster.set.nodes}
        return self._cut_when_there(
            self._replica(fault), lambda link: link.family == socket.AF_INET and (_peer(link) or (0, 0))[1] in ports
        )

    def _cut_when_there(self, replica: Replica, chosen: Callable[[socket.socket], bool]) -> str:
        """Cut them; where there are none now (they are short), a few seconds are given."""
        count = _soon(lambda: cut(replica.pid, chosen))
        return f"{count} of replica {replica.number}" if count else ""

    # The node

    def _kill_pulsar(self, fault: Fault) -> str:
        group = self._pulsar()
        if group is None or not self._cluster.place.kill_pulsar():
            return ""
        self._later(fault.pause, "Pulsar", self._cluster.place.start_pulsar)
        return f"process group {group}"

    def _kill_worker(self, fault: Fault) -> str:
        """One process of Pulsar's, be it gunicorn's master or its worker."""
        group = self._pulsar()
        members = [seen.pid for seen in marked(self._cluster.mark) if group and _group_of(seen.pid) == group]
        if not members:
            return ""
        victim = members[int(fault.who * len(members))]
        os.kill(victim, signal.SIGKILL)
        if victim == group:
            self._later(fault.pause, "Pulsar", self._cluster.place.start_pulsar)
        return "master" if victim == group else "worker"

    def _pulsar(self) -> int | None:
        """Pulsar's process group; one that has just been hit is given time to come back."""
        self.wait("Pulsar")
        return _soon(self._cluster.place.pulsar)

    def _hit(self, fault: Fault, action: Callable[[Seen], object]) -> str:
        """Do it to a runner that can be hit."""

        def hit() -> str | None:
            found = self._cluster.runners()
            if not found:
                return None
            runner = found[int(fault.who * len(found))]
            job_id = self._cluster.job_of(runner)
            with suppress(ProcessLookupError):
                if action(runner) != 0:
                    self.victims[job_id] = fault.kind
                    return job_id
            return None

        return _soon(hit) or ""

    def _kill_runner(self, fault: Fault) -> str:
        return self._hit(fault, lambda runner: os.kill(runner.pid, signal.SIGKILL))

    def _kill_group(self, fault: Fault) -> str:
        return self._hit(fault, lambda runner: os.killpg(os.getpgid(runner.pid), signal.SIGKILL))

    def _pause_runner(self, fault: Fault) -> str:
        def pause(runner: Seen) -> bool:
            process = Process.of(runner.pid)  # by then its id may be another's
            if process is not None:
                process.signal(signal.SIGSTOP)
                self._later(fault.pause, f"runner {runner.pid}", lambda: process.signal(signal.SIGCONT))
            return process is not None

        return self._hit(fault, pause)

    def _cut_docker(self, fault: Fault) -> str:
        return self._hit(fault, lambda runner: cut(runner.pid, lambda link: str(_peer(link)).endswith("docker.sock")))

    # The broker

    def _broker(self) -> Broker:
        self.wait("broker")
        place = self._cluster.place
        assert isinstance(place, Amqp)
        return place.broker

    def _kill_broker(self, fault: Fault) -> str:
        broker = self._broker()
        broker.kill()
        self._later(fault.pause, "broker", broker.start)
        return "kill -9"

    def _stop_broker(self, fault: Fault) -> str:
        broker = self._broker()
        broker.stop()
        self._later(fault.pause, "broker", broker.start)
        return "in good order"

    def _pause_broker(self, fault: Fault) -> str:
        broker = self._broker()
        broker.pause()
        self._later(fault.pause, "broker", broker.resume)
        return f"port {broker.port}"

    def _poison_updates(self, fault: Fault) -> str:
        """Letters for us that nobody can make sense of."""
        self._broker()
        place = self._cluster.place
        assert isinstance(place, Amqp)
        place.poison("status_update")
        return "the queue of status updates"

    # The store

    def _primary(self) -> Mongod:
        """The primary of a whole set: never is more than one node out."""
        assert self._cluster.set is not None
        self.wait("mongod")
        self._cluster.set.settle(60)
        return self._cluster.set.primary()

    def _kill_primary(self, fault: Fault) -> str:
        node = self._primary()
        node.kill()
        self._later(fault.pause, f"mongod {node.port}", node.start)
        return f"mongod {node.port}"

    def _pause_primary(self, fault: Fault) -> str:
        node = self._primary()
        node.pause()
        self._later(fault.pause, f"mongod {node.port}", node.resume)
        return f"mongod {node.port}"


T = TypeVar("T")


def _soon(look: Callable[[], T | None], seconds: float = 8.0) -> T | None:
    """What it returns as soon as that is true; None if it does not come to that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.005)
    return None


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def settle(cluster: Cluster, storm: Storm) -> None:
    """All is whole again."""
    storm.wait()
    if cluster.set is not None:
        cluster.set.settle(60)
    for replica in cluster.replicas:
        until(partial(_is_ready, replica), 60, f"replica {replica.number}")


def _is_ready(replica: Replica) -> bool:
    return replica.http.get("/readyz").status_code == 200
