"""A stock Pulsar at our relay: what it is sent arrives, what it says arrives, whoever dies in between."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tesp_api.api.relay import SETTLE
from tesp_api.sites.pulsar import messages
from tesp_api.sites.pulsar.messages import ENDED, Launch
from tesp_api.sites.pulsar.post import KILL, SETUP, STATUS
from tesp_api.sites.pulsar.relay import RelayPost
from tesp_api.store.mongo import MongoStore
from tesp_api.store.sqlite import SqliteStore
from tests import mongod
from tests.pulsars import PulsarMain, exists, free_port, until
from tests.relays import MANAGER, PASSWORD, USER, relay_app, relay_pulsar, served
from tests.running import Service
from tests.running import until as running_until
from tests.support import require

pytestmark = pytest.mark.service

LONG = 100.0
"""Seconds after which something has surely gone wrong."""


@pytest.fixture(autouse=True)
def _needs_pulsar() -> None:
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def pulsar(tmp_path: Path, port: int) -> Iterator[PulsarMain]:
    server = relay_pulsar(tmp_path / "pulsar", f"http://127.0.0.1:{port}")
    yield server
    server.kill()


def setup(job_id: str, command_line: str) -> dict[str, object]:
    return messages.setup_message(Launch(job_id, command_line, ()))


async def ends(post: RelayPost, *job_ids: str) -> dict[str, Any]:
    """The final letters of these jobs. Who waits has to ask: that moves Pulsar on, and it may have lost a job."""

    async def ask() -> None:
        while True:
            for each in job_ids:
                await post.send(STATUS, {"job_id": each})
            await asyncio.sleep(2)

    asking = asyncio.create_task(ask())
    found: dict[str, Any] = {}
    letters = post.letters()
    try:
        async with asyncio.timeout(LONG):
            while not set(job_ids) <= set(found):
                each: Any = await anext(letters)
                if each["status"] in ENDED:
                    found[each["job_id"]] = each
    finally:
        asking.cancel()
        await letters.aclose()
    return found


def test_a_job_is_set_up_tells_of_its_end_and_answers(tmp_path: Path, pulsar: PulsarMain, port: int) -> None:
    async def main() -> None:
        async with SqliteStore(tmp_path / "s") as store, served(relay_app(store.mail, settle=SETTLE), port):
            post = RelayPost(store.mail, MANAGER)
            await post.send(SETUP, setup("early-1", "echo early"))
            pulsar.start()
            found = await ends(post, "early-1")
            assert (found["early-1"]["job_stdout"], found["early-1"]["returncode"]) == ("early\n", 0)
            await post.send(SETUP, setup("late-1", "sh -c 'echo late; exit 3'"))
            assert (await ends(post, "late-1"))["late-1"]["returncode"] == 3
            await post.send(STATUS, {"job_id": "nobody-1"})
            async with asyncio.timeout(LONG):
                async for each in post.letters():
                    if each["job_id"] == "nobody-1":  # type: ignore[index]
                        assert each["status"] == "lost"  # type: ignore[index]
                        break
            assert await post.version() == found["early-1"]["pulsar_version"]

            async def all_passed() -> bool:
                return not await store.mail.read(MANAGER.outbox)

            await until(all_passed, "all letters acknowledged")

    asyncio.run(main())


def test_a_kill_arrives_behind_its_job(tmp_path: Path, pulsar: PulsarMain, port: int) -> None:
    witness = tmp_path / "began"

    async def main() -> None:
        async with SqliteStore(tmp_path / "s") as store, served(relay_app(store.mail, settle=SETTLE), port):
            post = RelayPost(store.mail, MANAGER)
            pulsar.start()
            await post.send(SETUP, setup("long-1", f"sh -c 'echo x > {witness}; sleep 600'"))
            await exists(witness)
            await post.send(KILL, {"job_id": "long-1"})
            await post.send(STATUS, {"job_id": "long-1"})
            assert (await ends(post, "long-1"))["long-1"]["status"] == "cancelled"

    asyncio.run(main())


def test_letters_of_both_sides_survive_the_end_of_the_relay(tmp_path: Path, pulsar: PulsarMain, port: int) -> None:
    """It ends with a job under way and a letter that waits; Pulsar tells of the end when it is back."""
    release = tmp_path / "release"

    async def first() -> None:
        async with SqliteStore(tmp_path / "s") as store:
            post = RelayPost(store.mail, MANAGER)
            async with served(relay_app(store.mail, settle=SETTLE), port):
                pulsar.start()
                command = f"sh -c 'echo x > {tmp_path}/began; while [ ! -e {release} ]; do sleep 0.1; done; echo end'"
                await post.send(SETUP, setup("one-1", command))
                await exists(tmp_path / "began")
            await post.send(SETUP, setup("two-1", "echo waited"))

    async def second() -> None:
        release.touch()
        async with SqliteStore(tmp_path / "s") as store, served(relay_app(store.mail, settle=SETTLE), port):
            found = await ends(RelayPost(store.mail, MANAGER), "one-1", "two-1")
            assert [found[each]["job_stdout"] for each in ("one-1", "two-1")] == ["end\n", "waited\n"]

    asyncio.run(first())
    asyncio.run(second())


def test_letters_in_the_hand_of_a_pulsar_that_is_killed_come_again(
    tmp_path: Path, pulsar: PulsarMain, port: int
) -> None:
    """It has saved its cursor behind all of them, and worked on a few at most."""
    cursor = tmp_path / "pulsar" / "persist" / "_default_-relay-cursor.json"
    jobs = [f"job{number}-1" for number in range(100)]

    async def main() -> None:
        async with SqliteStore(tmp_path / "s") as store, served(relay_app(store.mail, settle=SETTLE), port):
            post = RelayPost(store.mail, MANAGER)
            for each in jobs:
                await post.send(SETUP, setup(each, f"sh -c 'echo {each} >> {tmp_path}/witness-{each}'"))
            pulsar.start()
            last = (await store.mail.read(MANAGER.outbox))[-1].id

            async def saved() -> bool:
                return cursor.exists() and json.loads(cursor.read_text())["job_setup"].endswith(f"-{last}")

            await until(saved, "the cursor behind the last letter")
            pulsar.kill()
            assert len(list(pulsar.staging.glob("job*"))) < len(jobs), "it had worked on all of them"
            pulsar.start()
            await ends(post, *jobs)
            assert len(list(tmp_path.glob("witness-*"))) == len(jobs)

    asyncio.run(main())


def test_what_one_replica_takes_another_passes_on(tmp_path: Path, pulsar: PulsarMain, port: int) -> None:
    async def main(uri: str) -> None:
        async with (
            MongoStore(uri) as ours,
            MongoStore(uri) as theirs,
            served(relay_app(theirs.mail, settle=SETTLE), port),
        ):
            post = RelayPost(ours.mail, MANAGER)
            pulsar.start()
            for number in range(3):
                await post.send(SETUP, setup(f"job{number}-1", f"echo {number}"))
                found = await ends(post, f"job{number}-1")
                assert found[f"job{number}-1"]["job_stdout"] == f"{number}\n"

    mongod.need()
    with mongod.database() as uri:
        asyncio.run(main(uri))


# The whole service


@pytest.fixture
def serving(tmp_path: Path, port: int) -> Iterator[Callable[[], Service]]:
    """Starts the service whose one site is the Pulsar at its relay, always on the same port."""
    file = tmp_path / "settings.toml"
    file.write_text(
        f'[[default.sites]]\nname = "{USER}"\ncarrier = "relay"\nrelay_password = "{PASSWORD}"\nruntime = "host"\n'
        f"file_roots = [{json.dumps(str(tmp_path))}]\n"
    )
    running = Service(tmp_path / "service")

    def start() -> Service:
        running.start("--port", str(port), "--settings", str(file))
        return running

    yield start
    running.stop()


def counted(tmp_path: Path, name: str, more: str = "") -> dict[str, Any]:
    """A task that leaves a line in a file of that name each time it runs."""
    script = f"echo ran >> {tmp_path}/{name}; {more} echo {name}"
    return {"executors": [{"image": "none", "command": ["sh", "-c", script]}]}


def test_a_task_at_a_pulsar_that_only_calls_out(
    tmp_path: Path, serving: Callable[[], Service], pulsar: PulsarMain
) -> None:
    service = serving()
    pulsar.start()
    task = service.end(service.post(counted(tmp_path, "one")), LONG)
    assert task["state"] == "COMPLETE", task
    assert task["logs"][0]["logs"][0]["stdout"] == "one\n"
    canceled = service.post(counted(tmp_path, "two", "sleep 600;"))
    running_until(lambda: (tmp_path / "two").exists(), LONG, "the second task")
    service.cancel(canceled)
    assert service.end(canceled, LONG)["state"] == "CANCELED"
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text() == "ran\n"
    paths = service.http.get("/openapi.json").json()["paths"]
    assert not [each for each in paths if "auth" in each or "messages" in each]
    service.stop()
    log = service.log.read_text()
    assert "graceful shutdown exceeded" not in log, "the poll that was open held up the stop"
    assert PASSWORD not in log


def test_a_service_that_is_killed_loses_no_letter_that_waits(
    tmp_path: Path, serving: Callable[[], Service], pulsar: PulsarMain
) -> None:
    service = serving()
    tasks = [service.post(counted(tmp_path, f"task{number}")) for number in range(3)]

    def waiting() -> int:
        with sqlite3.connect(tmp_path / "service" / "data" / "tasks.sqlite") as db:
            count: int = db.execute("SELECT count(*) FROM letter").fetchone()[0]
        db.close()
        return count

    running_until(waiting, LONG, "a letter that waits")
    service.kill()
    before = waiting()
    assert before > 0
    service = serving()
    assert waiting() >= before
    pulsar.start()
    for number, each in enumerate(tasks):
        assert service.end(each, LONG)["state"] == "COMPLETE"
        assert (tmp_path / f"task{number}").read_text() == "ran\n"


def test_who_is_killed_while_tasks_run(tmp_path: Path, serving: Callable[[], Service], pulsar: PulsarMain) -> None:
    """First Pulsar, then the service: each task runs once and tells of its end."""
    service = serving()
    pulsar.start()
    release = tmp_path / "release"
    wait = f"while [ ! -e {release} ]; do sleep 0.1; done;"
    tasks = [service.post(counted(tmp_path, f"task{number}", wait)) for number in range(3)]
    running_until(lambda: len(list(tmp_path.glob("task?"))) == 3, LONG, "all tasks")
    pulsar.kill()
    pulsar.start()
    service.kill()
    service = serving()
    release.touch()
    for number, each in enumerate(tasks):
        task = service.end(each, LONG)
        assert task["state"] == "COMPLETE", task
        assert (tmp_path / f"task{number}").read_text() == "ran\n"
