"""py-tes gives a create up after 10 s, or after any 5xx, and sends it again to its next base path: one task all the
same. And equal tasks that nobody repeats stay as many as they are."""

from __future__ import annotations

import contextlib
import http.client
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tes
from pymongo import MongoClient

from tests import mongod
from tests.mongod import Mongod
from tests.running import Service, until
from tests.support import require

pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")]

NOWHERE = {"TESP_PULSAR__URL": "http://127.0.0.1:9"}
"""A site that is not there: these tests count tasks and run none."""

Plan = Callable[[int, "Upstream"], tuple[int, bytes]]


class Upstream:
    """One request on its way to a service."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self._method, self._path, self._headers = handler.command, handler.path, dict(handler.headers)
        self._body = body

    def send(self, service: Service) -> http.client.HTTPConnection:
        """Pass it on, and leave the answer to the caller."""
        url = service.http.base_url
        connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
        connection.request(self._method, self._path, self._body, self._headers)
        return connection

    def answer(self, service: Service) -> tuple[int, bytes]:
        """Pass it on, and the answer back."""
        with contextlib.closing(self.send(service)) as connection:
            response = connection.getresponse()
            return response.status, response.read()


class Proxy:
    """Stands before the service and does with the n-th create what the test says."""

    def __init__(self, plan: Plan) -> None:
        proxy = self
        self.creates = 0
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with proxy._lock:
                    proxy.creates += 1
                    number = proxy.creates
                status, text = plan(number, Upstream(self, body))
                with contextlib.suppress(OSError):  # the client has left
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def hello() -> tes.Task:
    return tes.Task(name="hello", executors=[tes.Executor(image="busybox", command=["echo", "hello"])])


def create(url: str) -> str:
    task_id: str = tes.HTTPClient(url).create_task(hello())
    return task_id


@contextlib.contextmanager
def services(directory: Path, number: int, **variables: str) -> Iterator[list[Service]]:
    """Services that share a store: a file, or what the variables name."""
    (directory / "data").mkdir()
    started: list[Service] = []
    with contextlib.ExitStack() as stack:
        for each in range(number):
            own = directory / str(each)
            own.mkdir()
            if "TESP_DB__MONGODB_URI" not in variables:
                (own / "data").symlink_to(directory / "data")
            service = Service(own, **NOWHERE, **variables)
            stack.callback(service.stop)
            service.start()
            started.append(service)
        yield started


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Callable[[], None]]:
    """Nobody can write into the store until the given function is called."""
    lock = sqlite3.connect(directory / "data" / "tasks.sqlite", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN IMMEDIATE")
    try:
        yield lambda: lock.execute("ROLLBACK") and None
    finally:
        lock.close()


def freed_at_the_second_try(service: Service, free: Callable[[], object]) -> Plan:
    """Passes everything on; the store goes on only after the client has come a second time."""

    def plan(number: int, upstream: Upstream) -> tuple[int, bytes]:
        if number == 2:
            threading.Timer(1.0, free).start()
        return upstream.answer(service)

    return plan


def test_a_create_that_takes_longer_than_py_tes_waits(tmp_path: Path) -> None:
    with services(tmp_path, 1) as (service,), locked(tmp_path) as unlock:
        with Proxy(freed_at_the_second_try(service, unlock)) as proxy:
            task_id = create(proxy.url)
            assert proxy.creates == 2
        assert set(service.states()) == {task_id}


def test_a_create_that_takes_longer_than_py_tes_waits_without_a_proxy(tmp_path: Path) -> None:
    with services(tmp_path, 1) as (service,), locked(tmp_path) as unlock:
        threading.Timer(12.0, unlock).start()
        task_id = create(str(service.http.base_url))
        assert set(service.states()) == {task_id}


def test_a_store_that_stands_still(tmp_path: Path) -> None:
    """The first try is answered 503, and the second waits until the store goes on."""
    require(mongod.binary(), "No mongod: see scripts/mongod")
    with (
        Mongod(tmp_path / "mongod") as server,
        services(tmp_path, 1, TESP_DB__MONGODB_URI=server.uri_of("tesp")) as (service,),
    ):
        warm = create(str(service.http.base_url))
        server.pause()
        with Proxy(freed_at_the_second_try(service, server.resume)) as proxy:
            task_id = create(proxy.url)
            assert proxy.creates == 2
        assert set(service.states()) == {warm, task_id}


def test_a_proxy_that_breaks_off(tmp_path: Path) -> None:
    with services(tmp_path, 1) as (service,), locked(tmp_path) as unlock:
        gave_up = threading.Event()

        def plan(number: int, upstream: Upstream) -> tuple[int, bytes]:
            if number == 1:
                connection = upstream.send(service)
                gave_up.wait(1.5)  # the service looks after a second whether anybody is still there
                connection.close()
                return 502, b"{}"
            threading.Timer(0.5, unlock).start()
            return upstream.answer(service)

        with Proxy(plan) as proxy:
            task_id = create(proxy.url)
            assert proxy.creates == 2
        assert set(service.states()) == {task_id}


def test_a_service_that_is_killed_after_storing(tmp_path: Path) -> None:
    """The proxy says 502, and the repeat goes to the other replica."""
    require(mongod.binary(), "No mongod: see scripts/mongod")
    with (
        Mongod(tmp_path / "mongod", None, "--setParameter=enableTestCommands=1") as server,
        services(tmp_path, 2, TESP_DB__MONGODB_URI=server.uri_of("tesp")) as (here, there),
        MongoClient[Any](server.uri) as client,
    ):
        refuse = {"failCommands": ["update"], "errorCode": 6, "appName": "tesp-api"}

        def plan(number: int, upstream: Upstream) -> tuple[int, bytes]:
            if number == 1:
                # Between the create and the removal of its mark there are 50 ms only, so that one must fail.
                client.admin.command("configureFailPoint", "failCommand", mode="alwaysOn", data=refuse)
                assert upstream.answer(here)[0] == 200
                here.kill()
                client.admin.command("configureFailPoint", "failCommand", mode="off")
                return 502, b"{}"
            return upstream.answer(there)

        with Proxy(plan) as proxy:
            task_id = create(proxy.url)
            assert proxy.creates == 2
        assert set(there.states()) == {task_id}
        until(lambda: create(str(there.http.base_url)) != task_id, 30, "the end of the mark")


@pytest.mark.parametrize(("replicas", "store"), [(1, "sqlite"), (2, "sqlite"), (2, "mongo")])
def test_equal_creates_in_parallel(tmp_path: Path, replicas: int, store: str) -> None:
    variables = {}
    if store == "mongo":
        require(mongod.binary(), "No mongod: see scripts/mongod")
        variables["TESP_DB__MONGODB_URI"] = mongod.database_uri()
    with services(tmp_path, replicas, **variables) as started, ThreadPoolExecutor(30) as pool:
        urls = [str(each.http.base_url) for each in started]
        ids = list(pool.map(create, [urls[n % replicas] for n in range(30)]))
        assert len(set(ids)) == 30
        assert set(started[-1].states()) == set(ids)
