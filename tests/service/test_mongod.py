"""What tests/mongod.py promises to the tests that use it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure, ServerSelectionTimeoutError

from tests import mongod
from tests.mongod import Login, Mongod, ReplicaSet
from tests.running import until

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _needs_mongod() -> None:
    mongod.need()


def ids(uri: str) -> set[int]:
    with MongoClient[Any](uri) as client:
        return {each["_id"] for each in client.test.things.find()}


def add(uri: str, *numbers: int, **options: Any) -> None:
    with MongoClient[Any](uri, **{"w": "majority", "journal": True, **options}) as client:
        client.test.things.insert_many([{"_id": number} for number in numbers])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_writes_survive_a_kill_and_a_stop(tmp_path: Path) -> None:
    with Mongod(tmp_path) as server:
        add(server.uri, *range(1000))
        before = server.uri, server.pid
        server.kill()
        assert not server.running
        assert not listens(server.port)
        server.start()
        assert server.uri == before[0]
        assert server.pid != before[1]
        assert ids(server.uri) == set(range(1000))
        server.stop()
        server.start()
        assert ids(server.uri) == set(range(1000))
    assert not listens(server.port)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_paused_server_answers_later(tmp_path: Path) -> None:
    with Mongod(tmp_path) as server:
        add(server.uri, 1)
        server.pause()
        with (
            MongoClient[Any](server.uri, serverSelectionTimeoutMS=300, connectTimeoutMS=200) as client,
            pytest.raises(ServerSelectionTimeoutError),
        ):
            client.test.things.find_one()
        server.resume()
        assert ids(server.uri) == {1}
        server.pause()
        server.stop()
        assert not listens(server.port)


def test_a_taken_port_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(AssertionError, match="Address already in use"):
            Mongod(tmp_path / "fixed", taken).start()
        good = mongod.free_port()
        ports = iter([taken, good])
        monkeypatch.setattr(mongod, "free_port", lambda: next(ports))
        with Mongod(tmp_path / "any") as server:
            assert server.port == good
            assert ids(server.uri) == set()


def test_options_and_a_failing_start(tmp_path: Path) -> None:
    good = Mongod(tmp_path / "good", None, "--setParameter=ttlMonitorSleepSecs=1")
    with good as server, MongoClient[Any](server.uri) as client:
        assert client.admin.command("getParameter", ttlMonitorSleepSecs=1)["ttlMonitorSleepSecs"] == 1
    with pytest.raises(AssertionError, match="nonsense"):
        Mongod(tmp_path / "bad", None, "--nonsense").start()


def test_only_this_machine_can_reach_it(tmp_path: Path) -> None:
    with Mongod(tmp_path) as server:
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{server.port:04X}")]
        assert listening == [f"0100007F:{server.port:04X}"]
        assert f":{server.port:04X} " not in Path("/proc/net/tcp6").read_text()


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = Mongod(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.push(server)
        add(server.uri, 1)
        assert ids(server.uri) == {1}


STARTS_AND_DIES = """
import os, pathlib, signal, sys
from tests.mongod import Mongod
server = Mongod(pathlib.Path(sys.argv[1]))
server.start()
print(server.port, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_dies_with_a_process_that_is_killed(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", STARTS_AND_DIES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    until(lambda: not listens(int(done.stdout)), 10, "the end of mongod")


def test_a_replica_set_of_one_has_transactions(tmp_path: Path) -> None:
    with ReplicaSet(tmp_path) as replicas:
        assert replicas.states() == ["PRIMARY"]
        with MongoClient[Any](replicas.uri) as client, client.start_session() as session:
            with session.start_transaction():
                client.test.things.insert_one({"_id": 1}, session=session)
            session.start_transaction()
            client.test.things.insert_one({"_id": 2}, session=session)
            session.abort_transaction()
        assert ids(replicas.uri) == {1}
        replicas.nodes[0].kill()
        replicas.start()
        assert ids(replicas.uri) == {1}


def test_three_nodes_survive_kills_of_their_primary(tmp_path: Path) -> None:
    with (
        ReplicaSet(tmp_path, nodes=3) as replicas,
        MongoClient[Any](replicas.uri, retryWrites=True, w="majority", serverSelectionTimeoutMS=20000) as client,
    ):
        replicas.settle()
        things = client.test.things
        things.insert_one({"_id": 0})
        for number in (1, 2):
            killed = replicas.primary()
            killed.kill()
            begin = time.monotonic()
            things.insert_one({"_id": number})
            print(f"majority write {time.monotonic() - begin:.2f} s after the kill of the primary")
            assert replicas.primary() is not killed
            assert replicas.states()[replicas.nodes.index(killed)] not in ("PRIMARY", "SECONDARY")
            replicas.start_dead()
            replicas.settle()
        replicas.primary().stop()
        things.insert_one({"_id": 3})
        replicas.start_dead()
        replicas.settle()
        with MongoClient[Any](killed.uri, readPreference="secondaryPreferred") as rejoined:
            until(lambda: {each["_id"] for each in rejoined.test.things.find()} == {0, 1, 2, 3}, 10, "what it missed")


def test_three_nodes_survive_a_primary_that_hangs(tmp_path: Path) -> None:
    # Together they say how long a client believes in a silent server.
    quick: dict[str, Any] = {"connectTimeoutMS": 500, "heartbeatFrequencyMS": 500}
    with ReplicaSet(tmp_path, nodes=3) as replicas, MongoClient[Any](replicas.uri, w="majority", **quick) as client:
        replicas.settle()
        client.test.things.insert_one({"_id": 0})
        hanging = replicas.primary()
        hanging.pause()
        client.test.things.insert_one({"_id": 1})
        assert replicas.primary() is not hanging
        hanging.resume()
        replicas.settle()
        client.test.things.insert_one({"_id": 2})
        assert {each["_id"] for each in client.test.things.find()} == {0, 1, 2}


def test_a_wrong_password_is_refused(tmp_path: Path) -> None:
    with Mongod(tmp_path, login=Login("task/runner", "pass:w@rd")) as server:
        add(server.uri, 1)
        server.kill()
        server.start()
        assert ids(server.uri) == {1}
        assert ids(server.uri_of("other")) == {1}
        with MongoClient[Any]("127.0.0.1", server.port, username="task/runner", password="wrong") as client:
            with pytest.raises(OperationFailure) as refused:
                client.test.things.find_one()
            assert refused.value.code == 18
        with MongoClient[Any]("127.0.0.1", server.port) as client:
            with pytest.raises(OperationFailure) as refused:
                client.test.things.find_one()
            assert refused.value.code == 13


def test_tls_needs_the_authority(tmp_path: Path) -> None:
    made = mongod.make_certificates(tmp_path / "certificates")
    with Mongod(tmp_path / "server", certificates=made, login=Login("user", "password")) as server:
        add(server.uri, 1)
        assert ids(server.uri) == {1}
        assert ids(server.uri.replace("127.0.0.1", "localhost")) == {1}
        for tls in (True, False):
            with (
                MongoClient[Any]("127.0.0.1", server.port, tls=tls, serverSelectionTimeoutMS=500) as client,
                pytest.raises(ServerSelectionTimeoutError, match="certificate verify failed" if tls else "closed"),
            ):
                client.test.things.find_one()


@pytest.mark.parametrize("kind", ["standalone", "replica"])
def test_shared_servers_have_a_database_for_each_test(kind: mongod.Kind) -> None:
    server = mongod.shared(kind)
    assert mongod.shared(kind) is server
    with mongod.database(kind) as one, mongod.database(kind) as two:
        assert one != two
        with MongoClient[Any](one) as first, MongoClient[Any](two) as second:
            first.get_default_database().things.insert_one({"_id": 1})
            assert second.get_default_database().things.count_documents({}) == 0
            name = first.get_default_database().name
            assert name in first.list_database_names()
    with MongoClient[Any](server.uri) as client:
        assert name not in client.list_database_names()
