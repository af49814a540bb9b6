"""Real MongoDB servers for tests: a standalone, replica sets, logins and TLS; all on 127.0.0.1."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from pymongo import MongoClient
from pymongo.errors import ConnectionFailure, OperationFailure

from tests.running import until
from tests.support import free_port, require

Kind = Literal["standalone", "replica"]

SMALL = (
    "--wiredTigerCacheSizeGB=0.25",
    "--wiredTigerEngineConfigString=log=(prealloc=false,file_max=16MB)",
    "--setParameter=diagnosticDataCollectionEnabled=false",
    "--nounixsocket",
)
PORT_TAKEN = 48
"""What mongod exits with when it cannot listen."""


@functools.cache
def _search() -> tuple[str | None, str]:
    script = Path(__file__).parent.parent / "scripts" / "mongod"
    found = subprocess.run([script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = found.stderr.strip()
    return (
        (found.stdout.strip(), "") if found.returncode == 0 else (None, said.splitlines()[-1] if said else "No mongod")
    )


def binary() -> str | None:
    """The mongod of this machine: on PATH, or in .tools/mongo, where scripts/mongod puts it if it can."""
    return _search()[0]


def need() -> None:
    """Skip the test, or fail, where there is no mongod."""
    found, reason = _search()
    require(found, reason)


@dataclass(frozen=True, slots=True)
class Login:
    """A user of the database `admin`, who may do everything."""

    name: str
    password: str


@dataclass(frozen=True, slots=True)
class Certificates:
    """The PEM files of a server for 127.0.0.1 and localhost, and of the authority that signed it."""

    authority: Path
    server: Path


def make_certificates(directory: Path) -> Certificates:
    """Make an authority and a server certificate with openssl."""
    require(shutil.which("openssl"), "openssl is needed")
    directory.mkdir(parents=True, exist_ok=True)

    def openssl(*arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    (directory / "extensions").write_text(
        "subjectAltName = IP:127.0.0.1, DNS:localhost\nbasicConstraints = critical, CA:FALSE\n"
        "keyUsage = critical, digitalSignature\nextendedKeyUsage = serverAuth, clientAuth\n"
        "subjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\n"
    )
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    may_sign = ["-addext", "keyUsage = critical, keyCertSign"]
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=Test CA", *may_sign, "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    signed_by = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions"]
    openssl("x509", "-req", "-in", "server.csr", *signed_by, "-out", "server.crt")
    server = directory / "server.pem"
    server.write_text((directory / "server.crt").read_text() + (directory / "server.key").read_text())
    return Certificates(authority=directory / "ca.pem", server=server)


class Mongod:
    """A mongod with a directory and a port that outlive its processes.

    It dies with the process that started it, however that one ends. As a context manager it starts, and leaves its log
    but not its data.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *options: str,
        login: Login | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        need()
        self.directory, self.login, self.certificates = directory, login, certificates
        self.paused = False
        self._port = port
        self._options = [*SMALL, *options]
        if login:
            self._options.append("--auth")
        if certificates:
            self._options += ["--tlsMode=requireTLS", "--tlsAllowConnectionsWithoutCertificates"]
            self._options += [f"--tlsCertificateKeyFile={certificates.server}", f"--tlsCAFile={certificates.authority}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None
        self._has_login = False

    def __enter__(self) -> Mongod:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory / "data", ignore_errors=True)

    @property
    def port(self) -> int:
        """Where it listens; known from the first start on."""
        assert self._port is not None
        return self._port

    @property
    def pid(self) -> int:
        """The running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process, be it paused."""
        return self._process is not None and self._process.poll() is None

    @property
    def uri(self) -> str:
        """For a connection to this server alone, with all that its login and its TLS need."""
        return self.uri_of("")

    def uri_of(self, database: str) -> str:
        """The same with a database."""
        parameters = {"directConnection": "true"}
        if self.login:
            parameters["authSource"] = "admin"
        if self.certificates:
            parameters |= {"tls": "true", "tlsCAFile": str(self.certificates.authority)}
        who = f"{quote(self.login.name, safe='')}:{quote(self.login.password, safe='')}@" if self.login else ""
        return f"mongodb://{who}127.0.0.1:{self.port}/{database}?{urlencode(parameters)}"

    def log(self) -> str:
        """What it has written."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def start(self) -> None:
        """Start it, again with what it had, and wait until it listens."""
        assert not self.running
        self._end(None)
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        if self._port is not None:
            assert self._launch(self._port), f"mongod did not start: {self.log()[-3000:]}"
        else:
            ports = iter(free_port, 0)
            self._port = next(port for port in ports if self._launch(port))
        if self.login and not self._has_login:
            self._add_login(self.login)
            self._has_login = True

    def _launch(self, port: int) -> bool:
        """Whether it listens on the port; no, if that is taken."""
        program = binary()
        assert program is not None
        log = self.directory / "log"
        seen = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            process = subprocess.Popen(
                [program, f"--dbpath={self.directory}/data", "--bind_ip=127.0.0.1", f"--port={port}", *self._options],
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._process, self._watch = process, _die_with_us(process.pid)

        def listens() -> bool:
            with log.open("rb") as lines:
                lines.seek(seen)
                return b"Waiting for connections" in lines.read()

        until(lambda: listens() or process.poll() is not None, 60, f"mongod in {self.directory}")
        if process.poll() is None:
            return True
        self._end(None)
        assert process.returncode == PORT_TAKEN, f"mongod ended with {process.returncode}: {self.log()[-3000:]}"
        return False

    def _add_login(self, login: Login) -> None:
        """As long as there is no user, everyone on this machine may add the first one."""
        tls: dict[str, Any] = {"tlsCAFile": str(self.certificates.authority)} if self.certificates else {}
        with MongoClient[Any]("127.0.0.1", self.port, directConnection=True, tls=bool(tls), **tls) as client:
            client.admin.command("createUser", login.name, pwd=login.password, roles=["root"])

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        if self.paused:
            self.resume()
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it where it is: it keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self.paused = True

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)
        self.paused = False

    def _end(self, number: signal.Signals | None) -> None:
        process, watch = self._process, self._watch
        self._process, self._watch, self.paused = None, None, False
        if process is None or watch is None:
            return
        if number is not None:
            process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            # Before anybody else can have its pid: until we have waited for it, that one stays its own.
            watch.kill()
            watch.communicate()
            process.wait()


def _die_with_us(pid: int) -> subprocess.Popen[bytes]:
    """A process that kills another one when this one has ended, of whatever: then there is an end of its input.

    (PR_SET_PDEATHSIG would follow the thread, not the process, and need code between fork and exec.)
    """
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; kill -9 "$1"', "sh", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class ReplicaSet:
    """One or three nodes; three survive the loss of any one of them, also again and again.

    As a context manager it starts, and leaves its logs but not its data.
    """

    name = "rs0"

    def __init__(self, directory: Path, nodes: Literal[1, 3] = 1, *options: str) -> None:
        quick_stop = "--setParameter=shutdownTimeoutMillisForSignaledShutdown=1000"  # as it comes it takes 15 s
        own = (f"--replSet={self.name}", "--oplogSize=64", quick_stop, *options)
        self.nodes = [Mongod(directory / f"node{number}", None, *own) for number in range(nodes)]
        self._initiated = False

    def __enter__(self) -> ReplicaSet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for node in self.nodes:
            shutil.rmtree(node.directory / "data", ignore_errors=True)

    @property
    def uri(self) -> str:
        """For a client that finds the primary by itself."""
        return self.uri_of("")

    def uri_of(self, database: str) -> str:
        """The same with a database."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"mongodb://{hosts}/{database}?replicaSet={self.name}"

    def start(self) -> None:
        """Start what does not run and wait for a writable primary."""
        self.start_dead()
        if not self._initiated:
            members = [{"_id": number, "host": f"127.0.0.1:{node.port}"} for number, node in enumerate(self.nodes)]
            settings = (
                {"electionTimeoutMillis": 1500, "heartbeatIntervalMillis": 500, "heartbeatTimeoutSecs": 2}
                if len(members) > 1
                else {}
            )
            with MongoClient[Any](self.nodes[0].uri) as client:
                client.admin.command("replSetInitiate", {"_id": self.name, "members": members, "settings": settings})
            self._initiated = True
        self.primary()

    def start_dead(self) -> None:
        """Start the nodes that do not run; see `settle` for when they take part again."""
        dead = [node for node in self.nodes if not node.running]
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(Mongod.start, dead))

    def kill(self) -> None:
        """kill -9 all nodes."""
        for node in self.nodes:
            node.kill()

    def primary(self, seconds: float = 30.0) -> Mongod:
        """The node that takes writes, as soon as there is one."""

        def look() -> Mongod | None:
            with MongoClient[Any](self.uri, serverSelectionTimeoutMS=seconds * 1000, socketTimeoutMS=2000) as client:
                try:
                    said = client.admin.command("hello")
                except ConnectionFailure:
                    return None
            ports = {f"127.0.0.1:{node.port}": node for node in self.nodes if node.running and not node.paused}
            return ports.get(said["me"]) if said["isWritablePrimary"] else None

        found: Mongod = until(look, seconds, "a primary")
        return found

    def states(self) -> list[str]:
        """What each node is to the primary, in their order: PRIMARY, SECONDARY, (not reachable/healthy) and so on."""
        with MongoClient[Any](self.primary().uri) as client:
            members = client.admin.command("replSetGetStatus")["members"]
        return [member["stateStr"] for member in sorted(members, key=lambda member: member["_id"])]

    def settle(self, seconds: float = 30.0) -> None:
        """Wait until there is one primary and all others follow it, by its word and by theirs."""

        def follows(node: Mongod) -> str | None:
            with MongoClient[Any](node.uri, serverSelectionTimeoutMS=1000, socketTimeoutMS=1000) as client:
                said = client.admin.command("hello")
            primary: str | None = said.get("primary")
            return primary if said["isWritablePrimary"] or said["secondary"] else None

        def whole() -> bool:
            with contextlib.suppress(ConnectionFailure, OperationFailure):
                leaders = {follows(node) for node in self.nodes}
                if len(leaders) == 1 and None not in leaders:
                    return sorted(self.states()) == ["PRIMARY"] + ["SECONDARY"] * (len(self.nodes) - 1)
            return False

        until(whole, seconds, "a whole replica set")


_shared: dict[Kind, Mongod | ReplicaSet] = {}
_lock = threading.Lock()


def shared(kind: Kind) -> Mongod | ReplicaSet:
    """The standalone or the replica set of one node that all tests of this process use; it is not for killing."""
    need()
    with _lock:
        if kind not in _shared:
            directory = Path(tempfile.mkdtemp(prefix=f"tesp-mongod-{kind}-"))
            server = Mongod(directory) if kind == "standalone" else ReplicaSet(directory)
            atexit.register(_remove, os.getpid(), server, directory)
            server.start()
            _shared[kind] = server
        return _shared[kind]


def _remove(owner: int, server: Mongod | ReplicaSet, directory: Path) -> None:
    if os.getpid() == owner:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)


def database_uri(kind: Kind = "standalone") -> str:
    """The URI of a new database on the shared server; it goes with the server, or earlier with `drop`."""
    return shared(kind).uri_of(f"tesp_{secrets.token_hex(8)}")


def drop(uri: str) -> None:
    """Drop the database that a URI names."""
    with MongoClient[Any](uri) as client:
        client.drop_database(client.get_default_database())


@contextlib.contextmanager
def database(kind: Kind = "standalone") -> Iterator[str]:
    """The URI of a new database on the shared server; it is dropped at the end."""
    uri = database_uri(kind)
    try:
        yield uri
    finally:
        drop(uri)
