"""A Docker engine whose answers get lost: that a container has ended, as under load, or that one was made."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tesp_api.runner import bundle, job
from tests import engine, runner_jobs
from tests.runner_jobs import Job, sh
from tests.support import require

pytestmark = pytest.mark.service


Serve = Callable[[socket.socket, socket.socket, bytes], None]


@contextlib.contextmanager
def between(path: Path, serve: Serve) -> Iterator[None]:
    """Listen on `path` for clients of the real engine; `serve` gets the client, the engine and the first request."""
    real = engine.docker_socket()
    require(engine.docker_host() and real, "Docker on a socket of this machine, with busybox, is needed")

    def one(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(str(real))
            serve(client, daemon, client.recv(1 << 20))

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=listen, daemon=True).start()
        yield


def forgetful(client: socket.socket, daemon: socket.socket, request: bytes) -> None:
    """Pass everything on, but neither the end of a container's streams nor the answer to who waits for its end."""
    daemon.sendall(request)
    first = request.partition(b"\r\n")[0]
    more = threading.Thread(target=pour, args=(client, daemon), daemon=True)
    more.start()
    if b"/wait?" not in first:
        pour(daemon, client)
    if b"/wait?" in first or b"/attach?" in first:
        more.join()
    for each in (client, daemon):
        each.shutdown(socket.SHUT_RDWR)


def cutting(client: socket.socket, daemon: socket.socket, request: bytes) -> None:
    """Hang up on who has a container made, which the engine does a moment later."""
    if b"/containers/create" in request.partition(b"\r\n")[0]:
        client.close()
        time.sleep(0.5)
    daemon.sendall(request)
    pour(daemon, client)


def pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for block in iter(lambda: source.recv(65536), b""):
            target.sendall(block)


@pytest.mark.parametrize("code", [0, 3])
def test_an_end_that_nobody_tells_of_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    patient = b"_SILENT = 15.0"
    sources = [(name, data.replace(patient, b"_SILENT = 0.2")) for name, data in bundle._sources()]
    assert any(b"_SILENT = 0.2" in data for _, data in sources)
    with between(tmp_path / "s", forgetful), monkeypatch.context() as patch:
        patch.setattr(bundle, "_sources", lambda: iter(sources))
        patch.setattr(runner_jobs, "BUNDLE", bundle.build())
        result = run(tmp_path, f"echo hi; sleep 1; exit {code}").result()
    assert result.state == ("EXECUTOR_ERROR" if code else "COMPLETE")
    assert [(each.exit_code, each.stdout) for each in result.executors] == [(code, "hi\n")]
    assert "has not told of the end" in result.system_logs[0]


def test_a_container_whose_making_was_cut_off_is_not_left(tmp_path: Path) -> None:
    with between(tmp_path / "s", cutting):
        made = run(tmp_path, "true")
    assert (made.result().state, made.result().infrastructure, made.result().started) == ("SYSTEM_ERROR", True, False)
    command = ["docker", "ps", "-aq", "--filter", f"label=tesp.job={made.id}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def run(directory: Path, script: str) -> Job:
    """A job of one executor, which has ended, with the engine at `directory`/s."""
    runtime = job.Runtime("docker", docker_host=f"unix://{directory / 's'}", network="none")
    made = Job(directory, {"executors": [sh(script)], "runtime": runtime})
    made.start(command=bundle.command(runner_jobs.BUNDLE.sha256))
    assert made.wait() == 0
    return made
