"""A Docker daemon killed outright while an executor runs: the job ends truthfully, and no container is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import bundle, job
from tests import engine, runner_jobs
from tests.runner_jobs import Job, mounts, sh, until
from tests.support import require

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

Make = Callable[..., Job]


class Daemon:
    """A dockerd of our own, which can be killed and started again; it has busybox and no networks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = f"unix://{directory}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        for name in ("pid", "exec/containerd/containerd.pid"):  # of the killed ones
            (self.directory / name).unlink(missing_ok=True)
        # In a network of its own: with `--bridge none` a daemon removes docker0, which belongs to the machine's.
        command = ["unshare", "--net", "dockerd", "-H", self.host, "--data-root", f"{self.directory}/data"]
        command += ["--exec-root", f"{self.directory}/exec", "--pidfile", f"{self.directory}/pid"]
        command += ["--bridge", "none", "--iptables=false", "--ip-forward=false", *options]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        until(lambda: self.run("info").returncode == 0, 60)

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["docker", "-H", self.host, *arguments], capture_output=True, timeout=60, **options)

    def containers(self) -> list[str]:
        done = self.run("ps", "-aq")
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().split()

    def kill(self) -> None:
        """Kill the daemon and its containerd: what a crash, or the kernel's lack of memory, does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.directory / "exec/containerd/containerd.pid").read_text()), signal.SIGKILL)

    def close(self) -> None:
        if self._process is not None:
            for one in self.run("ps", "-aq").stdout.decode().split():
                self.run("rm", "-f", one)
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        for process in self.processes():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for place in sorted((one for one in mounted if one.startswith(f"{self.directory}/")), reverse=True):
            subprocess.run(["umount", "-l", place], capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def processes(self) -> list[int]:
        """What runs for this daemon: its containerd, and the shims that hold containers."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.directory).encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return [one for one in found if one != os.getpid()]


@pytest.fixture(scope="module")
def image() -> bytes:
    require(os.geteuid() == 0 and shutil.which("dockerd") and shutil.which("unshare"), "root, dockerd, unshare")
    require(engine.docker_host(), "Docker with the image busybox is needed")
    return subprocess.run(["docker", "save", engine.IMAGE], capture_output=True, check=True).stdout


@pytest.fixture
def daemon(image: bytes) -> Iterator[Daemon]:
    made = Daemon(Path(tempfile.mkdtemp(prefix="tesp-loss-")))
    try:
        made.start()
        assert made.run("load", input=image).returncode == 0
        yield made
    finally:
        made.close()


@pytest.fixture
def make(tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Jobs on that daemon, with a runner that is less patient than the real one."""
    sources = list(bundle._sources())
    patient = b"_LOST = 60.0"
    assert any(patient in data for _, data in sources)
    short = [(name, data.replace(patient, b"_LOST = 3.0")) for name, data in sources]

    def made(*executors: job.Executor, lost: bool = False, **plan: Any) -> Job:
        with monkeypatch.context() as patch:
            if lost:
                patch.setattr(bundle, "_sources", lambda: iter(short))
                patch.setattr(runner_jobs, "BUNDLE", bundle.build())
            plan["runtime"] = job.Runtime("docker", docker_host=daemon.host, network="none")
            one = Job(tmp_path, {"executors": list(executors), **plan})
            one.start(command=bundle.command(runner_jobs.BUNDLE.sha256))
        return one

    return made


def wait(made: Job) -> job.Result:
    assert made.process is not None
    assert made.process.wait(120) == 0
    assert made.process.communicate()[0] == b""
    return made.result()


def running(made: Job, daemon: Daemon) -> None:
    """Until the container runs: its file is the witness, and the daemon has noted it too."""
    until((made.root / "tes" / "m0" / "ran").exists)
    until(lambda: daemon.run("ps", "-q", "--filter", "status=running").stdout)


@pytest.mark.parametrize("canceled", [False, True])
def test_killed_and_not_started_again(make: Make, daemon: Daemon, canceled: bool) -> None:
    made = make(sh("touch /w/ran; sleep 600"), mounts=mounts("/w"), lost=not canceled)
    running(made, daemon)
    daemon.kill()
    if canceled:
        made.cancel()
    result = wait(made)
    assert (result.state, result.started, result.executors) == ("SYSTEM_ERROR", True, [])
    said = json.dumps(result.system_logs)
    assert "could not be removed yet" in said  # so CANCELED would not be true
    assert canceled or "executors[0]: Docker went away while it ran" in said
    assert result.infrastructure is not canceled
    daemon.start()
    until(lambda: not daemon.containers())  # the reaper has waited for that


@pytest.mark.parametrize(
    "script",
    [
        "sleep 600",
        "trap 'exit 0' TERM; while :; do sleep 0.1; done",  # makes a success of it when it is told to stop
    ],
)
def test_killed_and_started_again(make: Make, daemon: Daemon, script: str) -> None:
    made = make(sh("touch /w/ran; " + script), mounts=mounts("/w"))
    running(made, daemon)
    daemon.kill()
    daemon.start()
    result = wait(made)
    assert (result.state, result.started, result.executors) == ("SYSTEM_ERROR", True, [])
    assert "went away" in result.system_logs[0]
    assert result.infrastructure, "another try may help"
    assert daemon.containers() == []


def test_ended_while_the_daemon_was_down(make: Make, daemon: Daemon) -> None:
    """Nobody knows for sure how: no success is made up."""
    made = make(sh("touch /w/ran; while [ ! -e /w/go ]; do sleep 0.1; done; touch /w/gone"), mounts=mounts("/w"))
    running(made, daemon)
    daemon.kill()
    (made.root / "tes" / "m0" / "go").touch()
    time.sleep(1)  # the container may live on, or not
    daemon.start()
    result = wait(made)
    assert (result.state, result.started) == ("SYSTEM_ERROR", True)
    assert daemon.containers() == []


def test_a_daemon_that_keeps_its_containers(make: Make, daemon: Daemon) -> None:
    """With live-restore the container goes on, and its own end counts."""
    daemon.close()
    daemon.directory.mkdir()
    daemon.start("--live-restore")
    assert daemon.run("load", input=_saved()).returncode == 0
    made = make(sh("touch /w/ran; while [ ! -e /w/go ]; do sleep 0.1; done; exit 5"), mounts=mounts("/w"))
    running(made, daemon)
    daemon.kill()
    daemon.start("--live-restore")
    assert len(daemon.containers()) == 1
    (made.root / "tes" / "m0" / "go").touch()
    result = wait(made)
    assert (result.state, [one.exit_code for one in result.executors]) == ("EXECUTOR_ERROR", [5]), result
    assert daemon.containers() == []


def test_stopped_in_good_order(make: Make, daemon: Daemon) -> None:
    """A shutdown stops the containers by the way; the exit code is theirs, but it is no success."""
    made = make(sh("touch /w/ran; sleep 600"), mounts=mounts("/w"), lost=True)
    running(made, daemon)
    process = daemon._process
    assert process is not None
    process.terminate()
    process.wait(60)
    daemon._process = None
    assert wait(made).state in ("SYSTEM_ERROR", "EXECUTOR_ERROR")
    daemon.start()
    until(lambda: not daemon.containers())


def test_killed_during_the_start(make: Make, daemon: Daemon) -> None:
    for number in range(2):
        made = make(sh("sleep 600"), lost=True)
        until(made.progress)
        time.sleep(0.03 * number)
        daemon.kill()
        result = wait(made)
        assert result.state == "SYSTEM_ERROR"
        daemon.start()
        until(lambda: not daemon.containers())


def _saved() -> bytes:
    return subprocess.run(["docker", "save", engine.IMAGE], capture_output=True, check=True).stdout
