"""A Docker engine for tests: the machine's own, or a private one that we start and stop."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

IMAGE = "busybox:latest"


@functools.cache
def docker_host() -> str:
    """The address of a working engine that has the image `busybox:latest`, or "" when none can be had.

    Uses DOCKER_HOST or the standard socket; as root, where dockerd is installed but does not run, it starts a private
    one and names it in DOCKER_HOST for this process and its children.
    """
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not _answers(host):
        host = _start()
        if host:
            os.environ["DOCKER_HOST"] = host
    return host if host and _has_image() else ""


def _answers(host: str) -> bool:
    return subprocess.run(["docker", "-H", host, "info"], capture_output=True).returncode == 0 if _cli() else False


def _cli() -> str | None:
    return shutil.which("docker")


def _start() -> str:
    dockerd = shutil.which("dockerd")
    if dockerd is None or _cli() is None or os.geteuid() != 0:
        return ""
    directory = Path(tempfile.mkdtemp(prefix="tesp-dockerd-"))
    directory.chmod(0o711)  # users other than root reach the socket too, if its group lets them
    with _alone():
        return _run(dockerd, directory)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One daemon starts at a time on this machine: two that make the same iptables chains at once both fail."""
    path = Path(tempfile.gettempdir(), "tesp-dockerd.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _run(dockerd: str, directory: Path) -> str:
    host = f"unix://{directory}/docker.sock"
    command = [dockerd, "-H", host, "--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"]
    with (directory / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [*command, "--pidfile", f"{directory}/pid"],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    atexit.register(_stop, daemon, directory)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and daemon.poll() is None:
        if _answers(host):
            return host
        time.sleep(0.1)
    print((directory / "log").read_text(errors="replace")[-2000:])
    return ""


def _stop(daemon: subprocess.Popen[bytes], directory: Path) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
    shutil.rmtree(directory, ignore_errors=True)


def _has_image() -> bool:
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode == 0:
        return True
    return _import_image() or subprocess.run(["docker", "pull", "-q", IMAGE], capture_output=True).returncode == 0


def _import_image() -> bool:
    """The image from the machine's own busybox, if that needs no libraries (Debian: busybox-static)."""
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True).returncode == 0:
        return False
    with tempfile.TemporaryDirectory() as root:
        binaries = Path(root, "bin")
        binaries.mkdir()
        shutil.copy(busybox, binaries / "busybox")
        for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
            if applet != "busybox":
                (binaries / applet).symlink_to("busybox")
        Path(root, "tmp").mkdir(mode=0o1777)
        Path(root, "etc").mkdir()
        Path(root, "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        archive = subprocess.run(["tar", "-C", root, "-c", "."], capture_output=True, check=True).stdout
        command = ["docker", "import", "-c", 'CMD ["sh"]', "-", IMAGE]
        return subprocess.run(command, input=archive, capture_output=True).returncode == 0


def docker_socket() -> Path | None:
    """The engine's socket, if it listens on one of this machine."""
    host = docker_host()
    return Path(host.removeprefix("unix://")) if host.startswith("unix://") else None
