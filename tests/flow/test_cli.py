"""`tesp`: what its commands say about what the user got wrong, in one line, and lists longer than a page."""

from __future__ import annotations

import http.server
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tesp_api.cli import app, client
from tesp_api.descriptors import ENOUGH
from tests.running import Service, until
from tests.support import descriptors

ROOT = Path(__file__).parents[2]


def tesp(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "tesp_api", *arguments, cwd=cwd, **variables)


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


# serve


@pytest.mark.parametrize("directory", ["/etc/passwd", "/proc/nope"])
def test_a_data_directory_that_cannot_be_is_one_line(tmp_path: Path, directory: str) -> None:
    done = tesp("serve", "--port", "0", "--data-dir", directory, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tesp-api cannot start: settings: server.data_dir: {directory} ")
    assert done.stderr.count("\n") == 1


def test_the_app_for_uvicorn_says_it_too(tmp_path: Path) -> None:
    done = python("-c", "import tesp_api.tesp_api", cwd=tmp_path, TESP_SERVER__DATA_DIR="/etc/passwd")
    assert done.returncode == 1
    assert done.stderr == "tesp-api cannot start: settings: server.data_dir: /etc/passwd is not a directory\n"


def test_a_value_for_a_section_is_one_line(tmp_path: Path) -> None:
    done = tesp("serve", "--port", "0", cwd=tmp_path, TESP_SERVER="foo")
    assert done.returncode == 2
    assert done.stderr == "tesp-api cannot start: settings: server is a section, not a value (from TESP_SERVER)\n"


def test_a_section_without_its_profile_does_not_start_an_open_service(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[basic_auth]\nenable = true\n")
    done = tesp("serve", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("[basic_auth] in settings.toml must be [default.basic_auth]\n")


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = tesp("serve", "--port", port, "--data-dir", str(tmp_path / "data"), cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert port in line
    assert "address already in use" in line


# run


def test_connections_leave_file_descriptors_for_the_service_itself(tmp_path: Path) -> None:
    with ExitStack() as stack:
        service = Service(tmp_path, TESP_SERVER__ROLES='["api"]')
        with descriptors(250):
            service.start()
        stack.callback(service.stop)
        own = len(os.listdir(f"/proc/{service.pid}/fd"))  # noqa: PTH208
        soft, hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, ENOUGH)
        most = 4 * own + 100
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (most, hard))
        address = service.http.base_url
        poll, sockets = select.poll(), {}
        for _ in range(most + 20):
            connection = stack.enter_context(socket.create_connection((address.host, address.port or 80)))
            sockets[connection.fileno()] = connection
            poll.register(connection, select.POLLIN)
        until(lambda: len(poll.poll(0)) >= most // 4, what="the end of a quarter of the connections")
        assert len(os.listdir(f"/proc/{service.pid}/fd")) < most  # noqa: PTH208
        assert "connections are open; new ones are closed" in service.log.read_text()
        for connection in sockets.values():
            connection.close()

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(address.join("/healthz")).is_success
            return False

        until(answers, what="an answer")


def test_a_task_file_that_is_not_there(tmp_path: Path) -> None:
    for name, reason in (("nofile.json", "No such file or directory"), (".", "Is a directory")):
        done = tesp("run", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"{name}: {reason}\n")


# list and run, against a server that pages


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A server with 2500 tasks, at most 1000 to a page; the queries and bodies that it saw."""
    seen: list[dict[str, Any]] = []

    def request(method: str, url: str, **more: Any) -> httpx.Response:
        if method == "POST":
            seen.append({"body": more["content"]})
            return httpx.Response(200, json={"id": "new"})
        params = more["params"]
        seen.append(params.copy())
        size, start = int(params["page_size"]), int(params.get("page_token", "0"))
        if not 0 < size <= 1000:
            return httpx.Response(400, json={"message": "page_size"})
        end = min(start + size, 2500)
        tasks = [
            {"id": f"t{index}", "state": "QUEUED", "creation_time": "2025-06-15T15:06:40Z"}
            for index in range(start, end)
        ]
        return httpx.Response(200, json={"tasks": tasks, **({"next_page_token": str(end)} if end < 2500 else {})})

    monkeypatch.setattr(client.httpx, "request", request)
    return seen


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, ["1"]),
        (1000, ["1000"]),
        (1001, ["1000", "1"]),
        (2400, ["1000", "1000", "400"]),
        (3000, ["1000", "1000", "1000"]),
    ],
)
def test_a_long_list_takes_several_pages(server: list[dict[str, Any]], limit: int, sizes: list[str]) -> None:
    done = CliRunner().invoke(app, ["list", "--limit", str(limit), "--state", "QUEUED"])
    assert done.exit_code == 0, done.output
    ids = [line.split()[0] for line in done.stdout.splitlines()]
    assert ids == [f"t{index}" for index in range(min(limit, 2500))]
    assert [query["page_size"] for query in server] == sizes
    assert all(query["state"] == "QUEUED" for query in server)


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_list_of_nothing_is_refused_here(server: list[dict[str, Any]], limit: str) -> None:
    done = CliRunner().invoke(app, ["list", "--limit", limit])
    assert done.exit_code == 2
    assert "--limit" in done.output
    assert server == []


def test_a_task_from_a_file_or_from_standard_input(server: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_text("{}")
    assert CliRunner().invoke(app, ["run", str(file)]).stdout == "new\n"
    assert CliRunner().invoke(app, ["run", "-"], input="[]").stdout == "new\n"
    assert server == [{"body": b"{}"}, {"body": b"[]"}]


# logs --follow, against a server that shows a task as it goes on


def shown(state: str, logs: list[dict[str, Any]], **metadata: str) -> dict[str, Any]:
    return {"id": "t", "state": state, "logs": [{"logs": logs, "outputs": [], "metadata": metadata}]}


def growing(stdout: str, size: int, executor: int = 0) -> dict[str, Any]:
    told = {"stdout_tail": stdout, "stdout_bytes": str(size), "stderr_tail": "", "stderr_bytes": "0"}
    return shown("RUNNING", [], executor=str(executor), **told)


@pytest.mark.parametrize(
    ("answers", "stdout", "code"),
    [
        (
            [
                {"id": "t", "state": "QUEUED"},
                growing("one\n", 4),
                growing("one\n", 4),
                growing("e\ntw\u00f6\n", 9),
                shown("COMPLETE", [{"exit_code": 0, "stdout": "one\ntw\u00f6\nthree\n"}]),
            ],
            "one\ntw\u00f6\nthree\n",
            0,
        ),
        (
            [growing("a\n", 2), growing("b\n", 2, 1), shown("CANCELED", [{"exit_code": 0, "stdout": "a\n"}])],
            "a\nb\n",
            1,
        ),
        ([growing("abc", 3), growing("xyz", 103)], "abc\n[... 97 bytes left out ...]\nxyz", 0),
        (
            [
                growing("0123", 4),
                shown("EXECUTOR_ERROR", [{"exit_code": 1, "stdout": "012345\n[... 10 bytes left out ...]\nGHIJ"}]),
            ],
            "012345\n[... 10 bytes left out ...]\nGHIJ",
            1,
        ),
        (
            [
                growing("EFGHI", 19),
                shown("SYSTEM_ERROR", [{"exit_code": 1, "stdout": "01\n[... 14 bytes left out ...]\nGHIJ"}]),
            ],
            "\n[... 14 bytes left out ...]\nEFGHIJ",
            1,
        ),
    ],
)
def test_follow(monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, Any]], stdout: str, code: int) -> None:
    left = [*answers, shown("COMPLETE", [])]
    monkeypatch.setattr(client, "LOOK", 0)
    monkeypatch.setattr(client.httpx, "request", lambda *_, **__: httpx.Response(200, json=left.pop(0)))
    done = CliRunner().invoke(app, ["logs", "--follow", "t"])
    assert (done.stdout, done.exit_code) == (stdout, code)


# sites


SITES = {
    "sites": [
        {
            "name": "a",
            "carrier": "rest",
            "health": "up",
            "version": "0.15.16",
            "capacity": {"max_jobs": 8, "cpus": 16.0},
            "load": {"jobs": 2, "cpus": 3.0, "ram_gb": 1.5},
            "zones": [],
            "labels": {},
            "preemptible": False,
            "batch": False,
            "queues": [],
        },
        {
            "name": "far-away",
            "carrier": "amqp",
            "health": "down",
            "capacity": {"disk_gb": 100.0},
            "load": {"jobs": 0, "cpus": 0.0, "ram_gb": 0.0},
            "zones": ["eu-1", "us"],
            "labels": {"gpu": "a100", "disk": "s\u001bd"},
            "preemptible": True,
            "draining": True,
            "batch": True,
            "queues": ["short", "long"],
            "last_error": {"message": "no\u001b[31m answer", "time": "2026-01-31T12:00:00.000000Z"},
        },
    ]
}


class OneAnswer(http.server.BaseHTTPRequestHandler):
    """Knows the page of sites only."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/tesp/v1/sites" else 404)
        self.end_headers()
        self.wfile.write(json.dumps(SITES).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize("path", ["", "/", "/v1", "/ga4gh/tes/v1/"])
def test_the_sites_as_a_table(path: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), OneAnswer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            done = CliRunner().invoke(app, ["sites", "--url", f"http://127.0.0.1:{server.server_port}{path}"])
        finally:
            server.shutdown()
            thread.join()
    assert done.exit_code == 0, done.output
    offers = "zones=eu-1,us labels=gpu:a100,disk:s?d disk_gb=100 preemptible batch queues=short,long"
    error = "2026-01-31T12:00:00Z no?[31m answer"
    assert done.stdout.splitlines() == [
        f"NAME      CARRIER  HEALTH          VERSION  JOBS  CPUS  RAM_GB  {'OFFERS':{len(offers)}}  LAST ERROR",
        "a         rest     up              0.15.16  2/8   3/16  1.5",
        f"far-away  amqp     down, draining           0     0     0       {offers}  {error}",
    ]


# What a command of the client waits for before it begins


HEAVY = """
import runpy, sys
try:
    runpy.run_module("tesp_api", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("exit", end.code)
heavy = {"fastapi", "starlette", "uvicorn", "motor", "pymongo", "dynaconf", "aio_pika"}
print(*sorted(heavy & set(sys.modules)))
print(*sorted({"tesp_api.app", "tesp_api.settings", "tesp_api.store", "tesp_api.tes"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "code"), [(("--help",), 0), (("serve", "--help"), 0), (("sites", "--url", "http://127.0.0.1:1"), 2)]
)
def test_the_client_does_not_load_the_service(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    done = python("-c", HEAVY, *arguments, cwd=tmp_path)
    assert done.stdout.splitlines()[-3:] == [f"exit {code}", "", ""], done.stderr
