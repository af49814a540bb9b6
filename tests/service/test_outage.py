"""The store goes away and comes back; services that start, pause, share and divide the work meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests import mongod
from tests.mongod import Mongod, ReplicaSet
from tests.running import FINAL, Service, until

pytestmark = [pytest.mark.service, pytest.mark.timeout(240)]

START = {"CONTAINER_TYPE": "host", "TESP_DISPATCH__LEASE": "3", "TESP_DISPATCH__TAKE_OVER": "1"}
"""Plain processes: what is tested here is the store, and containers cost time."""


QUICK = "&serverSelectionTimeoutMS=1000&connectTimeoutMS=1000&timeoutMS=2000"
"""Options of the URI for tests that need not know how long one waits by default."""


def task(script: str) -> dict[str, object]:
    return {"executors": [{"image": "none", "command": ["sh", "-c", script]}]}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Mongod]:
    """A server of its own, for killing."""
    mongod.need()
    with Mongod(tmp_path / "mongod") as server:
        yield server


Make = Callable[..., Service]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Services on one data directory."""
    made: list[Service] = []

    def start(uri: str, *options: str, **variables: str) -> Service:
        one = Service(tmp_path, TESP_DB__MONGODB_URI=uri, **{**START, **variables})
        one.log = tmp_path / f"service-{len(made)}.log"
        made.append(one)
        one.start(*options)
        return one

    yield start
    for each in made:
        each.stop()


def is_ready(service: Service) -> bool:
    return service.http.get("/readyz").status_code == 200


def test_the_store_goes_away_and_comes_back(database: Mongod, make: Make, tmp_path: Path) -> None:
    service = make(database.uri + QUICK)
    go = tmp_path / "go"
    waiting = service.post(task(f"while [ ! -e {go} ]; do sleep 0.1; done; echo done"))
    until(lambda: service.state(waiting) == "RUNNING")
    database.kill()
    for answer in (
        service.http.get(f"/v1/tasks/{waiting}"),
        service.http.get("/v1/tasks"),
        service.http.post("/v1/tasks", json=task("true")),
        service.http.post(f"/v1/tasks/{waiting}:cancel"),
    ):
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["message"] == "The task store does not answer; please try again."
    assert service.http.get("/healthz").status_code == 200
    ready = service.http.get("/readyz")
    assert (ready.status_code, "MongoDB" in ready.json()["message"]) == (503, True)
    assert "127.0.0.1" not in service.http.get("/v1/tasks").text, "nobody outside need know where the store is"
    go.touch()  # the job ends while nobody can note it
    database.start()
    until(lambda: is_ready(service))
    ended = service.end(waiting)
    assert (ended["state"], ended["logs"][0]["logs"][0]["stdout"]) == ("COMPLETE", "done\n")
    assert len(ended["logs"]) == 1
    assert service.end(service.post(task("true")))["state"] == "COMPLETE"


def test_a_store_that_hangs(database: Mongod, make: Make) -> None:
    """It takes connections and says nothing. A client has its answer before it gives up (py-tes: 10 s)."""
    service = make(database.uri)
    database.pause()
    try:
        with httpx.Client(base_url=service.http.base_url, timeout=9.5) as client:
            assert client.get("/v1/tasks").status_code == 503
            assert client.post("/v1/tasks", json=task("true")).status_code == 503
            assert client.get("/readyz").status_code == 503
    finally:
        database.resume()
    until(lambda: is_ready(service))
    assert service.end(service.post(task("true")))["state"] == "COMPLETE"


def test_a_service_that_starts_before_its_store(database: Mongod, make: Make) -> None:
    database.kill()
    service = make(database.uri + QUICK)
    assert service.http.get("/readyz").status_code == 503
    assert service.http.post("/v1/tasks", json=task("true")).status_code == 503
    database.start()
    until(lambda: is_ready(service))
    assert service.end(service.post(task("true")))["state"] == "COMPLETE"


def serve(directory: Path, uri: str) -> subprocess.CompletedProcess[str]:
    """A service that is expected to end at once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TESP_")}
    return subprocess.run(
        [sys.executable, "-m", "tesp_api", "serve", "--port", "0", "--data-dir", str(directory / "data")],
        env={**environment, **START, "PYTHONPATH": str(Path.cwd()), "TESP_DB__MONGODB_URI": uri},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_wrong_password_ends_the_start_in_one_line(tmp_path: Path) -> None:
    mongod.need()
    with Mongod(tmp_path / "mongod", login=mongod.Login("tesp", "right")) as server:
        ended = serve(tmp_path, server.uri.replace("right@", "wr0ng@"))
        assert ended.returncode != 0
        assert "tesp-api cannot start: MongoDB could not be used: Authentication failed." in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "wr0ng" not in ended.stderr


def test_user_password_and_tls(tmp_path: Path, make: Make) -> None:
    mongod.need()
    certificates = mongod.make_certificates(tmp_path / "certificates")
    with Mongod(tmp_path / "mongod", login=mongod.Login("té:s@p", "p/w%"), certificates=certificates) as server:
        assert "tls" in server.uri
        service = make(server.uri)
        assert service.end(service.post(task("true")))["state"] == "COMPLETE"
        service.stop()


def test_two_machines_do_not_share_an_embedded_pulsar(tmp_path: Path, database: Mongod, make: Make) -> None:
    make(database.uri)
    (tmp_path / "other").mkdir()
    ended = serve(tmp_path / "other", database.uri)
    assert ended.returncode != 0
    assert "tesp-api cannot start: The site 'embedded' on this machine cannot be used" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_roles(database: Mongod, make: Make) -> None:
    front = make(database.uri, TESP_SERVER__ROLES='["api"]')
    task_id = front.post(task("echo hi"))
    assert is_ready(front)
    back = make(database.uri, TESP_SERVER__ROLES="dispatch")
    assert is_ready(back)
    assert back.http.get("/v1/tasks").status_code == 404
    ended = front.end(task_id)
    assert (ended["state"], ended["logs"][0]["logs"][0]["stdout"]) == ("COMPLETE", "hi\n")
    assert "Task" not in front.log.read_text(), "the front does not dispatch"
    front.cancel(endless := front.post(task("sleep 600")))
    assert front.end(endless)["state"] == "CANCELED"


@pytest.mark.parametrize("store", ["sqlite", "mongo"])
def test_workers_share_a_port(tmp_path: Path, make: Make, store: str) -> None:
    if store == "mongo":
        with mongod.database("replica") as uri:
            _work_together(make(uri, "--workers", "3", TESP_EMBEDDED__MAX_JOBS="3"))
    else:
        _work_together(make("", "--workers", "3", TESP_EMBEDDED__MAX_JOBS="3"))


def _work_together(service: Service) -> None:
    ids = [service.post(task("sleep 0.2")) for _ in range(15)]
    most = 0

    def ended() -> bool:
        nonlocal most
        states = Counter(service.states().values())
        most = max(most, sum(states[name] for name in ("INITIALIZING", "RUNNING")))
        return set(states) <= FINAL

    until(ended)
    assert Counter(service.states().values()) == {"COMPLETE": len(ids)}
    assert 0 < most <= 3, "all workers together keep to max_jobs"
    assert all(len(service.get(each)["logs"]) == 1 for each in ids)


def test_one_that_sleeps_through_its_lease_does_no_harm(tmp_path: Path, make: Make) -> None:
    """SIGSTOP longer than lease and take-over, then SIGCONT, at moments of its work that only chance chooses."""
    with mongod.database("replica") as uri:
        sleeper, other = make(uri), make(uri)
        ran = tmp_path / "ran"
        for round in range(3):
            ids = [sleeper.post(task(f"echo {round}-{number} >> {ran}; sleep 0.1")) for number in range(8)]
            until(lambda ids=ids: any(other.state(each) != "QUEUED" for each in ids))
            os.kill(sleeper.pid, signal.SIGSTOP)
            try:
                until(lambda ids=ids: {other.state(each) for each in ids} <= FINAL)
            finally:
                os.kill(sleeper.pid, signal.SIGCONT)
            assert {other.state(each) for each in ids} == {"COMPLETE"}
        assert is_ready(sleeper)
        assert sleeper.end(sleeper.post(task("true")))["state"] == "COMPLETE"
        assert Counter(Counter(ran.read_text().split()).values()) == {1: 24}
        staging = tmp_path / "data" / "pulsar" / "staging"
        until(lambda: [each.name for each in staging.iterdir() if not each.name.startswith("tes-runner-")] == [])


def test_a_primary_that_dies_while_tasks_come(tmp_path: Path, make: Make) -> None:
    """No acknowledged task is lost, and those that were refused can be sent again."""
    mongod.need()
    with ReplicaSet(tmp_path / "set", 3) as cluster:
        service = make(cluster.uri)
        acknowledged: list[str] = []
        stop = threading.Event()

        def write() -> None:
            with httpx.Client(base_url=service.http.base_url, timeout=30) as client:
                while not stop.is_set():
                    answer = client.post("/v1/tasks", json=task("true"))
                    assert answer.status_code in (200, 503), answer.text
                    if answer.status_code == 200:
                        acknowledged.append(answer.json()["id"])

        writers = [threading.Thread(target=write) for _ in range(2)]
        for each in writers:
            each.start()
        try:
            until(lambda: len(acknowledged) > 10)
            cluster.primary().kill()
            seen = len(acknowledged)
            until(lambda: len(acknowledged) > seen + 10)
            cluster.start_dead()
        finally:
            stop.set()
            for each in writers:
                each.join()
        assert set(acknowledged) <= set(service.states())
        service.stop()
