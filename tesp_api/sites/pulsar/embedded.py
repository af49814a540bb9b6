"""A Pulsar of our own: a child process on a unix socket in a private directory, for those who have no Pulsar.

It is a real `pulsar-serve`, watched over by one service process: the one that holds DIR/owner.lock. Other processes on
the same directory only use it, and take over when that lock is free. The Pulsar itself holds DIR/pulsar.lock, inherited
at its start, so that there can never be two on one directory. When its service is killed it stays, and the next
service adopts it.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tesp_api.errors import SettingsError, SiteError, SiteUnavailable
from tesp_api.runner import job
from tesp_api.runner.bundle import Bundle
from tesp_api.sites import SiteFacts
from tesp_api.sites.processes import PASSED_ON, Process, replace
from tesp_api.sites.pulsar.messages import UNSAFE_PATH, check_id
from tesp_api.sites.pulsar.rest import RestCarrier
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.sites.watch import JobFiles, Watch
from tesp_api.task import Observation, Phase

log = logging.getLogger(__name__)

LONGEST: Final = 80
"""Longest path of the directory: below it lie unix sockets (ours, gunicorn's), whose paths end at 107 bytes."""

BOOT: Final = 30.0
"""Seconds within which a Pulsar must answer after its start."""

ORPHANED: Final = 3.0
"""Seconds that the workers of a dead Pulsar have to end by themselves. They notice its death in one second, but then
they wait for their connections, for some of them without an end."""

BACKOFF: Final = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses in seconds after a Pulsar died early, one after the other."""

LOG_BYTES: Final = 10 * 1024 * 1024
"""The log of Pulsar is moved to `pulsar.log.1` at a start when it is longer than this."""


class EmbeddedPulsar:
    """The Pulsar in `directory`: kept running while this is entered. `ready()` waits for it to answer."""

    def __init__(self, directory: Path, *, stop_within: float = 5.0) -> None:
        self.directory = Path(directory).absolute()
        self._stop_within = stop_within
        self._root = self.directory  # or its plain, short alias
        self._token = ""
        self._answers = asyncio.Event()
        self._owner: int | None = None
        self._server: Process | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._health: RestCarrier | None = None

    @property
    def socket(self) -> str:
        """The unix socket; known once this is entered."""
        return str(self._root / "p.sock")

    @property
    def token(self) -> str:
        """The private token; known once this is entered."""
        return self._token

    @property
    def pid(self) -> int | None:
        """The process id of the server if this process watches over it."""
        return self._server.pid if self._server is not None else None

    async def ready(self, within: float = 10.0) -> None:
        """Wait until it answers; SiteUnavailable if that takes longer."""
        if self._answers.is_set():
            return
        try:
            async with asyncio.timeout(within):
                await self._answers.wait()
        except TimeoutError:
            raise SiteUnavailable(
                f"The embedded Pulsar is not up yet; its log is {self.directory / 'pulsar.log'}."
            ) from None

    async def __aenter__(self) -> Self:
        _check_installed()
        try:
            await asyncio.to_thread(self._prepare)
        except OSError as error:
            raise SettingsError(f"The embedded Pulsar cannot use the directory {self.directory}: {error}") from error
        self._health = RestCarrier(private_token=self.token, uds=self.socket, timeout=2.0)
        await self._health.__aenter__()
        self._keeper = asyncio.create_task(self._keep(), name="embedded Pulsar")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._answers.clear()
        if self._health is not None:
            await self._health.__aexit__(None, None, None)
        if self._server is not None:
            try:
                await self._stop(self._server)
            except OSError as error:
                log.warning("The embedded Pulsar stays for the next start, as it could not be stopped: %s", error)
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    # The directory

    def _prepare(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)  # gunicorn opens its socket to everybody
        lock = os.open(self.directory / "prepare.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._root = _alias(self.directory) if _needs_alias(self.directory) else self.directory
            self._token = self._read_token()
            self._link_python()
            settings = _INI.format(root=self._root, token=self.token)
            replace(self.directory / "server.ini", settings.encode("ascii"))
        finally:
            os.close(lock)

    def _read_token(self) -> str:
        path = self.directory / "token"
        with suppress(FileNotFoundError):
            if token := path.read_text("ascii").strip():
                return token
        token = secrets.token_urlsafe(32)
        replace(path, token.encode("ascii"))
        return token

    def _link_python(self) -> None:
        """`python3` for the jobs is the interpreter that runs us, also where that is called `python3.12` only."""
        folder = self.directory / "bin"
        folder.mkdir(mode=0o700, exist_ok=True)
        link = folder / "python3"
        if not link.is_symlink() or os.readlink(link) != sys.executable:  # noqa: PTH115 - as text
            link.unlink(missing_ok=True)
            link.symlink_to(sys.executable)

    # Keeping it alive

    async def _keep(self) -> None:
        deaths = 0
        while True:
            try:
                if not self._own():
                    await self._watch_foreign()
                    continue
                await self._find_or_start()
                lived = await self._watch()
                deaths = 0 if lived > 60 else deaths + 1
            except (OSError, SiteError) as error:
                log.error("The embedded Pulsar could not be started: %s", error)
                deaths += 1
            pause = BACKOFF[min(deaths, len(BACKOFF)) - 1] if deaths else BACKOFF[0]
            await asyncio.sleep(pause)

    def _own(self) -> bool:
        """Whether this process is the one that watches over the Pulsar."""
        if self._owner is None:
            fd = os.open(self.directory / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _lock(fd):
                os.close(fd)
                return False
            self._owner = fd
        return True

    async def _watch_foreign(self) -> None:
        if await self._is_well():
            self._answers.set()
        else:
            self._answers.clear()
        await asyncio.sleep(1.0 if self._answers.is_set() else 0.1)

    async def _find_or_start(self) -> None:
        """Set `_server` to a Pulsar that answers: one that was left over, or a new one."""
        lock = os.open(self.directory / "pulsar.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(lock) and await self._adopt(lock):
                return
            self._start(lock)
        finally:
            os.close(lock)
        assert self._server is not None, "a Pulsar was started"
        started = time.monotonic()
        while not self._server.gone and not await self._is_well():
            if time.monotonic() - started > BOOT:
                await self._stop(self._server)
                raise SiteUnavailable(f"it did not answer within {BOOT:.0f} s")
            await asyncio.sleep(0.02)

    async def _adopt(self, lock: int) -> bool:
        """Make the Pulsar that holds the lock ours, True; or have the lock free, False."""
        started = alone = time.monotonic()
        left = None
        while time.monotonic() - started < BOOT and time.monotonic() - alone < ORPHANED:
            if _lock(lock):
                return False  # it was on its way out
            left = self._left_over()
            if left is not None:
                alone = time.monotonic()
            if left is not None and await self._is_well():
                log.info("Adopted the embedded Pulsar that was left over (process %s).", left.pid)
                left.note(self.directory / "pulsar.pid")
                self._server = left  # our own child, too, if it could not be noted at its start
                return True
            await asyncio.sleep(0.1)
        if left is not None:
            log.warning("The embedded Pulsar that was left over (process %s) does not answer; it is killed.", left.pid)
            await self._stop(left)
        await self._free(lock, within=ORPHANED if left is not None else 0.0)
        return False

    def _left_over(self) -> Process | None:
        """The master of a Pulsar that lives."""
        return Process.noted(self.directory / "pulsar.pid") or _listener(self.socket)

    async def _free(self, lock: int, within: float) -> None:
        """Have the lock of a Pulsar that has no master any more: who still holds it after `within` is killed."""
        killed, deadline = False, time.monotonic() + within
        while not _lock(lock):
            if time.monotonic() > deadline and killed:
                raise SiteUnavailable("what was left over of the last one keeps pulsar.lock")
            if time.monotonic() > deadline:
                killed, deadline = True, time.monotonic() + self._stop_within
                for each in _holders(lock):
                    log.warning("Process %s, left over of an embedded Pulsar that died, is killed.", each.pid)
                    each.signal(signal.SIGKILL)
            await asyncio.sleep(0.05)

    def _start(self, lock: int) -> None:
        if self._root != self.directory:
            self._root = _alias(self.directory)
        path = self.directory / "pulsar.log"
        with suppress(FileNotFoundError):
            if path.stat().st_size > LOG_BYTES:
                path.rename(path.with_name("pulsar.log.1"))
        (self.directory / "p.sock").unlink(missing_ok=True)
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "pulsar.scripts.serve", str(self._root / "server.ini")],
                cwd=self._root,  # it makes its `dependencies` there
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=(lock,),
                start_new_session=True,  # a Ctrl-C in the service's terminal is not for it
            )
        finally:
            os.close(out)
        self._server = Process.of(self._child.pid) or Process(self._child.pid, 0)
        self._server.note(self.directory / "pulsar.pid")

    def _environment(self) -> dict[str, str]:
        names = (*PASSED_ON, "PYTHONPATH", "VIRTUAL_ENV")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        folders = [str(Path(sys.executable).parent), str(self._root / "bin"), environment.get("PATH", os.defpath)]
        # gunicorn keeps a control socket in the home directory
        return environment | {"HOME": str(self._root), "PATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}

    async def _watch(self) -> float:
        """Wait for the death of the server; how long it lived."""
        server, started, looked = self._server, time.monotonic(), time.monotonic()
        assert server is not None, "there is a server to watch"
        if not server.gone:
            self._answers.set()
        while not server.gone:
            await asyncio.sleep(0.1)
            if self._root != self.directory and time.monotonic() - looked > 5:
                looked = time.monotonic()
                with suppress(OSError):  # then the next time
                    _alias(self.directory)  # what cleans /tmp may have taken it
        self._answers.clear()
        await self._reap(server)
        lived = time.monotonic() - started
        log.warning("The embedded Pulsar died after %.0f s; its log is %s.", lived, self.directory / "pulsar.log")
        self._server = self._child = None
        return lived

    async def _is_well(self) -> bool:
        try:
            assert self._health is not None, "entered"
            return await self._health.version() != ""
        except SiteError:
            return False

    async def _stop(self, server: Process) -> None:
        """End it: politely, then not. Jobs stay; they are in process groups of their own."""
        server.signal(signal.SIGTERM)
        if not await self._left(server, self._stop_within):
            with suppress(ProcessLookupError):
                if server.alive and os.getpgid(server.pid) == server.pid:
                    os.killpg(server.pid, signal.SIGKILL)
            server.signal(signal.SIGKILL)
            await self._left(server, self._stop_within)
        (self.directory / "pulsar.pid").unlink(missing_ok=True)
        self._server = self._child = None

    async def _left(self, server: Process, within: float) -> bool:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            if server.gone:
                await self._reap(server)
                return True
            await asyncio.sleep(0.02)
        return False

    async def _reap(self, server: Process) -> None:
        """Take the exit code of a dead child of ours. Its last threads may take a moment longer than it; what takes
        longer than that keeps nobody from going on, and is reaped by the start of the next one."""
        child = self._child
        if child is not None and child.pid == server.pid:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(child.wait, self._stop_within)


class EmbeddedSite(PulsarSite):
    """The site that is there without any set-up: the embedded Pulsar in `directory`.

    Its jobs lie on our own machine, so their documents are read there, and their moves are seen at once.
    """

    def __init__(self, facts: SiteFacts, directory: Path, runner: Bundle, *, timeout: float = 10.0) -> None:
        self.pulsar = EmbeddedPulsar(directory)
        files = JobFiles(self.pulsar.directory / "staging")
        self._watch = Watch(files)
        super().__init__(facts, _EmbeddedCarrier(self.pulsar, files, timeout), runner)

    async def submit(self, plan: job.Plan) -> None:
        """See Site."""
        await super().submit(plan)
        self._watch.add(plan.job_id)

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        """See Site. Jobs of an earlier process come under watch here."""
        observations = await super().observe(job_ids)
        for seen in observations:
            if seen.phase in (Phase.WAITING, Phase.RUNNING):
                self._watch.add(seen.job_id)
            else:
                self._watch.drop(seen.job_id)
        return observations

    async def updates(self) -> AsyncIterator[Observation]:
        """See Site."""
        async for seen in self._watch.moves():
            yield seen

    async def forget(self, job_id: str, *, force: bool = False) -> bool:
        """See Site."""
        is_gone = await super().forget(job_id, force=force)
        if is_gone:
            self._watch.drop(job_id)
        return is_gone


class _EmbeddedCarrier(RestCarrier):
    """REST to the embedded Pulsar, whose socket and token are known only once it is entered."""

    def __init__(self, pulsar: EmbeddedPulsar, files: JobFiles, timeout: float) -> None:
        super().__init__(gate=pulsar.ready, timeout=timeout, uds=str(pulsar.directory / "p.sock"))
        self._pulsar = pulsar
        self._files = files

    async def fetch(self, job_id: str, name: str, limit: int) -> bytes | None:
        """See Carrier. Pulsar need not be asked for a file that lies beside us."""
        try:
            return self._files.read(check_id(job_id), name, limit)
        except OSError as error:
            raise SiteUnavailable(f"The job's {name} cannot be read: {error.strerror}") from error

    async def __aenter__(self) -> Self:
        await self._pulsar.__aenter__()
        self._uds, self._private_token = self._pulsar.socket, self._pulsar.token
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, trace)  # idle connections would delay Pulsar's end
        await self._pulsar.__aexit__(kind, error, trace)


_INI: Final = """\
# Written at each start of the service.
[server:main]
host = unix
port = {root}/p.sock

[app:main]
staging_directory = {root}/staging
persistence_directory = {root}/persist
private_token = {token}
"""


def _check_installed() -> None:
    try:
        importlib.metadata.version("pulsar-app")
    except importlib.metadata.PackageNotFoundError:
        found = False
    else:
        found = importlib.util.find_spec("gunicorn") is not None
    if not found:
        raise SettingsError(
            "The embedded site needs Pulsar, which is not installed: pip install 'tesp-api[embedded]', or set "
            "`pulsar.url` or `pulsar.amqp_url` to a Pulsar that runs elsewhere."
        )


def _needs_alias(directory: Path) -> bool:
    return len(os.fsencode(directory)) > LONGEST or UNSAFE_PATH.search(str(directory)) is not None


def _alias(directory: Path) -> Path:
    """A short path of plain characters that leads to `directory`: a link in a private directory, noted in `alias`."""
    note = directory / "alias"
    with suppress(FileNotFoundError):
        link = Path(os.fsdecode(note.read_bytes()))
        if _is_private(link.parent):
            if not link.is_symlink():
                link.symlink_to(directory)
            if os.readlink(link) == str(directory):  # noqa: PTH115 - as text
                return link
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = runtime and _is_private(Path(runtime)) and not _needs_alias(Path(runtime))
    folder = tempfile.mkdtemp(prefix="tesp-", dir=runtime if usable else "/tmp")  # noqa: S108 - made private, short
    link = Path(folder) / "d"
    link.symlink_to(directory)
    replace(note, os.fsencode(link))
    return link


def _is_private(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and facts.st_mode & 0o022 == 0


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holders(fd: int) -> list[Process]:
    """The other processes of this machine that have the file open."""
    mine = os.fstat(fd)
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names only
        with suppress(OSError):  # gone meanwhile, or another user's
            if entry.isdigit() and int(entry) != os.getpid() and _has_open(f"/proc/{entry}/fd", mine):
                found.append(Process.of(int(entry)))
    return [each for each in found if each is not None]


def _has_open(folder: str, facts: os.stat_result) -> bool:
    for name in os.listdir(folder):  # noqa: PTH208 - names only
        with suppress(OSError):
            if os.path.samestat(os.stat(f"{folder}/{name}"), facts):  # noqa: PTH116
                return True
    return False


def _listener(path: str) -> Process | None:
    """The process that listens on a unix socket in our private directory, by the kernel's word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
        try:
            connection.connect(path)
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return Process.of(pid) if uid == os.getuid() else None


__all__ = ["EmbeddedPulsar", "EmbeddedSite"]
