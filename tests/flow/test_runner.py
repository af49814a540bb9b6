"""The real zipapp as a process, its executors directly on the node: everything but the container engine."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import bundle, job
from tesp_api.runner.engines import marked
from tesp_api.sites import SiteFacts
from tesp_api.sites.local import LocalSite
from tesp_api.task import Phase
from tests import pythons
from tests.contract.test_transfer import Store
from tests.mongod import Certificates, make_certificates
from tests.runner_jobs import BUNDLE, Job, executor, mounts, sh, until

HOST = job.Runtime("host")
PYTHONS = pythons.found()
NEW = {number: python for number, python in PYTHONS.items() if not number.startswith("2")}

Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*executors: job.Executor, python: str = sys.executable, **plan: Any) -> Job:
        roots = [job.FileRoot(str(tmp_path / "data"))]
        (tmp_path / "data").mkdir(exist_ok=True)
        return Job(tmp_path, {"executors": list(executors), "runtime": HOST, "file_roots": roots, **plan}, python)

    return made


def test_happy_path(make: Make, tmp_path: Path) -> None:
    """Inputs, several executors that share a directory, streams, outputs: and the truth in the right order."""
    made = make(
        sh(
            "cat; echo $GREETING >&2; mkdir /work/made; cp /work/in.txt /work/made/a",
            stdin="/work/in.txt",
            env={"GREETING": "hi"},
        ),
        sh("cat made/a; pwd", workdir="/work", stdout="/work/logs/out", stderr="/work/logs/err"),
        inputs=[job.Input("/work/in.txt", content="inp\u00fct\n"), job.Input("/one", content="1")],
        outputs=[
            job.Output("/work/logs/out", f"{tmp_path}/data/out.txt"),
            job.Output("/work/made", f"file://{tmp_path}/data/a%20dir/", job.DIRECTORY),
            job.Output("/work/lo*/e??", f"{tmp_path}/data/glob/", prefix="/work"),
            job.Output("/work/none*", f"{tmp_path}/data/none", prefix="/work"),
        ],
        mounts=[*mounts("/work"), job.Mount("/one", "one", job.FILE)],
    )
    result = made.run()
    assert result.system_logs == [
        "The executors ran directly on the node: images are ignored and no limits are enforced."
    ]
    assert result.state == "COMPLETE"
    assert result.started
    assert [(one.exit_code, one.stdout, one.stderr) for one in result.executors] == [
        (0, "inp\u00fct\n", "hi\n"),
        (0, f"inp\u00fct\n{made.root}/tes/m0\n", ""),
    ]
    times = [
        result.start_time,
        *(time for one in result.executors for time in (one.start_time, one.end_time)),
        result.end_time,
    ]
    assert times == sorted(times)
    assert [(out.path, out.url.replace(str(tmp_path), ""), out.size_bytes) for out in result.outputs] == [
        ("/work/logs/out", "/data/out.txt", len(result.executors[1].stdout.encode())),
        ("/work/made/a", "file:///data/a%20dir/a", 7),
        ("/work/logs/err", "/data/glob/logs/err", 0),
    ]
    assert (tmp_path / "data" / "a dir" / "a").read_text() == "inp\u00fct\n"
    progress = made.progress()
    assert progress is not None
    assert (progress.phase, progress.executor) == ("done", 1)
    assert result.start_time <= str(progress.started) <= result.executors[0].start_time
    until(lambda: not reapers(made))


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("exec nothing-like-it", 127)]
)
def test_exit_codes_are_exact_and_stop_the_task(make: Make, script: str, code: int) -> None:
    result = make(sh("exit 0"), sh(script), sh("exit 0")).run()
    assert (result.state, [one.exit_code for one in result.executors]) == ("EXECUTOR_ERROR", [0, code])


def test_ignored_errors_do_not(make: Make) -> None:
    result = make(sh("exit 3", ignore_error=True), executor("no-such-program", ignore_error=True), sh("exit 0")).run()
    assert (result.state, [one.exit_code for one in result.executors]) == ("COMPLETE", [3, 127, 0])
    assert "no-such-program" in result.executors[1].stderr


def test_arguments_arrive_byte_for_byte(make: Make, tmp_path: Path) -> None:
    words = ["a b", "", "'", '"', "$HOME", "`id`", "a\nb", "\u00fc\u4e2d", "; touch /x", "\\", "*", "--x"]
    made = make(
        executor(sys.executable, "-c", "import sys,os; print(*map(os.fsencode, sys.argv[1:]), sep='|')", *words)
    )
    assert made.run().executors[0].stdout == "|".join(repr(word.encode()) for word in words) + "\n"


def test_output_of_any_kind(make: Make) -> None:
    result = make(sh("printf 'a\\377b\\000c\\n'; printf '\\377' >&2")).run()
    assert (result.executors[0].stdout, result.executors[0].stderr) == ("a\ufffdb\0c\n", "\ufffd")


def test_long_output_is_bounded_in_the_result_and_whole_in_its_file(make: Make, tmp_path: Path) -> None:
    made = make(
        sh("head -c 5000000 /dev/zero | tr '\\0' x; echo end", stdout="/w/out"),
        outputs=[job.Output("/w/out", f"{tmp_path}/data/out")],
        mounts=mounts("/w"),
        log_bytes=1000,
    )
    text = made.run().executors[0].stdout
    assert text == "x" * 250 + f"\n[... {5000004 - 1000} bytes left out ...]\n" + "x" * 746 + "end\n"
    assert (tmp_path / "data" / "out").stat().st_size == 5000004


@pytest.mark.parametrize("python", NEW.values(), ids=NEW)
def test_a_result_that_would_be_too_long_lists_the_first_files_and_says_so(
    make: Make, tmp_path: Path, python: str
) -> None:
    """Every output is sent, so the task must not end, or be run again, because the list of them is long."""
    made = make(
        sh("mkdir /w/many; cd /w/many; i=100; while [ $i -lt 300 ]; do : > file-$i; i=$((i+1)); done; echo done"),
        outputs=[job.Output("/w/many", f"{tmp_path}/data/many", job.DIRECTORY)],
        mounts=mounts("/w"),
        result_bytes=8000,
        python=python,
    )
    result = made.run()
    listed = len(result.outputs)
    assert (result.state, result.executors[0].stdout) == ("COMPLETE", "done\n")
    assert len(list((tmp_path / "data" / "many").iterdir())) == 200
    assert 0 < listed < 200
    assert (made.root / "metadata" / "result.json").stat().st_size <= 8000
    assert result.system_logs[1:] == [
        f"outputs: {200 - listed} of the 200 files that were sent are not listed: a result may take at most 8000 bytes."
    ]


def test_a_result_that_would_be_too_long_by_its_logs_tells_the_exit_codes(make: Make, tmp_path: Path) -> None:
    made = make(
        sh("head -c 50000 /dev/zero | tr '\\0' '\\1'; : > /w/o", ignore_error=True),
        sh("head -c 50000 /dev/zero >&2; exit 7"),
        outputs=[job.Output("/w/o", f"{tmp_path}/data/o")],
        mounts=mounts("/w"),
        result_bytes=8000,
    )
    result = made.run()
    assert (result.state, [each.exit_code for each in result.executors]) == ("EXECUTOR_ERROR", [0, 7])
    assert (made.root / "metadata" / "result.json").stat().st_size <= 8000
    assert "bytes left out" in result.executors[0].stdout
    assert [each.path for each in result.outputs] == ["/w/o"]
    assert "a result may take at most 8000 bytes" in result.system_logs[-1]


def test_both_streams_may_share_a_file(make: Make, tmp_path: Path) -> None:
    made = make(
        sh("echo 1; echo 2 >&2", stdout="/w/o", stderr="/w/o"),
        outputs=[job.Output("/w/o", f"{tmp_path}/data/o")],
        mounts=mounts("/w"),
    )
    assert made.run().state == "COMPLETE"
    assert sorted((tmp_path / "data" / "o").read_text().split()) == ["1", "2"]


def test_an_executor_without_stdin_finds_it_empty(make: Make) -> None:
    assert make(sh("cat; echo end")).run().executors[0].stdout == "end\n"


def test_a_daemon_left_behind_neither_delays_nor_survives(make: Make) -> None:
    made = make(executor(sys.executable, "-c", "import os,time\nif os.fork() == 0:\n os.setsid()\n time.sleep(600)"))
    assert made.run().state == "COMPLETE"
    assert marked(made.id) == []


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"inputs": [job.Input("/w/x", url="/etc/passwd")]}, "inputs[0].url: /etc/passwd leads outside"),
        ({"inputs": [job.Input("/w/x", url="{data}/none")]}, "inputs[0].url: {data}/none does not exist"),
        (
            {"inputs": [job.Input("/w/x", url="gopher://h/x")]},
            "inputs[0].url: cannot transfer this kind of URL (scheme: gopher)",
        ),
        ({"inputs": [job.Input("/w/x")]}, "inputs[0]: neither url nor content"),
        ({"inputs": [job.Input("/nowhere/x", content="x")]}, "inputs[0].path: /nowhere/x leads outside"),
        ({"executors": [sh("exit 0", stdin="/w/none")]}, "executors[0].stdin: /w/none does not exist"),
        ({"executors": [sh("exit 0", stdout="/etc/out")]}, "executors[0].stdout: /etc/out leads outside"),
        ({"runtime": job.Runtime("magic")}, "runtime.kind: 'magic'"),
        ({"mounts": [job.Mount("/w", "../..")]}, "mounts[0] (/w)"),
    ],
)
def test_what_cannot_be_staged_is_one_sentence_that_names_the_field(
    make: Make, tmp_path: Path, plan: dict[str, Any], said: str
) -> None:
    data = str(tmp_path / "data")
    inputs = [one._replace(url=one.url and one.url.format(data=data)) for one in plan.get("inputs", [])]
    result = make(**{"executors": [sh("exit 0")], "mounts": mounts("/w"), **plan, "inputs": inputs}).run()
    assert (result.state, result.started, result.executors) == ("SYSTEM_ERROR", False, [])
    assert result.system_logs[-1].startswith(said.format(data=data))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (job.Output("/w/none", "{data}/x"), "outputs[0].path: /w/none does not exist"),
        (job.Output("/w/none", "{data}/x", job.DIRECTORY), "outputs[0].path: /w/none does not exist"),
        (job.Output("/single", "{data}/x"), "outputs[0].path: /single does not exist"),
        (job.Output("/w/link", "{data}/x"), "outputs[0]: /w/link leads outside"),
        (job.Output("/w/fifo", "{data}/x"), "outputs[0]: /w/fifo is not a regular file"),
        (job.Output("/w/file", "{data}/x", job.DIRECTORY), "outputs[0]: /w/file is a file, not a directory"),
        (job.Output("/w/file", "/etc/x"), "outputs[0].url: /etc/x leads outside"),
        (job.Output("/w/file", "ftpx://h/x"), "outputs[0].url: cannot transfer"),
        (job.Output("/w", "/etc/x", job.DIRECTORY), "outputs[0].url: /etc/x leads outside"),
    ],
)
def test_missing_outputs(make: Make, tmp_path: Path, output: job.Output, said: str) -> None:
    """They are a system error after a success, and change nothing about an executor's."""
    output = output._replace(url=output.url.format(data=tmp_path / "data"))
    script = "ln -s /etc/passwd /w/link; mkfifo /w/fifo; echo x > /w/file; exit "
    plan = {"outputs": [output], "mounts": [*mounts("/w"), job.Mount("/single", "single", job.FILE)]}
    good = make(sh(script + "0"), **plan).run()
    assert (good.state, good.outputs) == ("SYSTEM_ERROR", [])
    assert good.system_logs[-1].startswith(said)
    bad = make(sh(script + "4"), **plan).run()
    assert (bad.state, bad.executors[0].exit_code) == ("EXECUTOR_ERROR", 4)


@pytest.mark.parametrize("state", ["COMPLETE", "EXECUTOR_ERROR"])
@pytest.mark.parametrize("kind", [job.FILE, job.DIRECTORY])
@pytest.mark.parametrize("script", ["echo x > /w/d/f", "true"])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_root_that_the_node_does_not_have(
    make: Make, tmp_path: Path, state: str, kind: str, script: str, there: bool
) -> None:
    """It is named, whatever became of the executor: nothing is sent, and that is no matter of the output's path."""
    root = tmp_path / "gone"
    if there:
        root.touch()
    said = f"the file root {root} " + ("is not a directory on the node" if there else "does not exist on the node")
    end = "0" if state == "COMPLETE" else "3"
    output = job.Output("/w/d", str(root), kind) if kind == job.DIRECTORY else job.Output("/w/g", f"{root}/a/b")
    plan = {"outputs": [output], "mounts": mounts("/w"), "file_roots": [job.FileRoot(str(root))]}
    result = make(sh(f"mkdir /w/d; {script}; echo y > /w/g; exit {end}"), **plan).run()
    assert result.system_logs[-1] == f"outputs[0].url: {said}"
    assert result.state == ("SYSTEM_ERROR" if state == "COMPLETE" else state)
    for way in (job.FILE, job.DIRECTORY):
        result = make(sh("true"), **{**plan, "inputs": [job.Input("/w/x", way, f"file://{root}/a")]}).run()
        assert (result.state, result.system_logs[-1]) == ("SYSTEM_ERROR", f"inputs[0].url: {said}")


@pytest.mark.parametrize("scheme", ["http", "file", "bare"])
def test_an_output_file_that_is_a_directory_is_sent_as_one(make: Make, tmp_path: Path, scheme: str) -> None:
    """Nobody need have said that it is a file: that is what TES takes a type that is not given for."""
    store = Store(tmp_path, scheme)
    try:
        made = make(
            sh("mkdir -p /w/d/sub; echo 1 > /w/d/a; echo 2 > /w/d/sub/b"),
            outputs=[job.Output("/w/d", store.url("up"))],
            mounts=mounts("/w"),
            file_roots=[job.FileRoot(str(store.place))],
        )
        result = made.run()
        assert (result.state, result.system_logs[1:]) == (
            "COMPLETE",
            ["outputs[0]: /w/d is a directory, and sent as one"],
        )
        assert [(out.path, out.url) for out in result.outputs] == [
            ("/w/d/a", store.url("up/a")),
            ("/w/d/sub/b", store.url("up/sub/b")),
        ]
        assert (store.get("up/a"), store.get("up/sub/b")) == (b"1\n", b"2\n")
    finally:
        store.close()


@pytest.mark.parametrize("start", ["", "file://"])
def test_an_input_file_that_is_a_directory_is_copied_as_one(make: Make, tmp_path: Path, start: str) -> None:
    folder = tmp_path / "data" / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_text("2")
    inputs = [job.Input("/w/x", url=f"{start}{folder}")]
    result = make(sh("cat /w/x/sub/b"), inputs=inputs, mounts=mounts("/w")).run()
    assert (result.state, result.executors[0].stdout) == ("COMPLETE", "2")
    assert f"inputs[0]: {start}{folder} is a directory, and taken as one" in result.system_logs


def test_but_not_where_a_single_file_is_mounted(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "d"
    folder.mkdir(parents=True)
    plan = {"inputs": [job.Input("/one", url=str(folder))], "mounts": [job.Mount("/one", "one", job.FILE)]}
    result = make(sh("true"), **plan).run()
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert result.system_logs[-1] == (
        f"inputs[0].url: {folder} is a directory, but /one is mounted as a single file; "
        "give the input the type DIRECTORY"
    )


def test_a_listing_without_files_is_told(make: Make, tmp_path: Path) -> None:
    store = Store(tmp_path, "http")
    try:
        for name in ("d/e1", "d/e2", "none"):
            (store.place / name).mkdir(parents=True)
        store.put("d/f", b"x")
        inputs = [job.Input(f"/w/{name}", job.DIRECTORY, store.url(name)) for name in ("d", "none")]
        result = make(sh("ls /w/d"), inputs=inputs, mounts=mounts("/w")).run()
        assert (result.state, result.executors[0].stdout) == ("COMPLETE", "e1\ne2\nf\n")
        told = [line for line in result.system_logs if "lists no" in line]
        assert len(told) == 2
        assert told[0].startswith(f"inputs[0].url: {store.url('d/e')}")
        assert told[0].endswith("/ lists no files (nor do 1 other directories)")
        assert told[1] == f"inputs[1].url: {store.url('none/')} lists no files"
    finally:
        store.close()


def test_outputs_are_sent_as_far_as_they_exist_after_a_failure(make: Make, tmp_path: Path) -> None:
    outputs = [job.Output("/w/none", f"{tmp_path}/data/none"), job.Output("/w/rc", f"{tmp_path}/data/rc")]
    result = make(sh("echo 1 > /w/rc; exit 1"), outputs=outputs, mounts=mounts("/w")).run()
    assert (result.state, [out.path for out in result.outputs]) == ("EXECUTOR_ERROR", ["/w/rc"])


def test_hostile_outputs_are_left_out_with_a_word(make: Make, tmp_path: Path) -> None:
    script = "cd /w; ln -s /etc leak; ln -s /etc/passwd file; mkfifo fifo; mkdir ok; echo x > ok/x; ln -s ok again"
    script += "; ln -s . ok/loop"
    outputs = [
        job.Output("/w", f"{tmp_path}/data/dir", job.DIRECTORY),
        job.Output("/w/*", f"{tmp_path}/data/glob", prefix="/w/"),
    ]
    result = make(sh(script), outputs=outputs, mounts=mounts("/w")).run()
    assert result.state == "COMPLETE"
    for target in ("dir", "glob"):
        found = sorted(
            str(path.relative_to(tmp_path / "data" / target)) for path in (tmp_path / "data" / target).rglob("*")
        )
        assert {"again", "again/x", "ok", "ok/x"} <= set(found)
        assert not [name for name in found if "passwd" in name or "leak" in name or name in ("file", "fifo", "ok/loop")]
    assert sum("left out" in line for line in result.system_logs) >= 7


def test_a_cancel_that_is_there_before_the_start(make: Make, tmp_path: Path) -> None:
    made = make(sh("touch /w/ran"), mounts=mounts("/w"))
    made.cancel()
    result = made.run()
    assert (result.state, result.started, result.executors) == ("CANCELED", False, [])
    assert not (made.root / "tes" / "m0" / "ran").exists()


def test_cancel_while_running(make: Make) -> None:
    made = make(sh("trap '' TERM; echo on; sleep 600 & wait; sleep 600"), sh("exit 0")).start()
    until(lambda: (made.progress() or job.Progress("")).stdout == "on\n")
    made.cancel()
    assert made.wait() == 0
    result = made.result()
    assert (result.state, result.started) == ("CANCELED", True)
    assert [(each.exit_code, each.stdout) for each in result.executors] == [(137, "on\n")]
    assert marked(made.id) == []


def test_read_only_mounts_are_filled_and_then_left_alone(make: Make, tmp_path: Path) -> None:
    plan = {
        "inputs": [job.Input("/in/x", content="x"), job.Input("/one", content="")],
        "outputs": [job.Output("/one", f"{tmp_path}/data/one")],
        "mounts": [job.Mount("/in", "in", read_only=True), job.Mount("/one", "one", job.FILE, read_only=True)],
    }
    result = make(sh("cat /in/x"), **plan).run()
    assert (result.state, result.executors[0].stdout, len(result.outputs)) == ("COMPLETE", "x", 1)
    result = make(sh("exit 0", stdout="/in/y"), **plan).run()
    assert "executors[0].stdout: /in/y may not be written to" in result.system_logs


def test_a_result_that_cannot_be_stored_at_once(make: Make) -> None:
    """The reaper goes on trying, and then says less."""
    made = make(sh("exit 0"))
    (made.root / "metadata").rmdir()
    (made.root / "metadata").touch()  # in the way
    assert made.start().wait() == job.EXIT_NO_RESULT
    assert made.said == b""
    (made.root / "metadata").unlink()
    until(made.has_result)
    assert made.result().state == "SYSTEM_ERROR"


def test_cancel_stops_a_transfer_that_hangs(make: Make) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        made = make(sh("exit 0"), inputs=[job.Input("/w/x", url=url)], mounts=mounts("/w")).start()
        with silent.accept()[0]:
            made.cancel()
            assert made.wait() == 0
    assert (made.result().state, made.result().started) == ("CANCELED", False)


def test_the_nodes_own_wish_to_stop_is_no_cancel(make: Make) -> None:
    made = make(sh("exit 0"), sh("echo half; exec sleep 600")).start()
    until(lambda: (made.progress() or job.Progress("")).stdout == "half\n")
    assert made.process is not None
    made.process.send_signal(signal.SIGTERM)
    assert made.wait() == 0
    assert (made.result().state, made.result().started) == ("SYSTEM_ERROR", True)
    assert made.result().infrastructure
    assert "signal 15" in made.result().system_logs[-1]
    assert [(each.exit_code, each.stdout) for each in made.result().executors] == [(0, ""), (143, "half\n")]


@pytest.mark.parametrize("canceled", [False, True])
def test_the_reaper_ends_what_a_killed_runner_left(make: Make, canceled: bool) -> None:
    script = "import os,time\nif os.fork() == 0: os.setsid()\ntime.sleep(600)"
    made = make(sh("echo first"), executor(sys.executable, "-c", script)).start()
    until(lambda: (made.progress() or job.Progress("")).executor == 1)
    until(lambda: len(marked(made.id)) == 2)
    if canceled:
        made.cancel()  # and at once the kill: whichever comes first, the result says the same
    made.kill()
    until(made.has_result)
    result = made.result()
    assert (result.state, result.started) == ("CANCELED" if canceled else "SYSTEM_ERROR", True)
    ended = [one.stdout for one in result.executors]
    assert ended in (["first\n"], ["first\n", ""])  # the runner may still hear of the second's end before its own
    assert canceled or "killed" in result.system_logs[0]
    # Another try may help, unless the second one seems to have failed by itself.
    assert result.infrastructure is (not canceled and len(ended) == 1)
    assert marked(made.id) == []
    assert until(lambda: made.progress()).phase == "done"
    until(lambda: not reapers(made))


def test_a_job_whose_directory_is_removed_stops(make: Make) -> None:
    """A node that lost sight of a job may clean up while it runs: nobody wants it any more, and nobody can tell it."""
    made = make(sh("sleep 600")).start()
    until(lambda: marked(made.id))
    shutil.rmtree(made.root, ignore_errors=True)
    made.wait()
    until(lambda: not marked(made.id))
    until(lambda: not reapers(made))


def test_killed_before_anything_was_started(make: Make) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        made = make(sh("exit 0"), inputs=[job.Input("/w/x", url=url)], mounts=mounts("/w")).start()
        silent.accept()[0].close()
        made.kill()
    until(made.has_result)
    assert (made.result().state, made.result().started, made.result().infrastructure) == ("SYSTEM_ERROR", False, True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_executor_that_failed_is_to_blame_whatever_comes_after(make: Make, number: signal.Signals) -> None:
    """The runner ends during the upload; another try would repeat a failure."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        made = make(
            sh("echo x > /w/x; exit 3"), outputs=[job.Output("/w/x", url)], mounts=mounts("/w"), runtime=HOST
        ).start()
        with silent.accept()[0]:
            assert made.process is not None
            made.process.send_signal(number)
            made.wait()
    until(made.has_result)
    result = made.result()
    assert (result.state, result.infrastructure) == ("SYSTEM_ERROR", False)
    assert [one.exit_code for one in result.executors] == [3]


def test_an_engine_that_does_not_answer(make: Make, tmp_path: Path) -> None:
    away = job.Runtime("docker", docker_host=f"unix://{tmp_path}/none.sock")
    result = make(sh("exit 0"), runtime=away).run()
    assert (result.state, result.started, result.infrastructure) == ("SYSTEM_ERROR", False, True)
    assert "No Docker engine answers" in result.system_logs[0]
    wrong = job.Runtime("docker", docker_host="nowhere")
    result = make(sh("exit 0"), runtime=wrong).run()
    assert (result.state, result.infrastructure) == ("SYSTEM_ERROR", False), "no other try would change that"


def test_a_job_whose_directory_is_gone_bothers_nobody(make: Make) -> None:
    import shutil

    made = make(sh("sleep 600")).start()
    made.wait_for_phase("running")
    shutil.rmtree(made.root)
    made.kill()
    until(lambda: not marked(made.id))
    assert not made.root.exists()


def test_a_second_runner_touches_nothing(make: Make) -> None:
    made = make(sh("sleep 600")).start()
    before = made.wait_for_phase("running")
    second = subprocess.run(
        [sys.executable, *bundle.command(BUNDLE.sha256).split()[1:]], cwd=made.root / "working", capture_output=True
    )
    assert second.returncode == job.EXIT_DUPLICATE
    assert second.stderr.isascii()
    assert made.progress() == before
    assert not made.has_result()
    made.cancel()
    assert made.wait() == 0


def test_a_job_id_is_never_run_twice_even_without_its_directory(make: Make, tmp_path: Path) -> None:
    """A process that was paused may submit a job late, when its directory was cleaned away long ago."""
    script = f"echo ran >> {tmp_path}/data/ran"
    made = make(sh(script))
    assert made.run().state == "COMPLETE"
    shutil.rmtree(made.root)
    again = make(sh(script), job_id=made.id)
    assert again.root == made.root
    assert again.start().wait() == job.EXIT_DUPLICATE
    assert again.said.isascii()
    assert not again.has_result()
    assert (tmp_path / "data" / "ran").read_text() == "ran\n"
    assert make(sh("exit 0")).run().state == "COMPLETE", "another job"


def test_the_mark_of_a_job_lies_beside_the_delivered_zipapp(make: Make, tmp_path: Path) -> None:
    made = make(sh("exit 0"))
    home = made.root.parent / bundle.pseudo_job(BUNDLE.sha256)
    old, young = home / "ran" / "old00", home / "ran" / "young"
    for shard in (old, young):
        shard.mkdir(parents=True)
        (shard / "x-1").touch()
    os.utime(old, (time.time() - 31 * 86400,) * 2)
    os.utime(young, (time.time() - 29 * 86400,) * 2)
    assert made.run().state == "COMPLETE"
    assert (home / "ran" / made.id[:5] / made.id).exists()
    assert (old.exists(), (young / "x-1").exists()) == (False, True)


def test_a_zipapp_of_the_jobs_own_makes_no_mark(make: Make) -> None:
    made = make(sh("exit 0"))
    (made.root / "inputs" / "runner.pyz").write_bytes(BUNDLE.data)
    assert made.run(command=f"python3 -IS ../inputs/runner.pyz run {BUNDLE.sha256}").state == "COMPLETE"
    assert not (made.root / "ran").exists()
    assert not (made.root.parent / bundle.pseudo_job(BUNDLE.sha256) / "ran").exists()


@pytest.mark.parametrize("at", ["ran", "ran/{shard}"])
def test_where_no_mark_can_be_made_the_job_runs(make: Make, at: str) -> None:
    made = make(sh("exit 0"))
    place = made.root.parent / bundle.pseudo_job(BUNDLE.sha256) / at.format(shard=made.id[:5])
    place.parent.mkdir(exist_ok=True)
    place.touch()  # in the way
    assert made.run().state == "COMPLETE"


def test_the_local_site_never_runs_a_job_id_twice(tmp_path: Path) -> None:
    async def go() -> None:
        runtime = job.Runtime("host")
        plan = job.Plan("t1-1", "t1", [sh(f"echo ran >> {tmp_path}/ran")], runtime=runtime)
        async with LocalSite(SiteFacts(name="here", runtime=runtime), tmp_path / "jobs", BUNDLE) as site:
            for code in (job.EXIT_DONE, job.EXIT_DUPLICATE):
                await site.submit(plan)
                async with asyncio.timeout(30):
                    while (seen := (await site.observe([plan.job_id]))[0]).exit_code is None:
                        await asyncio.sleep(0.02)
                assert (seen.phase, seen.exit_code) == (Phase.ENDED, code)
                assert await site.forget(plan.job_id, force=True)

    asyncio.run(go())
    assert (tmp_path / "ran").read_text() == "ran\n"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        '{"job_id": "x"}',
        "\xff",
        '{"job_id": "x", "task_id": "x", "executors": 1}',
    ],
)
def test_a_bad_plan(make: Make, text: str | None) -> None:
    made = make(sh("exit 0"))
    made.plan_file.unlink()
    if text is not None:
        made.plan_file.write_text(text, "latin-1")
    assert made.start().wait() == job.EXIT_BAD_PLAN
    assert made.said.isascii()
    assert not made.has_result()


def test_a_damaged_zipapp(make: Make) -> None:
    made = make(sh("exit 0"))
    archive = made.root.parent / bundle.pseudo_job(BUNDLE.sha256) / "inputs" / bundle.FILE_NAME
    data = bytearray(BUNDLE.data)
    data[data.index(b"tes-lock")] ^= 1
    archive.write_bytes(data)
    assert made.start().wait() == job.EXIT_DAMAGED_RUNNER
    archive.write_bytes(BUNDLE.data[:-100])
    assert make(sh("exit 0")).start().wait() in (job.EXIT_UNREADABLE_RUNNER, job.EXIT_NO_RUNNER)
    archive.unlink()
    assert make(sh("exit 0")).start().wait() == job.EXIT_NO_RUNNER


@pytest.mark.parametrize("python", NEW.values(), ids=NEW)
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_every_python(make: Make, tmp_path: Path, python: str, locale: str) -> None:
    made = make(
        sh("cat /w/\u00e4; echo $V; cat", stdin="/w/\u00e4", stdout="/w/\u00f6", env={"V": "\u4e2d"}),
        inputs=[job.Input("/w/\u00e4", content="\u00fc\n")],
        outputs=[
            job.Output("/w", f"{tmp_path}/data/\u00e9", job.DIRECTORY),
            job.Output("/w/[!a]", f"{tmp_path}/data/g", prefix="/w"),
        ],
        mounts=mounts("/w"),
        python=python,
    )
    result = made.run(env={"LC_ALL": locale})
    assert (result.state, result.executors[0].stdout) == ("COMPLETE", "\u00fc\n\u4e2d\n\u00fc\n")
    assert len(result.outputs) == 4
    assert (tmp_path / "data" / "\u00e9" / "\u00f6").read_text() == "\u00fc\n\u4e2d\n\u00fc\n"


@pytest.mark.parametrize("python", NEW.values(), ids=NEW)
def test_every_python_over_http(make: Make, tmp_path: Path, python: str) -> None:
    store = Store(tmp_path, "http")
    try:
        store.put("d/sub dir/\u00e4", b"x" * 1000)
        made = make(
            sh("cp -r /w/in /w/out"),
            inputs=[job.Input("/w/in", job.DIRECTORY, store.url("d"))],
            outputs=[job.Output("/w/out", store.url("up"), job.DIRECTORY)],
            mounts=mounts("/w"),
            python=python,
        )
        assert (made.run().state, made.result().system_logs[1:]) == ("COMPLETE", [])
        assert store.get("up/sub dir/\u00e4") == b"x" * 1000
    finally:
        store.close()


def test_an_old_python_says_so(make: Make) -> None:
    if "2.7" not in PYTHONS:
        pytest.skip("there is no Python 2.7 here")
    made = make(sh("exit 0"), python=PYTHONS["2.7"])
    assert made.start(bundle.command(BUNDLE.sha256).replace("-IS", "-S")).wait() == job.EXIT_OLD_PYTHON


def test_the_result_comes_before_done_and_both_are_ascii(make: Make) -> None:
    result = make(sh("printf '\u00fc'"), executor("x\u00fcy")).run()
    assert result.executors[1].exit_code == 127
    json.dumps(job.to_document(result)).encode("ascii")


def reapers(made: Job) -> list[int]:
    """The processes of a job's runner that are still there, the reaper among them."""
    found = []
    ((name, value),) = made.mark.items()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            mine = f"{name}={value}".encode() in path.read_bytes().split(b"\0")
            if mine and (path.parent / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


# Progress


@pytest.mark.parametrize("python", NEW.values(), ids=NEW)
def test_progress_shows_the_end_of_what_was_written(make: Make, tmp_path: Path, python: str) -> None:
    go = tmp_path / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.05; done"
    script = f"head -c 10000 /dev/zero | tr '\\0' x; printf '\\n\\303\\244\\377\\303'; echo oops >&2; {wait}"
    made = make(sh("echo before"), sh(script), python=python).start()

    def there() -> job.Progress | None:
        found = made.progress()
        return found if found and found.stdout_bytes == 10004 and found.stderr else None

    found = until(there)
    assert found.executor == 1
    assert found.stdout == "x" * 4091 + "\n\u00e4?"
    assert (found.stderr, found.stderr_bytes) == ("oops\n", 5)
    go.touch()
    assert made.wait() == 0
    last = made.progress()
    assert last is not None
    assert (last.phase, last.stdout, last.stdout_bytes) == ("done", "", 0)


class Desk(http.server.BaseHTTPRequestHandler):
    """Takes reports, and answers that the job is to stop as soon as its first executor has started."""

    protocol_version = "HTTP/1.1"
    reports: list[dict[str, Any]]
    headers_seen: list[str]

    def do_POST(self) -> None:
        report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reports.append(report)
        self.headers_seen.append(self.headers["Authorization"])
        stop = report["progress"]["phase"] == "running"
        body = json.dumps({"cancel": stop, "version": 1, "of_a_newer_release": 1}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def desk(certificates: Certificates | None = None) -> Iterator[tuple[type[Desk], job.ReportTo]]:
    """A desk of its own, over TLS if there are certificates, and where to report to."""

    class Mine(Desk):
        reports: list[dict[str, Any]] = []
        headers_seen: list[str] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine) as server:
        if certificates is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates.server)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scheme = "https" if certificates else "http"
        yield Mine, job.ReportTo(f"{scheme}://127.0.0.1:{server.server_port}/reports/of", "token")
        server.shutdown()


@pytest.mark.parametrize("python", NEW.values(), ids=NEW)
def test_reports_tell_the_phases_and_the_result_and_bring_the_cancel(make: Make, python: str) -> None:
    with desk() as (mine, to):
        made = make(sh("sleep 1000"), report=to, python=python)
        result = made.run()
    assert result.state == "CANCELED"
    phases = [each["progress"]["phase"] for each in mine.reports]
    assert phases[-1] == "done"
    assert "running" in phases
    assert mine.reports[-1]["result"] == job.to_document(result)
    assert set(mine.headers_seen) == {"Bearer token"}
    assert json.loads((made.root / "answer.json").read_text("ascii"))["cancel"] is True, "the reaper would see it too"


@pytest.mark.parametrize("trusted", [True, False])
def test_reports_go_only_to_a_server_with_a_certificate_that_the_node_trusts(
    make: Make, tmp_path: Path, trusted: bool
) -> None:
    certificates = make_certificates(tmp_path / "tls")
    with desk(certificates) as (mine, to):
        made = make(sh("true"), report=to)
        assert made.run(env={"SSL_CERT_FILE": str(certificates.authority)} if trusted else {}).state == "COMPLETE"
    assert bool(mine.headers_seen) is trusted
    if trusted:
        assert mine.reports[-1]["result"]["state"] == "COMPLETE"


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 500 no\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", b"\0" * 99],
    ids=["nothing", "500", "no JSON", "no HTTP"],
)
def test_nonsense_for_an_answer_does_not_disturb_a_job(make: Make, answer: bytes) -> None:
    def talk(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=talk, args=(listener,), daemon=True).start()
        to = job.ReportTo(f"http://127.0.0.1:{listener.getsockname()[1]}/x", "token")
        result = make(sh("sleep 0.7; echo good"), report=to).run()
        listener.shutdown(socket.SHUT_RDWR)
    assert result.state == "COMPLETE"
    assert result.executors[0].stdout == "good\n"
