"""A stock Pulsar at our relay: what it is sent arrives, what it says arrives, whoever dies in between."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
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
from tests.relays import MANAGER, relay_app, relay_pulsar, served
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
