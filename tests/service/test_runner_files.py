"""What containers leave behind, who may delete it, and what a full disk does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import job
from tests import engine
from tests.contract.test_transfer import Store, answer, server_of
from tests.runner_jobs import Job, executor, mounts, until
from tests.support import require

pytestmark = pytest.mark.service

HOST = job.Runtime("host")
Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Jobs in Docker whose outputs go to `data`."""
    require(engine.docker_host(), "Docker with the image busybox is needed")
    return maker(tmp_path, job.Runtime("docker", docker_host=engine.docker_host(), network="none"))


@pytest.fixture
def bare(tmp_path: Path) -> Make:
    """The same without containers."""
    return maker(tmp_path, HOST)


def maker(place: Path, runtime: job.Runtime) -> Make:
    (place / "data").mkdir(exist_ok=True)

    def made(script: str, **plan: Any) -> Job:
        plan.setdefault("mounts", mounts("/w"))
        plan.setdefault("outputs", [job.Output("/w", f"{place}/data/o", job.DIRECTORY)])
        roots = [job.FileRoot(str(place / "data"))]
        plan["executors"] = [executor("sh", "-c", script, **plan.pop("streams", {}))]
        return Job(place, {"runtime": runtime, "file_roots": roots, **plan})

    return made


def names(place: Path) -> list[bytes]:
    return sorted(os.listdir(bytes(place)))  # noqa: PTH208 - as bytes


# What containers leave


def test_a_daemon_in_a_container_ends_with_it(make: Make, tmp_path: Path) -> None:
    script = "(setsid sh -c 'while :; do date >> /w/late; sleep 0.05; done' >/dev/null 2>&1 &) ; sleep 0.3; echo done"
    made = make(script)
    result = made.run()
    assert (result.state, result.executors[0].stdout) == ("COMPLETE", "done\n")
    size = (made.root / "tes" / "m0" / "late").stat().st_size
    assert (tmp_path / "data" / "o" / "late").stat().st_size == size


def test_special_files_are_left_out(make: Make, tmp_path: Path) -> None:
    script = "cd /w; mkfifo fifo; mknod null c 1 3; mknod disk b 7 0; mkfifo sub.fifo; echo x > good; ln good hard"
    result = make(script).run()
    assert (result.state, [(out.path, out.size_bytes) for out in result.outputs]) == (
        "COMPLETE",
        [("/w/good", 2), ("/w/hard", 2)],
    )
    assert sorted(line.split(": ")[2] for line in result.system_logs) == [
        "/w/" + n for n in ("disk", "fifo", "null", "sub.fifo")
    ]
    assert names(tmp_path / "data" / "o") == [b"good", b"hard"]


def test_a_special_file_as_the_output_itself(make: Make, tmp_path: Path) -> None:
    for script in ("mkfifo /w/x", "mknod /w/x c 1 5", "ln -s x /w/x", "ln -s /proc/self/environ /w/x"):
        result = make(script, outputs=[job.Output("/w/x", f"{tmp_path}/data/x")]).run()
        assert (result.state, result.outputs) == ("SYSTEM_ERROR", [])
        assert result.system_logs[-1].startswith("outputs[0]")
        assert not (tmp_path / "data" / "x").exists()


def test_stdout_cannot_be_turned_into_a_way_out(make: Make, tmp_path: Path) -> None:
    """The file is open before the container starts; what it puts in its place later is what lies there."""
    victim = tmp_path / "victim"
    victim.write_text("safe")
    script = f"rm /w/out; ln -s {victim} /w/out; echo overwritten"
    result = make(script, streams={"stdout": "/w/out"}).run()
    assert result.executors[0].stdout == "overwritten\n"
    assert victim.read_text() == "safe"
    assert result.outputs == []


def test_ten_thousand_files(make: Make, tmp_path: Path) -> None:
    result = make("cd /w; mkdir d; cd d; seq 10000 | xargs touch").run()
    assert (result.state, len(result.outputs), result.system_logs) == ("COMPLETE", 10000, [])
    assert len(names(tmp_path / "data" / "o" / "d")) == 10000


def test_a_deep_tree(make: Make, tmp_path: Path) -> None:
    """On the node longer than a path may be; and one that is too deep is not left out in silence."""
    down = "cd /w; i=0; while [ $i -lt %d ]; do mkdir %s; cd %s; i=$((i+1)); done; echo deep > end"
    name = "d" * 12
    result = make(down % (300, name, name)).run()
    assert (result.state, result.system_logs, len(result.outputs)) == ("COMPLETE", [], 1)
    assert result.outputs[0].path.count("/") == 302
    found = subprocess.run(["find", tmp_path / "data", "-name", "end"], capture_output=True, text=True, check=True)
    assert found.stdout.count(name) == 300
    result = make(down % (600, "d", "d")).run()
    assert (result.state, result.outputs) == ("SYSTEM_ERROR", [])
    assert "directories deep" in result.system_logs[-1]
    subprocess.run(["rm", "-rf", *tmp_path.glob("staging/t*"), tmp_path / "data"], check=True)


def test_names_of_any_bytes(make: Make, tmp_path: Path) -> None:
    script = r"""cd /w; for name in 'a b' "$(printf 'new\nline')" "$(printf '\377\376')" "$(printf 'esc\033[31m')" \
        '"q"'         "$(printf '\303\274')" '-rf' '*' 'back\slash' "$(printf 'cr\rx')"; do echo x > "./$name"; done"""
    wanted = [
        b"a b",
        b"new\nline",
        b"\xff\xfe",
        b"esc\x1b[31m",
        b'"q"',
        b"\xc3\xbc",
        b"-rf",
        b"*",
        b"back\\slash",
        b"cr\rx",
    ]
    made = make(script)
    result = made.run()
    assert (result.state, result.system_logs) == ("COMPLETE", [])
    assert names(tmp_path / "data" / "o") == sorted(wanted)
    json.dumps([out.path for out in result.outputs]).encode("ascii")
    for out in result.outputs:
        (out.path + out.url).encode("utf-8")  # no lone surrogates for others to choke on
    assert len(result.outputs) == len(wanted)


def test_names_of_any_bytes_over_http(make: Make, tmp_path: Path) -> None:
    web = Store(tmp_path, "http")
    try:
        script = r"""cd /w; for name in "$(printf 'new\nline')" "$(printf '\377')" 'a?b#c%41' "$(printf '\303\274')"
                 do echo x > "$name"; done"""
        result = make(script, outputs=[job.Output("/w/*", web.url("up"), prefix="/w")]).run()
        assert (result.state, result.system_logs) == ("COMPLETE", [])
        sent = {path for method, path, _ in server_of(web).requests if method == "PUT"}
        assert sent == {"/up/new%0Aline", "/up/%FF", "/up/a%3Fb%23c%2541", "/up/%C3%BC"}
    finally:
        web.close()


def test_a_hole_stays_a_hole(make: Make, tmp_path: Path) -> None:
    """10 GB that nobody wrote are not written now, and take no memory."""
    size = 10 * 1000**3
    script = f"echo begin > /w/x; dd if=/dev/zero of=/w/x bs=1 count=0 seek={size} 2>&1; truncate -s 1000000000000 /w/y"
    made = make(script, outputs=[job.Output("/w/x", f"{tmp_path}/data/x"), job.Output("/w/y", f"{tmp_path}/data/y")])
    result = made.run()
    assert (result.state, [out.size_bytes for out in result.outputs]) == ("COMPLETE", [size, 1000000000000])
    for name, wanted in (("x", size), ("y", 1000000000000)):
        facts = (tmp_path / "data" / name).stat()
        assert facts.st_size == wanted
        assert facts.st_blocks * 512 < 10_000_000
    with (tmp_path / "data" / "x").open("rb") as stream:
        assert stream.read(10) == b"begin\n\0\0\0\0"


@pytest.mark.parametrize("way", ["file", "directory"])
def test_holes_in_inputs(bare: Make, tmp_path: Path, way: str) -> None:
    """Data between, before and behind holes arrives where it was."""
    (tmp_path / "data" / "d").mkdir()
    source = tmp_path / "data" / "d" / "x"
    with source.open("wb") as stream:
        for at, data in ((1_000_000, b"one"), (50_000_000, os.urandom(1_000_000)), (90_000_000, b"end")):
            stream.seek(at)
            stream.write(data)
        stream.truncate(3_000_000_000)
    path, kind = ("/w/d", job.DIRECTORY) if way == "directory" else ("/w/d/x", job.FILE)
    made = bare(
        "true", inputs=[job.Input(path, kind, str(source.parent if way == "directory" else source))], outputs=[]
    )
    assert made.run().state == "COMPLETE"
    copy = made.root / "tes" / "m0" / "d" / "x"
    assert copy.stat().st_size == 3_000_000_000
    assert copy.stat().st_blocks * 512 < 10_000_000
    with source.open("rb") as one, copy.open("rb") as other:
        for at in (0, 1_000_000, 50_000_000, 90_000_000, 2_999_999_000):
            one.seek(at)
            other.seek(at)
            assert one.read(1_000_100) == other.read(1_000_100)


# A file root that changes


def test_a_directory_that_changes_while_it_is_copied(bare: Make, tmp_path: Path) -> None:
    """A big first file gives us the time; what is gone when its turn comes is named."""
    place = tmp_path / "data" / "in"
    place.mkdir()
    (place / "a").write_bytes(os.urandom(150_000_000))
    (place / "z").write_text("soon gone")
    made = bare("true", inputs=[job.Input("/w/in", job.DIRECTORY, str(place))], outputs=[]).start()
    until((made.root / "tes" / "m0" / "in" / "a").exists)
    (place / "z").unlink()
    assert made.wait() == 0
    assert (made.result().state, made.result().started) == ("SYSTEM_ERROR", False)
    said = made.result().system_logs[-1]
    assert said.startswith("inputs[0].url: ")
    assert f"{place}/z" in said


def test_a_file_that_shrinks_while_it_is_copied(bare: Make, tmp_path: Path) -> None:
    place = tmp_path / "data" / "big"
    place.write_bytes(os.urandom(200_000_000))
    made = bare("true", inputs=[job.Input("/w/in", url=str(place))], outputs=[]).start()
    until((made.root / "tes" / "m0" / "in").exists)
    os.truncate(place, 1000)
    assert made.wait() == 0
    assert made.result().system_logs[-1].startswith("inputs[0].url: ")
    assert "became shorter" in made.result().system_logs[-1]


def test_a_file_that_grows_for_ever(bare: Make, tmp_path: Path) -> None:
    """What it was at the beginning is copied."""
    place = tmp_path / "data" / "log"
    place.write_bytes(b"x" * 1_000_000)
    end = threading.Event()

    def grow() -> None:
        with place.open("ab") as stream:
            while not end.is_set() and stream.tell() < 2_000_000_000:
                stream.write(b"y" * 1_000_000)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        made = bare("true", inputs=[job.Input("/w/in", url=str(place))], outputs=[])
        assert made.run().state == "COMPLETE"
        assert (made.root / "tes" / "m0" / "in").stat().st_size <= place.stat().st_size
    finally:
        end.set()
        writer.join()
        place.unlink()


# A normal user


@pytest.fixture
def user() -> Iterator[tuple[int, int]]:
    require(os.geteuid() == 0 and shutil.which("useradd") and shutil.which("setpriv"), "root, useradd, setpriv")
    require(engine.docker_host().startswith("unix://"), "a Docker socket is needed")
    sock = Path(engine.docker_host()[len("unix://") :])
    name = f"tesp{os.getpid()}"
    subprocess.run(["useradd", "--no-create-home", "--no-log-init", name], check=True)
    try:
        uid = int(subprocess.run(["id", "-u", name], capture_output=True, check=True).stdout)
        yield uid, sock.stat().st_gid
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)


@pytest.mark.parametrize("end", ["", "; exit 3"])
def test_a_user_in_the_group_docker(make: Make, tmp_path: Path, user: tuple[int, int], end: str) -> None:
    """Root's secret files are sent away, and the user can delete the job's directory."""
    uid, group = user
    script = "umask 077; mkdir -p /w/d/e; echo secret > /w/d/e/f; chown -R 1234:1234 /w/d; ln -s /etc /w/l; "
    script += "echo x > /w/d/e/none; chmod 000 /w/d/e/none; chmod 500 /w/d/e"
    made = make(script + end)
    for folder in (tmp_path, *tmp_path.rglob("*")):
        os.chown(folder, uid, uid)
    for folder in list(tmp_path.parents)[:-2]:
        folder.chmod(folder.stat().st_mode | 0o011)
    wrapper = tmp_path / "python"
    python = shutil.which("python3", path="/usr/bin")
    wrapper.write_text(f'#!/bin/sh\nexec setpriv --reuid={uid} --regid={uid} --groups={group} {python} "$@"\n')
    wrapper.chmod(0o755)
    made.python = str(wrapper)
    result = made.run()
    assert result.state == ("EXECUTOR_ERROR" if end else "COMPLETE")
    assert [line for line in result.system_logs if "Files of other users" in line] == []
    sent = tmp_path / "data" / "o" / "d" / "e" / "f"
    assert sent.read_text() == "secret\n"
    assert sent.stat().st_uid == uid
    asuser = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    subprocess.run([*asuser, "rm", "-r", str(made.root)], check=True)
    assert not made.root.exists()


# A full disk


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A place with 4 MB."""
    require(os.geteuid() == 0, "root is needed to mount a tmpfs")
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=755,nr_inodes=3000", "tesp", place], capture_output=True
    )
    require(mounted.returncode == 0, "a tmpfs is needed")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, leave: int = 0) -> None:
    with (place / "filler").open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(place).free - leave)


def no_room(made: Job, field: str) -> job.Result:
    """A job that says truthfully that it found no room."""
    result = made.result()
    assert result.state == "SYSTEM_ERROR"
    assert any(line.startswith(field) and "No space left" in line for line in result.system_logs), result.system_logs
    progress = made.progress()
    assert progress is not None
    assert progress.phase == "done"
    return result


def test_no_room_for_an_input(tiny: Path, tmp_path: Path) -> None:
    made = maker(tiny, HOST)("true", inputs=[job.Input("/w/x", url=f"{tmp_path}/big")], outputs=[])
    (tmp_path / "big").write_bytes(b"x" * 20_000_000)
    made.plan = made.plan._replace(file_roots=[job.FileRoot(str(tmp_path))])
    made.plan_file.write_text(json.dumps(job.to_document(made.plan)))
    assert made.start().wait() == job.EXIT_DONE
    assert not no_room(made, "inputs[0].url: ").started


def test_no_room_for_a_download(tiny: Path, tmp_path: Path) -> None:
    web = Store(tmp_path, "http")
    try:
        server_of(web).trouble = lambda handler: answer(handler, 200, b"x" * 20_000_000)
        made = maker(tiny, HOST)("true", inputs=[job.Input("/w/x", url=web.url("f"))], outputs=[])
        assert made.start().wait() == job.EXIT_DONE
        assert not no_room(made, "inputs[0].url: ").started
        assert len(server_of(web).requests) == 1  # to try again would not help
    finally:
        web.close()


def test_no_room_for_many_inputs(tiny: Path) -> None:
    """Whose room is not given back: the result has room of its own."""
    made = maker(tiny, HOST)("true", inputs=[job.Input(f"/w/{n}", content="x") for n in range(2000)], outputs=[])
    fill(tiny, 1_500_000)
    assert made.start().wait() == job.EXIT_DONE
    assert not no_room(made, "inputs[").started


def test_no_room_for_stdout(tiny: Path) -> None:
    made = maker(tiny, HOST)(
        "head -c 20000000 /dev/zero; echo told >&2", outputs=[], streams={"stdout": "/w/out", "stderr": "/w/err"}
    )
    assert made.start().wait() == job.EXIT_DONE
    assert no_room(made, "executors[0].stdout could not be stored: ").started


def test_no_room_after_a_job_that_filled_it(tiny: Path) -> None:
    """A success stays one: the result's room was kept."""
    made = maker(tiny, HOST)("cat /dev/zero > fill 2>/dev/null; head -c 100000 /dev/zero | tr '\\0' x", outputs=[])
    assert made.start().wait() == job.EXIT_DONE
    assert (made.result().state, len(made.result().executors[0].stdout)) == ("COMPLETE", 100000)
    assert made.progress().phase == "done"  # type: ignore[union-attr]


def test_a_runner_killed_on_a_full_disk(tiny: Path) -> None:
    made = maker(tiny, HOST)("cat /dev/zero > fill 2>/dev/null; touch full; sleep 600", outputs=[]).start()
    made.wait_for_phase("running")
    until(lambda: shutil.disk_usage(tiny).free == 0)
    made.kill()
    until(made.has_result)
    assert (made.result().state, made.result().started) == ("SYSTEM_ERROR", True)


def test_no_room_for_an_output(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    made = maker(tmp_path, HOST)("head -c 20000000 /dev/zero > x", outputs=[job.Output("/w/x", f"{tiny}/x")])
    made.plan = made.plan._replace(
        file_roots=[job.FileRoot(str(tiny))],
        executors=[executor("sh", "-c", "head -c 20000000 /dev/urandom > x", workdir="/w")],
    )
    made.plan_file.write_text(json.dumps(job.to_document(made.plan)))
    assert made.start().wait() == job.EXIT_DONE
    assert no_room(made, "outputs[0].url: ").executors[0].exit_code == 0
    assert names(tiny) == []  # no half file, no draft


def test_no_room_at_all(tiny: Path) -> None:
    """Nothing is started, and one sentence says why; the exit code allows another try."""
    made = maker(tiny, HOST)("true", outputs=[])
    fill(tiny)
    with contextlib.suppress(OSError):
        for number in range(10_000):
            (tiny / f"name{number}").touch()
    assert made.start().wait() == job.EXIT_UNREADABLE_RUNNER
    assert b"No space left" in made.said
    assert made.said.count(b"\n") == 1
    assert not made.has_result()
