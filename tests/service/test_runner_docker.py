"""The runner with a real Docker engine and busybox."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import job
from tests.engine import docker_host, docker_socket
from tests.runner_jobs import Job, executor, mounts, sh, until
from tests.support import require

pytestmark = pytest.mark.service

Make = Callable[..., Job]


def docker(*arguments: str, stdin: bytes = b"") -> str:
    done = subprocess.run(["docker", *arguments], input=stdin, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def containers(made: Job) -> list[str]:
    return docker("ps", "-aq", "--filter", f"label=tesp.job={made.id}").split()


@pytest.fixture(scope="module")
def engine() -> None:
    require(docker_host(), "Docker with the image busybox is needed")


@pytest.fixture
def make(tmp_path: Path, engine: None) -> Iterator[Make]:
    jobs: list[Job] = []

    def made(*executors: job.Executor, **plan: Any) -> Job:
        (tmp_path / "data").mkdir(exist_ok=True)
        roots = [job.FileRoot(str(tmp_path / "data"), mount=True)]
        plan = {"executors": list(executors), "file_roots": roots, **plan}
        jobs.append(Job(tmp_path, plan))
        return jobs[-1]

    yield made
    for one in jobs:
        assert containers(one) == []


def test_happy_path(make: Make, tmp_path: Path) -> None:
    made = make(
        sh(
            "cat; echo $GREETING >&2; mkdir made; cp in.txt made/a",
            stdin="/work/in.txt",
            env={"GREETING": "a 'b' $C \u00fc"},
            workdir="/work",
        ),
        sh(
            "cat /work/made/a; pwd; cat /one; ls -d /new/dir",
            workdir="/new/dir",
            stdout="/work/logs/out",
            stderr="/work/logs/err",
        ),
        inputs=[job.Input("/work/in.txt", content="inp\u00fct\n"), job.Input("/one", content="1\n")],
        outputs=[job.Output("/work", f"{tmp_path}/data/w", job.DIRECTORY)],
        mounts=[*mounts("/work", "/tmp"), job.Mount("/one", "one", job.FILE)],
    )
    result = made.run()
    assert (result.state, result.system_logs) == ("COMPLETE", [])
    assert [(one.exit_code, one.stdout, one.stderr) for one in result.executors] == [
        (0, "inp\u00fct\n", "a 'b' $C \u00fc\n"),
        (0, "inp\u00fct\n/new/dir\n1\n/new/dir\n", ""),
    ]
    assert (tmp_path / "data" / "w" / "logs" / "out").read_text() == "inp\u00fct\n/new/dir\n1\n/new/dir\n"


def test_arguments_arrive_byte_for_byte(make: Make) -> None:
    words = ["a b", "", "'", '"', "$HOME", "`id`", "a\nb", "\u00fc\u4e2d", "; touch /x", "\\", "*", "--x", ""]
    made = make(executor("sh", "-c", 'for word; do printf "%s|" "$word"; done', "sh", *words))
    assert made.run().executors[0].stdout == "".join(word + "|" for word in words)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -9 $$; sleep 9"), 137),
        (("no-such-program",), 127),
        (("/no/such/program",), 127),
        (("/etc",), 126),
        (("/etc/passwd",), 126),
    ],
)
def test_exit_codes(make: Make, command: tuple[str, ...], code: int) -> None:
    if code == 137:
        command = ("sh", "-c", "sh -c 'kill -9 $$'; exit $?")
    result = make(executor(*command), sh("exit 0")).run()
    assert (result.state, [one.exit_code for one in result.executors]) == ("EXECUTOR_ERROR", [code])
    if code in (126, 127):
        assert command[0] in result.executors[0].stderr


def test_ignored_errors(make: Make) -> None:
    result = make(executor("no-such-program", ignore_error=True), sh("exit 0")).run()
    assert (result.state, [one.exit_code for one in result.executors]) == ("COMPLETE", [127, 0])


def test_limits_are_real(make: Make) -> None:
    script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; "
    script += "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null"
    made = make(sh(script + "; true"), cpus=0.5, ram_bytes=64 * 1024 * 1024)
    assert made.run().executors[0].stdout.split()[:2] == [str(64 * 1024 * 1024), "50000"]


def test_more_cpus_than_there_are(make: Make) -> None:
    result = make(sh("exit 0"), cpus=10000).run()
    assert result.state == "COMPLETE"
    assert "10000" in result.system_logs[0]


def test_out_of_memory_is_named(make: Make) -> None:
    result = make(sh("tail /dev/zero"), ram_bytes=16 * 1024 * 1024).run()
    assert (result.state, result.executors[0].exit_code) == ("EXECUTOR_ERROR", 137)
    assert "resources.ram_gb" in result.system_logs[0]


def test_a_missing_image(make: Make) -> None:
    result = make(executor("true", image="127.0.0.1:9/no/such:image")).run()
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert result.system_logs[0].startswith("executors[0].image: '127.0.0.1:9/no/such:image' cannot be pulled")
    result = make(executor("true", image="no-such-image"), runtime=job.Runtime("docker", pull="never")).run()
    assert "pulling is switched off" in result.system_logs[0]


def test_the_images_entrypoint_stays(make: Make, tmp_path: Path) -> None:
    name = "tesp-test-entrypoint"
    tree = subprocess.run(
        "id=$(docker create busybox) && docker export $id && docker rm $id >&2",
        shell=True,
        capture_output=True,
        check=True,
    )
    docker("import", "-c", 'ENTRYPOINT ["echo", "entry"]', "-c", "ENV FROM=image", "-", name, stdin=tree.stdout)
    try:
        result = make(executor("--flag", "a b", image="docker://" + name)).run()
        assert result.executors[0].stdout == "entry --flag a b\n"
    finally:
        docker("rmi", name)


def test_no_engine_is_one_sentence(make: Make, tmp_path: Path) -> None:
    dead = tmp_path / "dead.sock"
    for kind in ("auto", "docker"):
        result = make(sh("exit 0"), runtime=job.Runtime(kind, docker_host=f"unix://{dead}")).run()
        assert (result.state, result.started, len(result.system_logs)) == ("SYSTEM_ERROR", False, 1)
        assert "install or start Docker, or set container.runtime" in result.system_logs[0]
        if not dead.exists():
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(dead))


def test_much_output_takes_little_memory(make: Make, tmp_path: Path) -> None:
    made = make(sh("head -c 200000000 /dev/zero | tr '\\0' x", stdout="/w/o"), mounts=mounts("/w")).start()
    made.wait_for_phase("running")
    assert made.process is not None
    peak = 0

    def ended() -> bool:
        nonlocal peak
        try:
            status = Path(f"/proc/{made.process.pid}/status").read_text()  # type: ignore[union-attr]
        except FileNotFoundError:
            return True
        peak = max(peak, *map(int, re.findall(r"VmHWM:\s+(\d+)", status) or [0]), 0)
        return "State:\tZ" in status

    until(ended)
    assert made.wait() == 0
    assert 0 < peak < 60000
    assert (made.root / "tes" / "m0" / "o").stat().st_size == 200000000
    assert len(made.result().executors[0].stdout) < 140000


@pytest.mark.parametrize("reads", [True, False])
def test_a_big_stdin(make: Make, tmp_path: Path, reads: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big").write_bytes(os.urandom(20_000_000))
    made = make(
        sh("cat | wc -c" if reads else "exit 0", stdin="/w/big"),
        inputs=[job.Input("/w/big", url=f"{tmp_path}/data/big")],
        mounts=mounts("/w"),
    )
    assert made.run().executors[0].stdout == ("20000000\n" if reads else "")


def test_streams_closed_early_do_not_end_it(make: Make) -> None:
    result = make(sh("echo a; exec >&- 2>&-; sleep 1; exit 5")).run()
    assert (result.executors[0].exit_code, result.executors[0].stdout) == (5, "a\n")


def test_a_live_mount(make: Make, tmp_path: Path) -> None:
    (tmp_path / "data" / "store").mkdir(parents=True)
    made = make(sh("echo x > /live/x"), mounts=[job.Mount("/live", f"{tmp_path}/data/store")])
    assert made.run().state == "COMPLETE"
    assert (tmp_path / "data" / "store" / "x").read_text() == "x\n"


def test_links_and_devices_left_by_root_in_the_container(make: Make, tmp_path: Path) -> None:
    script = "cd /w; ln -s /etc/shadow a; mknod b c 1 5; mknod c b 7 0; mkfifo d; ln -s /proc/1/root e; echo x > good"
    made = make(sh(script), outputs=[job.Output("/w", f"{tmp_path}/data/o", job.DIRECTORY)], mounts=mounts("/w"))
    result = made.run()
    assert (result.state, [out.path for out in result.outputs]) == ("COMPLETE", ["/w/good"])
    assert len(result.system_logs) == 5
    shutil.rmtree(made.root / "tes")


@pytest.mark.parametrize("stubborn", [False, True])
def test_cancel(make: Make, stubborn: bool) -> None:
    write = "echo a; echo b >&2; "
    script = write + ("trap '' TERM; while :; do sleep 1; done" if stubborn else "sleep 600")
    made = make(sh(script), sh("exit 0")).start()
    until(lambda: (progress := made.progress()) and progress.stdout and progress.stderr)
    made.cancel()
    until(made.has_result)
    assert containers(made) == []
    assert made.wait() == 0
    assert (made.result().state, made.result().started) == ("CANCELED", True)
    (stopped,) = made.result().executors
    assert (stopped.stdout, stopped.stderr, stopped.exit_code) == ("a\n", "b\n", 137)  # process 1 hears no SIGTERM


def test_cancel_before_the_start(make: Make) -> None:
    made = make(sh("touch /w/ran"), mounts=mounts("/w"))
    made.cancel()
    assert (made.run().state, made.result().started) == ("CANCELED", False)
    assert not (made.root / "tes" / "m0" / "ran").exists()


@pytest.mark.parametrize("canceled", [False, True])
def test_killed_outright(make: Make, canceled: bool) -> None:
    made = make(sh("sleep 600")).start()
    made.wait_for_phase("running")
    until(lambda: containers(made))
    if canceled:
        made.cancel()
    made.kill()
    until(made.has_result)
    assert containers(made) == []
    assert (made.result().state, made.result().started) == ("CANCELED" if canceled else "SYSTEM_ERROR", True)
    assert made.result().infrastructure is not canceled


def test_killed_at_any_moment(make: Make) -> None:
    """Just as the container is about to be created, created, started."""
    for delay in range(0, 200, 20):
        made = make(sh("sleep 600")).start()
        if delay < 100:
            until(made.progress)  # staging, and maybe already more
        else:
            made.wait_for_phase("running")
        try:
            assert made.process is not None
            made.process.wait(delay % 100 / 1000)
        except subprocess.TimeoutExpired:
            pass
        made.kill()
        until(made.has_result)
        until(lambda made=made: not containers(made))
        assert made.result().state == "SYSTEM_ERROR"


def test_a_runner_that_is_not_root_leaves_nothing_that_is_not_its_own(make: Make, tmp_path: Path) -> None:
    sock = docker_socket()
    require(os.geteuid() == 0 and shutil.which("setpriv") and sock, "root, setpriv and a Docker socket")
    made = make(
        sh("umask 077; mkdir /w/d; echo x > /w/d/secret"),
        outputs=[job.Output("/w", f"{tmp_path}/data/o", job.DIRECTORY)],
        mounts=mounts("/w"),
    )
    user = 12345
    for folder in (tmp_path, *tmp_path.rglob("*")):
        os.chown(folder, user, user)
    for folder in list(tmp_path.parents)[:-2]:
        folder.chmod(folder.stat().st_mode | 0o011)
    python = shutil.which("python3", path="/usr/bin")
    wrapper = tmp_path / "python"
    group = sock.stat().st_gid
    wrapper.write_text(f'#!/bin/sh\nexec setpriv --reuid={user} --regid={user} --groups={group} {python} "$@"\n')
    wrapper.chmod(0o755)
    made.python = str(wrapper)
    result = made.run()
    assert (result.state, result.system_logs) == ("COMPLETE", [])
    assert (tmp_path / "data" / "o" / "d" / "secret").read_text() == "x\n"
    assert {path.stat().st_uid for path in (made.root / "tes").rglob("*")} == {user}


def test_an_engine_that_goes_away(make: Make, tmp_path: Path) -> None:
    """Through a proxy that can be cut: the container goes on, and its truth is told when the engine is back."""
    with Proxy(tmp_path / "proxy.sock") as proxy:
        made = make(
            sh("echo a; while [ ! -e /w/go ]; do sleep 0.1; done; exit 5"),
            runtime=job.Runtime("docker", docker_host=f"unix://{proxy.path}"),
            mounts=mounts("/w"),
        ).start()
        made.wait_for_phase("running")
        until(lambda: docker("ps", "-q", "--filter", f"label=tesp.job={made.id}"))
        proxy.cut()
        (made.root / "tes" / "m0" / "go").write_text("")
        assert made.wait() == 0
    result = made.result()
    assert (result.state, result.executors[0].exit_code) == ("EXECUTOR_ERROR", 5)
    assert "went away" in json.dumps(result.system_logs)


class Proxy:
    """A way to the engine's socket that can be cut."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.relpath(path)).absolute()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.path.relpath(path))
        self._listener.listen(50)
        self._pairs: list[socket.socket] = []

    def __enter__(self) -> Proxy:
        import threading

        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._pairs = []

    def _serve(self) -> None:
        import threading

        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(docker_socket()))
            self._pairs += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            for block in iter(lambda: source.recv(65536), b""):
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass
