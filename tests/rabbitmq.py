"""A real RabbitMQ for tests: an own node in an own directory on free ports of 127.0.0.1, for any user."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support import free_port, require

SCRIPTS = Path("/usr/lib/rabbitmq/bin")
"""The scripts that the package's wrappers in /usr/sbin call; those change the user and the directory."""


def need_rabbitmq() -> None:
    """Skip the test where there is no RabbitMQ."""
    require((SCRIPTS / "rabbitmq-server").exists(), "rabbitmq-server is not installed")


class Broker:
    """A RabbitMQ that can be stopped, killed and started again. With `tls` it also listens for TLS."""

    def __init__(self, directory: Path, *, tls: Path | None = None) -> None:
        self.directory, self.port = directory, free_port()
        self.tls_port = free_port() if tls else 0
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        # RabbitMQ quotes no path of its own, and a long one would be too long for what Erlang makes of it.
        self._home = Path(tempfile.mkdtemp(prefix="mq-"))
        self._ports = {"RABBITMQ_DIST_PORT": free_port(), "ERL_EPMD_PORT": free_port()}
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            "vm_memory_high_watermark.absolute = 512MB",
            "disk_free_limit.absolute = 50MB",
            "log.console = false",
        ]
        if tls:
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
                f"ssl_options.cacertfile = {tls / 'ca.pem'}",
                f"ssl_options.certfile = {tls / 'server.pem'}",
                f"ssl_options.keyfile = {tls / 'server.key'}",
            ]
        (self._home / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (self._home / "plugins").write_text("[].\n")

    @property
    def environment(self) -> dict[str, str]:
        home = self._home
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "RABBITMQ_NODENAME": f"t{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq"),
            "RABBITMQ_PID_FILE": str(home / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
            **{name: str(port) for name, port in self._ports.items()},
        }

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with (self.directory / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [SCRIPTS / "rabbitmq-server"],
                env=self.environment,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self._process.poll() is None:
            if _greets(self.port):
                return
            time.sleep(0.1)
        raise AssertionError(f"RabbitMQ did not start: {(self.directory / 'broker.log').read_text()}")

    @property
    def group(self) -> int:
        """Its process group."""
        assert self._process is not None
        return self._process.pid

    def pause(self) -> None:
        """SIGSTOP."""
        os.killpg(self.group, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.killpg(self.group, signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 it."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Let it end by itself."""
        if self._process is not None and self._process.poll() is None:
            self.control("shutdown")
            self._process.wait(60)

    def remove(self) -> None:
        """Kill it and all that it has started, its port mapper too, and remove what it kept."""
        self.kill()
        mine = f"HOME={self._home}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if entry.name.isdigit() and mine in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        shutil.rmtree(self._home, ignore_errors=True)

    def control(self, *arguments: str) -> str:
        """What rabbitmqctl says."""
        done = subprocess.run(
            [SCRIPTS / "rabbitmqctl", "-q", *arguments],
            env=self.environment,
            cwd=self._home,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _greets(port: int) -> bool:
    """Whether somebody at the port speaks AMQP: it answers a wrong greeting with the right one."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.settimeout(5)
            connection.sendall(b"AMQP\x00\x00\x00\x00")
            return connection.recv(8).startswith(b"AMQP")
    except OSError:
        return False


def certificates(directory: Path) -> Path:
    """A certificate authority, and a certificate of its for 127.0.0.1 and localhost: ca.pem, server.pem, server.key."""
    require(shutil.which("openssl"), "openssl is not installed")
    directory.mkdir(parents=True, exist_ok=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes", "-subj")
    openssl(*new, "/CN=Test CA", "-x509", "-days", "30", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-days", "30", "-extfile", "names", "-out", "server.pem"),
    )
    return directory
