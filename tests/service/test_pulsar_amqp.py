"""A real Pulsar behind a real broker, and all that can go wrong between them and us."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from tesp_api.errors import SiteClosed, SiteUnavailable
from tesp_api.runner.bundle import Bundle, build, pseudo_job
from tesp_api.runner.job import Input
from tesp_api.sites import Site, SiteFacts
from tesp_api.sites.pulsar import amqp, messages
from tesp_api.sites.pulsar.amqp import AmqpPost
from tesp_api.sites.pulsar.errand import is_errand
from tesp_api.sites.pulsar.mail import MailCarrier
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.task import Observation, Phase
from tests import standin
from tests.pulsars import PulsarMain, ended, exists, forgotten, new_plan, phase, running, until
from tests.rabbitmq import Broker, certificates, need_rabbitmq
from tests.running import Service
from tests.running import until as until_true
from tests.support import require

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

RUNNER = standin.bundle()
FACTS = SiteFacts(name="there")
LONG = 120.0
"""Seconds that nothing takes, on any machine."""


class World:
    """A broker and the Pulsar behind it."""

    def __init__(self, directory: Path, tls: Path | None = None) -> None:
        self.broker = Broker(directory / "broker", tls=tls)
        self.pulsar = PulsarMain(directory / "pulsar", "amqp/app.yml", AMQP_URL=f"{self.broker.url}/")

    def start(self) -> None:
        self.broker.start()
        self.pulsar.start()

    def remove(self) -> None:
        self.pulsar.kill()
        self.broker.remove()

    def site(self, *, timeout: float = LONG, runner: Bundle = RUNNER, url: str = "") -> PulsarSite:
        post = AmqpPost(url or self.broker.url, timeout=timeout)
        return PulsarSite(FACTS, MailCarrier(post, timeout=timeout, file_pause=0.5), runner)

    def left(self) -> set[str]:
        """The directories of jobs that are neither a runner's nor an errand's."""
        names = {each.name for each in self.pulsar.staging.iterdir()}
        return {each for each in names if not is_errand(each) and not each.startswith("tes-runner-")}


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    need_rabbitmq()
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")


@pytest.fixture(scope="module")
def world(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    try:
        world.start()
        yield world
    finally:
        world.remove()


@pytest.fixture
def own_world(tmp_path: Path) -> Iterator[World]:
    """A world that the test may hurt."""
    world = World(tmp_path)
    try:
        world.start()
        yield world
    finally:
        world.remove()


@asynccontextmanager
async def channel_to(broker: Broker) -> AsyncIterator[Any]:
    async with await aio_pika.connect(broker.url) as connection:
        yield await connection.channel()


async def post(
    channel: Any, body: bytes, *, key: str = "pulsar__status_update", kind: str = "application/json"
) -> None:
    exchange = await channel.get_exchange("pulsar")
    await exchange.publish(aio_pika.Message(body, content_type=kind), key)


async def waiting(broker: Broker, queue: str = "pulsar__status_update") -> int:
    """How many messages wait in a queue or are not acknowledged yet."""
    rows = await asyncio.to_thread(broker.control, "list_queues", "--no-table-headers", "name", "messages")
    return int(dict(row.split() for row in rows.splitlines())[queue])


@asynccontextmanager
async def updates_of(site: Site) -> AsyncIterator[list[Observation]]:
    """All that the site tells by itself, taken at once."""
    told: list[Observation] = []

    async def listen() -> None:
        async for seen in site.updates():
            told.append(seen)

    listening = asyncio.create_task(listen())
    try:
        yield told
        assert not listening.done(), listening.exception()
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def told_result(told: list[Observation], job_id: str) -> Observation:
    async def look() -> Observation | None:
        return next((each for each in told if each.job_id == job_id and each.result is not None), None)

    return await until(look, f"news of the end of {job_id}", within=LONG)


# Messages to us


def test_messages_that_are_not_ours_or_not_json_hurt_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    strange = {
        "a list": b"[]",
        "null": b"null",
        "a number": b"7",
        "no json": b"\xff\xfe{",
        "nothing": b"",
        "no id": b'{"status": "complete"}',
        "an id that is a path": b'{"job_id": "../x", "status": "complete"}',
        "an id that is none": b'{"job_id": {"a": 1}, "status": "complete"}',
        "no status": b'{"job_id": "a-1"}',
        "status of another type": b'{"job_id": "a-1", "status": ["complete"]}',
        "somebody else's job": b'{"job_id": "galaxy-5", "status": "complete", "complete": "true"}',
        "an errand of nobody's": json.dumps({"job_id": "tes-errand-" + 32 * "0", "status": "complete"}).encode(),
        "deep": b"[" * 200_000,
        "a forged result": json.dumps(
            {
                "job_id": "a-2",
                "status": "complete",
                "returncode": "0",
                "metadata_directory_contents": {"x": 1},
                "realized_dynamic_file_sources": [None, {"path": "result.json", "contents": {"job_id": "a-2"}}],
            }
        ).encode(),
        "huge": b'"' + b"x" * amqp.LETTER_BYTES + b'"',
    }

    async def main() -> None:
        async with world.site() as site, updates_of(site) as told, channel_to(world.broker) as channel:
            await site.submit(new_plan())
            for body in strange.values():
                await post(channel, body)
            await post(channel, b"text", kind="text/plain")
            plan = new_plan("echo", "fine")
            await site.submit(plan)
            assert (await told_result(told, plan.job_id)).result is not None

            async def empty() -> bool:
                return await waiting(world.broker) == 0

            await until(empty, "an empty queue", within=LONG)
            assert not {each.job_id for each in told} & {"a-1"}
            assert all(each.result is None for each in told if each.job_id == "a-2")

    asyncio.run(main())
    assert caplog.text.count("was dropped") >= len(strange) - 4
    assert max(len(each.getMessage()) for each in caplog.records) < 400


def test_late_doubled_and_contradicting_updates_change_nothing(world: World) -> None:
    async def main() -> None:
        async with world.site() as site, updates_of(site) as told, channel_to(world.broker) as channel:
            copies = await channel.declare_queue(exclusive=True)
            await site.submit(new_plan())
            await copies.bind("pulsar", "pulsar__status_update")
            plan = new_plan("sh", "-c", "exit 4")
            await site.submit(plan)
            await told_result(told, plan.job_id)
            final = b""
            async with copies.iterator(no_ack=True) as messages_:
                async for each in messages_:
                    body = json.loads(each.body)
                    if body["job_id"] == plan.job_id and body["complete"] == "true":
                        final = each.body
                        if body["status"] == "complete":
                            break
            told.clear()
            for state in ("running", "lost", "queued", "preprocessing"):
                await post(channel, json.dumps({"job_id": plan.job_id, "status": state, "complete": "false"}).encode())
            await post(channel, final)
            await post(channel, final)

            async def twice() -> bool:
                return sum(each.job_id == plan.job_id for each in told) >= 2

            await until(twice, "both copies", within=LONG)
            ours = [each for each in told if each.job_id == plan.job_id]
            assert {each.phase for each in ours} == {Phase.ENDED}
            assert all(each.result is not None and each.result.state == "EXECUTOR_ERROR" for each in ours)
            await forgotten(site, plan.job_id)

    asyncio.run(main())


def test_what_ended_while_nobody_listened_is_told_until_it_was_taken(world: World) -> None:
    async def main() -> None:
        plan = new_plan("sh", "-c", f"while [ ! -e {release} ]; do sleep 0.05; done")
        async with world.site() as site:
            await site.submit(plan)
            await running(site, plan.job_id)
        release.touch()
        await exists(world.pulsar.staging / plan.job_id / "metadata" / "result.json")
        for _ in range(2):  # the first one dies with the news in its hands
            async with world.site() as site:
                news = site.updates()
                async with asyncio.timeout(LONG):
                    while (seen := await anext(news)).job_id != plan.job_id:
                        pass
                assert seen.result is not None
                await news.aclose()  # type: ignore[attr-defined]
        async with world.site() as site, updates_of(site) as told:
            await told_result(told, plan.job_id)
            await forgotten(site, plan.job_id)

    release = world.broker.directory / "release"
    asyncio.run(main())


# Messages to Pulsar


def test_all_that_we_send_is_as_pulsars_consumers_expect_it(world: World) -> None:
    """One of another type, or that is no JSON object, would kill a consumer for good."""

    async def main() -> None:
        async with channel_to(world.broker) as channel, world.site() as site:
            await site.submit(new_plan())
            spy = await channel.declare_queue(exclusive=True)
            for box in ("setup", "kill", "status"):
                await spy.bind("pulsar", f"pulsar__{box}")
            content = "".join(map(chr, (0x22, 0x5C, 0, 0x7F, 0xE9, 0x2028, 0x1F600, 0xFFFD)))
            odd = new_plan("echo", content.replace("\0", ""), inputs=[Input(path="/in", content=content)])
            await site.submit(odd)
            await ended(site, odd.job_id)
            running_plan = new_plan("sleep", "600", wishes="deaf")
            await site.submit(running_plan)
            await running(site, running_plan.job_id)
            await site.cancel(running_plan.job_id, force=True)
            await ended(site, running_plan.job_id)
            for each in ("nobody-1", "_", "x" * 200):
                await site.observe([each])
                await site.cancel(each, force=True)
            await forgotten(site, odd.job_id)
            keys = set()
            while (message := await spy.get(no_ack=True, fail=False)) is not None:
                keys.add(message.routing_key)
                assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
                assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
                assert isinstance(json.loads(message.body)["job_id"], str)
            assert keys == {"pulsar__setup", "pulsar__kill", "pulsar__status"}
            assert "consumer quitting" not in world.pulsar.log()

    asyncio.run(main())


def test_a_plan_of_many_megabytes_arrives(world: World) -> None:
    async def main() -> None:
        async with world.site() as site:
            plan = new_plan(inputs=[Input(path=f"/in{number}", content="x é" * 350_000) for number in range(12)])
            await site.submit(plan)
            await ended(site, plan.job_id, within=LONG)
            assert (world.pulsar.staging / plan.job_id / "inputs" / "job.json").stat().st_size > 10 * 1024 * 1024
            await forgotten(site, plan.job_id)

    asyncio.run(main())


def test_a_launch_that_comes_after_its_job_was_removed_runs_nothing(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        runner, witness = build(), tmp_path / "witness"
        async with world.site(runner=runner) as site, channel_to(world.broker) as channel:
            await site.submit(new_plan())
            plan = new_plan("touch", str(witness))
            letter = messages.setup_message(messages.launch(plan, site._command_line))
            await site.cancel(plan.job_id, force=True)  # as after a restart: nobody knows whether it was launched
            await post(channel, json.dumps(letter).encode(), key="pulsar__setup")
            await phase(site, plan.job_id, Phase.ENDED, within=LONG)
            await forgotten(site, plan.job_id)
            await post(channel, json.dumps(letter).encode(), key="pulsar__setup")
            await phase(site, plan.job_id, Phase.ENDED, within=LONG)
            await forgotten(site, plan.job_id)
        assert not witness.exists()

    asyncio.run(main())


def test_nothing_but_the_runner_and_the_last_errand_stays(own_world: World) -> None:
    async def main() -> None:
        async with own_world.site() as site, updates_of(site):
            plans = [new_plan() for _ in range(5)]
            await asyncio.gather(*(site.submit(each) for each in plans))
            await asyncio.gather(*(ended(site, each.job_id) for each in plans))
            await asyncio.gather(*(forgotten(site, each.job_id) for each in plans))
            await forgotten(site, "nobody-1")  # one more errand

            async def tidy() -> bool:
                await site.forget("nobody-1", force=True)
                names = [each.name for each in own_world.pulsar.staging.iterdir()]
                return len(names) <= 2 and pseudo_job(RUNNER.sha256) in names

            await until(tidy, "a tidy staging directory", within=LONG)

    asyncio.run(main())


# Deaths


def test_a_broker_that_dies_and_comes_back(own_world: World, tmp_path: Path) -> None:
    async def main() -> None:
        release, started = tmp_path / "release", tmp_path / "started"
        async with own_world.site() as site, updates_of(site) as told:
            plan = new_plan("sh", "-c", f"echo 1 > {started}; while [ ! -e {release} ]; do sleep 0.05; done")
            await site.submit(plan)
            await exists(started)
            own_world.broker.kill()
            late = new_plan()
            with pytest.raises(SiteUnavailable, match=r"The broker|The connection") as caught:
                await site.submit(late)
            assert caught.value.unsent
            with pytest.raises(SiteUnavailable, match=r"The broker|The connection"):
                await site.observe([plan.job_id])
            release.touch()
            await exists(own_world.pulsar.staging / plan.job_id / "metadata" / "result.json")
            await asyncio.to_thread(own_world.broker.start)
            assert (await told_result(told, plan.job_id)).result is not None

            async def submitted() -> bool:
                try:
                    await site.submit(late)
                except SiteUnavailable:
                    return False
                return True

            await until(submitted, "the broker in use again", within=LONG)
            await told_result(told, late.job_id)
            await forgotten(site, plan.job_id)
            await forgotten(site, late.job_id)

    asyncio.run(main())


def test_what_is_under_way_when_the_connection_is_given_up_is_unavailable(tmp_path: Path) -> None:
    """The broker hangs. What is sent after the question whether it does is still on its way when that is answered."""
    broker = Broker(tmp_path)

    async def send(post: AmqpPost, number: int) -> None:
        with pytest.raises(SiteUnavailable):
            await post.send("kill", {"job_id": f"t-{number}"})

    async def main() -> None:
        async with AmqpPost(broker.url, timeout=10.0, check_every=0.1) as post, asyncio.timeout(LONG):
            await post.send("kill", {"job_id": "t-0"})
            broker.pause()
            sent: list[asyncio.Task[None]] = []
            while not any(each.done() for each in sent):
                sent.append(asyncio.create_task(send(post, len(sent))))
                await asyncio.sleep(0.1)
            await asyncio.gather(*sent)

    try:
        broker.start()
        asyncio.run(main())
    finally:
        broker.resume()
        broker.remove()


def test_a_pulsar_that_dies_while_jobs_wait_run_and_end(own_world: World, tmp_path: Path) -> None:
    async def main() -> None:
        release, started, witness = tmp_path / "release", tmp_path / "started", tmp_path / "witness"
        async with own_world.site() as site, updates_of(site), channel_to(own_world.broker) as channel:
            while_down = new_plan("sh", "-c", f"echo 1 > {started}; while [ ! -e {release} ]; do sleep 0.05; done")
            after = new_plan("sh", "-c", f"while [ ! -e {release}2 ]; do sleep 0.05; done; echo late")
            stopped = new_plan("sleep", "600")
            for plan in (while_down, after, stopped):
                await site.submit(plan)
            await running(site, after.job_id)
            await running(site, stopped.job_id)
            await exists(started)
            own_world.pulsar.kill()
            waits = new_plan("sh", "-c", f"echo once >> {witness}")  # its launch is in the queue when Pulsar dies
            letter = messages.setup_message(messages.launch(waits, site._command_line))
            await post(channel, json.dumps(letter).encode(), key="pulsar__setup")
            release.touch()
            await exists(own_world.pulsar.staging / while_down.job_id / "metadata" / "result.json")
            own_world.pulsar.start()
            for plan in (while_down, waits):
                seen = await ended(site, plan.job_id, within=LONG)
                assert seen.result is not None
                assert seen.result.state == "COMPLETE"
            assert witness.read_text() == "once\n"
            await site.cancel(stopped.job_id, force=True)
            seen = await ended(site, stopped.job_id, within=LONG)
            assert seen.result is not None
            assert seen.result.state == "CANCELED"
            await site.submit(after)  # as a service would that was killed, too
            Path(f"{release}2").touch()
            seen = await ended(site, after.job_id, within=LONG)
            assert seen.result is not None
            assert seen.result.executors[0].stdout == "late\n"
            for plan in (while_down, after, stopped, waits):
                assert await site.forget(plan.job_id, force=True)
            assert own_world.left() == set()

    asyncio.run(main())


def test_a_pulsar_that_is_not_there(own_world: World) -> None:
    own_world.pulsar.kill()

    async def main() -> None:
        async with own_world.site(timeout=3) as site:
            with pytest.raises(SiteUnavailable, match="did not") as caught:
                await site.submit(new_plan())
            assert caught.value.unsent
            with pytest.raises(SiteUnavailable, match="does Pulsar run there"):
                await site.observe([f"a-{number}" for number in range(200)])

            async def expired() -> bool:  # questions to which nobody would want an answer any more
                return await waiting(own_world.broker, "pulsar__status") == 0

            await until(expired, "no old questions", within=LONG)

    asyncio.run(main())


def test_queues_that_an_admin_has_deleted_are_made_again(own_world: World) -> None:
    async def main() -> None:
        async with own_world.site() as site:
            await site.submit(new_plan())
            own_world.pulsar.kill()
            own_world.broker.control("delete_queue", "pulsar__setup")
            carrier = site._carrier
            launch = messages.launch(new_plan(), site._command_line)
            with pytest.raises(SiteUnavailable, match="no queue 'pulsar__setup'") as caught:
                await carrier.launch(launch)
            assert caught.value.unsent
            own_world.pulsar.start()

            async def launched() -> bool:
                try:
                    await carrier.launch(launch)
                except SiteUnavailable:
                    return False
                return True

            await until(launched, "the queue", within=LONG)
            await ended(site, launch.job_id, within=LONG)

    asyncio.run(main())


def test_a_queue_of_updates_that_an_admin_has_deleted_is_listened_to_again(own_world: World) -> None:
    async def main() -> None:
        async with AmqpPost(own_world.broker.url, check_every=0.2) as our_post, channel_to(own_world.broker) as channel:
            await our_post.send("status", {"job_id": "a-1"})
            letters = our_post.letters()
            heard = asyncio.create_task(anext(letters))
            own_world.broker.control("delete_queue", "pulsar__status_update")

            async def told() -> bool:
                with contextlib.suppress(aio_pika.exceptions.DeliveryError):  # there is no such queue at the moment
                    await post(channel, b'{"job_id": "a-2"}')
                return heard.done()

            await until(told, "a letter", within=LONG)
            await letters.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_queue_of_its_own_that_an_admin_has_deleted_is_made_again(own_world: World) -> None:
    """Without it no answer would wake anybody, and the site would seem dead."""

    async def main() -> None:
        async with AmqpPost(own_world.broker.url, check_every=0.2) as our_post, channel_to(own_world.broker) as channel:
            await our_post.send("status", {"job_id": "a-1"})
            copies = our_post.copies()
            heard = asyncio.create_task(anext(copies))
            (own,) = [each for each in own_world.broker.control("list_queues", "name").split() if "amq.gen" in each]
            own_world.broker.control("delete_queue", own)

            async def told() -> bool:
                await post(channel, b'{"job_id": "a-2"}')
                return heard.done()

            await until(told, "a copy", within=LONG)
            await copies.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_node_without_python(own_world: World, tmp_path: Path) -> None:
    """The runner cannot be had there; that is the site's fault and no job's."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "cp", "rm", "mv", "mkdir", "date", "cat", "echo", "env", "dirname", "ls", "sleep", "ps"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    own_world.pulsar.kill()
    own_world.pulsar.path = str(tools)
    own_world.pulsar.start()

    async def main() -> None:
        async with own_world.site() as site:
            with pytest.raises(SiteClosed, match="no python3"):
                await site.submit(new_plan())

    asyncio.run(main())


# The whole service


def test_the_whole_service_over_a_broker(world: World, tmp_path: Path) -> None:
    variables = {"TESP_PULSAR__AMQP_URL": world.broker.url, "CONTAINER_TYPE": "host"}
    release = tmp_path / "release"
    waits = f"while [ ! -e {release} ]; do sleep 0.05; done; echo out"
    running_service = Service(tmp_path / "service", **variables)
    before = world.left()
    try:
        running_service.start()
        task = running_service.post({"executors": [{"image": "none", "command": ["sh", "-c", waits]}]})
        endless = running_service.post({"executors": [{"image": "none", "command": ["sleep", "600"]}]})
        for each in (task, endless):
            until_true(lambda each=each: running_service.state(each) == "RUNNING", LONG, f"{each} RUNNING")
        running_service.kill()
        release.touch()
        running_service.start()
        running_service.cancel(endless)
        done = running_service.end(task, LONG)
        assert (done["state"], done["logs"][0]["logs"][0]["stdout"]) == ("COMPLETE", "out\n")
        assert len(done["logs"]) == 1
        assert running_service.end(endless, LONG)["state"] == "CANCELED"
        until_true(lambda: world.left() <= before, LONG, "nothing of ours left at the site")
    finally:
        running_service.stop()
    assert "guest" not in running_service.log.read_text()


# Logins and certificates


def test_tls_logins_and_hosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tls = certificates(tmp_path / "tls")
    world = World(tmp_path, tls)
    host, ca = f"localhost:{world.broker.tls_port}", tls / "ca.pem"
    wrong = {
        f"amqp://guest:wr0ng@127.0.0.1:{world.broker.port}/": "refuses our login",
        f"amqps://guest:wr0ng@{host}/?cafile={ca}": "refuses our login",
        f"amqp://guest:guest@127.0.0.1:{world.broker.port}/n0where": "virtual host",
        f"amqps://guest:guest@{host}/": "certificate that is not trusted",
        f"amqps://guest:guest@{host}/?cafile={tmp_path}/none.pem": "file that `amqp_url` names for TLS cannot be read",
        f"amqps://guest:guest@127.0.0.1:{world.broker.port}/?cafile={ca}": "TLS",
        "amqp://guest:guest@127.0.0.1:1/": "cannot be reached",
        "amqp://guest:guest@no.such.host.invalid/": "cannot be reached",
    }

    async def main() -> None:
        for url, words in wrong.items():
            async with world.site(url=url, timeout=20) as site:
                with pytest.raises(SiteUnavailable, match=words) as caught:
                    await site.submit(new_plan())
                assert caught.value.unsent
                told.append(str(caught.value) + repr(caught.value))
        async with world.site(url=f"amqps://guest:guest@{host}/?cafile={ca}") as site:
            plan = new_plan()
            await site.submit(plan)
            await ended(site, plan.job_id, within=LONG)

    told: list[str] = []
    try:
        world.start()
        with caplog.at_level(logging.DEBUG):
            asyncio.run(main())
    finally:
        world.remove()
    for text in (*told, caplog.text):
        assert "wr0ng" not in text
        assert "guest" not in text
