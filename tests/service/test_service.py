"""The whole service as its users meet it: a real process, its embedded Pulsar, real containers, plain HTTP."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import IMAGE, docker_host
from tests.running import Service, roots, until
from tests.support import require

pytestmark = pytest.mark.service

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    require(docker_host(), "no Docker engine with busybox")
    directory = tmp_path_factory.mktemp("service")
    running = Service(directory, TESP_EMBEDDED__FILE_ROOTS=roots(directory / "files"), CONTAINER_TYPE="docker")
    running.start()  # it makes the root, which nobody has made before
    yield running
    running.stop()


@pytest.fixture
def files(service: Service) -> Path:
    return service.directory / "files"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server for the files in `tmp_path`; its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def run(service: Service, **task: Any) -> dict[str, Any]:
    return service.end(service.post(task))


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"image": IMAGE, "command": ["sh", "-c", script], **more}


# The README's session


def test_the_task_of_the_readme(service: Service, files: Path, web: str, tmp_path: Path) -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    found = re.search(r"-d '(\{.*?\n\})'", readme, re.DOTALL)
    assert found is not None
    body = found.group(1).replace("http://127.0.0.1:8000", web).replace("file:///tmp/tesp-out", f"file://{files}")
    (tmp_path / "hello.txt").write_text("Hello, TES\n")

    task_id = service.post(json.loads(body))
    full = service.end(task_id)

    assert full["state"] == "COMPLETE", full
    digest = hashlib.md5(b"Hello, TES\n").hexdigest()
    assert (files / "hello.md5").read_text() == f"{digest}  -\n"
    log = full["logs"][0]
    assert log["logs"][0]["exit_code"] == 0
    assert log["logs"][0]["stdout"] == f"{digest}  -\n"
    assert log["outputs"] == [{"url": f"file://{files}/hello.md5", "path": "/out/hello.md5", "size_bytes": "36"}]
    assert log["metadata"]["site"] == "embedded"

    assert service.get(task_id, "MINIMAL") == {"id": task_id, "state": "COMPLETE"}
    basic = service.get(task_id, "BASIC")
    assert "stdout" not in basic["logs"][0]["logs"][0]
    assert {key: value for key, value in basic.items() if key != "logs"} == {
        key: value for key, value in full.items() if key != "logs"
    }
    query = {"tag_key": "project", "tag_value": "readme", "state": "COMPLETE"}
    for prefix in ("/v1", "/ga4gh/tes/v1"):
        assert {"id": task_id, "state": "COMPLETE"} in service.http.get(f"{prefix}/tasks", params=query).json()["tasks"]
    service.cancel(task_id)
    assert service.state(task_id) == "COMPLETE"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.json")))
def test_the_examples(service: Service, files: Path, web: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "hello.txt").write_text("Hello, TES\n")
    text = (EXAMPLES / f"{name}.json").read_text()
    text = text.replace("http://127.0.0.1:8000", web).replace("/tmp/tesp-out", str(files / name))
    task = service.end(service.post(json.loads(text)))
    assert task["state"] == "COMPLETE", task


# Executors


def test_executors_in_order_with_their_own_codes_times_and_logs(service: Service) -> None:
    executors = [
        sh("echo one; echo uno >&2; exit 3", ignore_error=True),
        sh("printf '\\377\\376 two'"),
        sh("echo three; exit 42"),
        sh("echo never"),
    ]
    task = run(service, executors=executors)
    assert task["state"] == "EXECUTOR_ERROR"
    logs = task["logs"][0]["logs"]
    assert [log["exit_code"] for log in logs] == [3, 0, 42]
    assert (logs[0]["stdout"], logs[0]["stderr"]) == ("one\n", "uno\n")
    assert logs[1]["stdout"] == "\ufffd\ufffd two"
    assert logs[0]["start_time"] < logs[0]["end_time"] <= logs[1]["start_time"]
    assert task["executors"] == executors


def test_only_ignored_errors_make_a_complete_task_with_real_codes(service: Service) -> None:
    task = run(service, executors=[sh("exit 9", ignore_error=True), sh("true")])
    assert task["state"] == "COMPLETE"
    assert [log["exit_code"] for log in task["logs"][0]["logs"]] == [9, 0]


def test_volumes_are_shared_and_stdio_goes_through_files(service: Service, files: Path) -> None:
    task = run(
        service,
        inputs=[{"path": "/in/text", "content": "line\n" * 3}],
        executors=[
            {"image": IMAGE, "command": ["wc", "-l"], "stdin": "/in/text", "stdout": "/vol/count"},
            sh("cat /vol/count; pwd; echo bad >&2", workdir="/somewhere", stdout="/out/o", stderr="/out/e"),
        ],
        outputs=[{"path": "/out", "url": str(files / "stdio"), "type": "DIRECTORY"}],
        volumes=["/vol"],
    )
    assert task["state"] == "COMPLETE", task
    assert (files / "stdio" / "o").read_text().split() == ["3", "/somewhere"]
    assert (files / "stdio" / "e").read_text() == "bad\n"
    assert {each["path"] for each in task["logs"][0]["outputs"]} == {"/out/o", "/out/e"}


def test_directories_inside_directories_are_there(service: Service, files: Path) -> None:
    task = run(
        service,
        executors=[sh("ls -d /a/b /w/logs /w/sub && echo x > /w/sub/f", stdout="/w/logs/o")],
        volumes=["/a", "/a/b"],
        outputs=[
            {"path": "/w", "url": str(files / "nested"), "type": "DIRECTORY"},
            {"path": "/w/sub/f", "url": str(files / "nested-file")},
        ],
    )
    assert task["state"] == "COMPLETE", task
    assert (files / "nested" / "logs" / "o").read_text().split() == ["/a/b", "/w/logs", "/w/sub"]


def test_resources_are_enforced(service: Service) -> None:
    limits = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null | head -n 1"
    task = run(service, executors=[sh(limits)], resources={"ram_gb": 0.125, "cpu_cores": 1})
    assert task["state"] == "COMPLETE"
    assert task["logs"][0]["logs"][0]["stdout"] == f"{1 << 27}\n"


# Hostile text: it arrives byte for byte or is refused; nothing runs on the host

HOSTILE = [
    "; touch {}",
    "`touch {}`",
    "$(touch {})",
    "' ; touch {} ; '",
    '" ; touch {} ; "',
    "a\nb\n\ntouch {}\n",
    "&& touch {}",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_text_arrives_or_is_refused(service: Service, files: Path, pattern: str, tmp_path: Path) -> None:
    text = pattern.format(tmp_path / "x")
    name = re.sub(r"[/\n]", "-", text)
    task = run(
        service,
        name=text,
        description=text,
        inputs=[{"path": f"/in/{name}", "content": text, "name": text}],
        executors=[
            {"image": IMAGE, "command": ["printf", "%s|%s|", text, ""]},
            {"image": IMAGE, "command": ["env"], "env": {"HOSTILE": text, "END": "1"}},
            {"image": IMAGE, "command": ["pwd"], "workdir": f"/{name}"},
            {"image": IMAGE, "command": ["cat", f"/in/{name}"], "stdout": f"/out/{name}"},
        ],
        outputs=[{"path": f"/out/{name}", "url": str(files / "hostile" / name)}],
        tags={text: text},
    )
    assert task["state"] == "COMPLETE", task["logs"]
    outs = [log["stdout"] for log in task["logs"][0]["logs"]]
    assert outs[0] == f"{text}||"
    assert f"HOSTILE={text}\n" in outs[1]
    assert outs[2] == f"/{name}\n"
    assert outs[3] == text
    assert (files / "hostile" / name).read_text() == text
    assert task["tags"] == {text: text}
    answer = service.http.post("/v1/tasks", json={"executors": [{"image": text, "command": ["true"]}]})
    assert answer.status_code == 400
    assert "executors[0].image" in answer.json()["message"]
    assert not (tmp_path / "x").exists()


def test_argv_is_untouched(service: Service) -> None:
    argv = ["", " ", "a b", "é ü 漢 🎉", "$HOME", "*", "~", "\\", "\t", '"', "'", "-n", "--", "{}", "%s", "a=b", "!x"]
    script = 'for a in "$@"; do printf "%s\\0" "$a"; done | od -An -v -tx1 | tr -d " \\n"'
    task = run(service, executors=[{"image": IMAGE, "command": ["sh", "-c", script, "sh", *argv]}])
    assert bytes.fromhex(task["logs"][0]["logs"][0]["stdout"]).decode().split("\0")[:-1] == argv


# Data


def test_wildcards_directories_and_sizes(service: Service, files: Path, web: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a.txt").write_text("a" * 10)
    (tree / "sub" / "b.txt").write_text("b" * 20)
    task = run(
        service,
        inputs=[{"path": "/work/tree", "url": f"{web}/tree/", "type": "DIRECTORY"}],
        executors=[sh("cd /work && cp tree/a.txt 1.bam && cp tree/sub/b.txt 2.bam && mkdir d && cp -r tree/. d")],
        outputs=[
            {"path": "/work/*.bam", "path_prefix": "/work", "url": str(files / "glob")},
            {"path": "/work/*.none", "path_prefix": "/work", "url": str(files / "none")},
            {"path": "/work/d", "url": f"file://{files}/dir/", "type": "DIRECTORY"},
        ],
    )
    assert task["state"] == "COMPLETE", task
    sizes = {each["path"]: each["size_bytes"] for each in task["logs"][0]["outputs"]}
    assert sizes == {"/work/1.bam": "10", "/work/2.bam": "20", "/work/d/a.txt": "10", "/work/d/sub/b.txt": "20"}
    assert (files / "glob" / "2.bam").read_text() == "b" * 20
    assert (files / "dir" / "sub" / "b.txt").read_text() == "b" * 20


def test_a_mebibyte_of_content(service: Service, files: Path) -> None:
    content = "0123456789abcde\n" * (1 << 16)
    task = run(
        service,
        inputs=[{"path": "/data/big", "content": content}],
        executors=[sh("md5sum < /data/big")],
    )
    assert task["logs"][0]["logs"][0]["stdout"].split()[0] == hashlib.md5(content.encode()).hexdigest()
    assert task["inputs"][0]["content"] == content


# Truthful failures


def _system_error(task: dict[str, Any]) -> str:
    assert task["state"] == "SYSTEM_ERROR", task
    lines: list[str] = task["logs"][0]["system_logs"]
    return "\n".join(lines)


def test_a_missing_named_output_is_named(service: Service, files: Path) -> None:
    task = run(service, executors=[sh("true")], outputs=[{"path": "/out/result", "url": str(files / "result")}])
    assert "outputs[0]" in _system_error(task)
    assert "/out/result" in _system_error(task)


def test_outputs_of_a_failed_executor_are_kept_and_it_stays_executor_error(service: Service, files: Path) -> None:
    task = run(
        service,
        executors=[sh("echo partial > /out/a; exit 1")],
        outputs=[{"path": f"/out/{name}", "url": str(files / "partial" / name)} for name in "ab"],
    )
    assert task["state"] == "EXECUTOR_ERROR"
    assert (files / "partial" / "a").read_text() == "partial\n"


def test_a_missing_image(service: Service) -> None:
    task = run(service, executors=[{"image": "127.0.0.1:9/no/such:image", "command": ["true"]}])
    assert "127.0.0.1:9/no/such:image" in _system_error(task)


def test_a_missing_program_is_the_executors_error(service: Service) -> None:
    task = run(service, executors=[{"image": IMAGE, "command": ["/no/such/program"]}])
    assert task["state"] == "EXECUTOR_ERROR"
    assert task["logs"][0]["logs"][0]["exit_code"] == 127


def test_files_outside_the_roots_are_refused(service: Service, files: Path) -> None:
    (files / "link").symlink_to("/etc/passwd")
    for url in ("/etc/passwd", "file:///etc/passwd", f"{files}/../../etc/passwd", str(files / "link")):
        task = run(service, inputs=[{"path": "/in/x", "url": url}], executors=[sh("cat /in/x")])
        assert "inputs[0].url" in _system_error(task)
        assert not task["logs"][0]["logs"]


def test_links_that_containers_leave_lead_nowhere(service: Service, files: Path) -> None:
    task = run(
        service,
        executors=[sh("ln -s /etc/passwd /out/secret; ln -s ../../../../../../etc/passwd /out/other")],
        outputs=[{"path": "/out/secret", "url": str(files / "stolen")}],
    )
    assert "/out/secret" in _system_error(task)
    assert not (files / "stolen").exists()


def test_no_engine_ends_in_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    socket = tmp_path / "none.sock"
    running = Service(tmp_path, DOCKER_HOST=f"unix://{socket}", TESP_RETRY__BACKOFF="0.1")
    running.start()
    try:
        task = run(running, executors=[sh("true")])
    finally:
        running.stop()
    assert task["state"] == "SYSTEM_ERROR"
    assert len(task["logs"]) == 3, "it may be back in a moment"
    for attempt in task["logs"]:
        (line,) = attempt["system_logs"]
        assert "Docker" in line
        assert "container.runtime" in line


# Cancel, start and stop


def test_cancel_of_a_running_task(service: Service) -> None:
    task_id = service.post({"executors": [sh("echo begun; sleep 300")]})
    until(lambda: service.state(task_id) == "RUNNING")
    service.cancel(task_id)
    assert service.end(task_id, 15)["state"] == "CANCELED"


def test_a_stopped_service_goes_on_with_its_tasks(tmp_path: Path) -> None:
    require(docker_host(), "no Docker engine with busybox")
    (tmp_path / "files").mkdir()
    running = Service(tmp_path, TESP_EMBEDDED__FILE_ROOTS=roots(tmp_path / "files", mount=True))
    running.start()
    go = tmp_path / "files" / "go"
    shared = {"path": "/files", "url": str(tmp_path / "files"), "type": "DIRECTORY"}
    wait = "until [ -e /files/go ]; do sleep 0.1; done; echo line >> /files/ran"
    task_id = running.post({"inputs": [shared], "executors": [sh(wait)]})
    until(lambda: running.state(task_id) == "RUNNING")
    running.stop()
    go.touch()
    running.start()
    try:
        assert running.end(task_id)["state"] == "COMPLETE"
        assert (tmp_path / "files" / "ran").read_text() == "line\n"
    finally:
        running.stop()


def test_a_wrong_setting_stops_the_start_with_one_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "tesp_api", "serve", "--data-dir", str(tmp_path)],
        env={**os.environ, "TESP_SERVER__PROT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tesp-api cannot start: settings: server.prot is not a known key (")
    assert "TESP_SERVER__PORT" in done.stderr
    assert done.stderr.count("\n") == 1
