"""The calls of the relay, and the carrier's side of its boxes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tesp_api.api import relay as relay_api
from tesp_api.api.relay import Account
from tesp_api.errors import SiteRefused, SiteUnavailable
from tesp_api.relay import Manager
from tesp_api.sites.pulsar import errand
from tesp_api.sites.pulsar.post import KILL, SETUP, STATUS
from tesp_api.sites.pulsar.relay import RelayPost
from tesp_api.store.mailbox import BOX_LETTERS, LETTER_BYTES, Mailbox
from tesp_api.store.sqlite import SqliteStore
from tests.relays import ACCOUNT, MANAGER, PASSWORD, USER, login, relay_app, served

OTHER = Account("other", "another password", [Manager("other"), Manager("second", "prod", "big")])
TOPICS = ["job_setup", "job_status_request", "job_kill"]
FORM = {"username": USER, "password": PASSWORD, "grant_type": "password"}


class Clock:
    """A time that a test sets."""

    now = 1_750_000_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A relay in this process, and what writes to its Pulsar."""

    def __init__(self, mail: Mailbox, client: httpx.AsyncClient, clock: Clock) -> None:
        self.mail, self.client, self.clock = mail, client, clock
        self.post = RelayPost(mail, MANAGER)

    async def poll(self, headers: dict[str, str], timeout: float = 0, **since: str) -> list[dict[str, Any]]:
        """The messages of one poll."""
        question = {"topics": TOPICS, "timeout": timeout, "since": since}
        answer = await self.client.post("/messages/poll", json=question, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        messages: list[dict[str, Any]] = answer.json()["messages"]
        return messages


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with SqliteStore(":memory:") as store:
        clock = Clock()
        app = relay_app(store.mail, ACCOUNT, OTHER, clock=clock, max_body=1 << 20)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://relay") as client:
            yield Bench(store.mail, client, clock)


def on(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test with a bench."""

    def run() -> None:
        async def main() -> None:
            async with bench() as found:
                async with asyncio.timeout(100):
                    await test(found)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def ids(messages: list[dict[str, Any]]) -> list[str]:
    return [each["payload"]["job_id"] for each in messages]


# What is passed on


@on
async def test_letters_are_polled_in_order_with_their_topics(b: Bench) -> None:
    for box, job_id in ((SETUP, "a"), (KILL, "a"), (STATUS, "b"), (SETUP, "b")):
        await b.post.send(box, {"job_id": job_id, "é": "😀"})
    messages = await b.poll(await login(b.client))
    assert [(each["topic"], each["payload"]["job_id"]) for each in messages] == [
        ("job_setup", "a"),
        ("job_kill", "a"),
        ("job_status_request", "b"),
        ("job_setup", "b"),
    ]
    assert messages[0]["payload"]["é"] == "😀"
    assert len({each["message_id"] for each in messages}) == 4


@on
async def test_a_cursor_acknowledges_within_its_login(b: Bench) -> None:
    await b.post.send(SETUP, {"job_id": "a"})
    await b.post.send(SETUP, {"job_id": "b"})
    header = await login(b.client)
    first = await b.poll(header)
    assert ids(first) == ["a", "b"]
    assert ids(await b.poll(header)) == ["a", "b"], "the answer may have been lost"
    assert ids(await b.poll(header, job_setup=first[0]["message_id"])) == ["b"]
    assert ids(await b.poll(await login(b.client))) == ["b"], "what was acknowledged is gone for good"
    await b.post.send(KILL, {"job_id": "a"})
    second = await b.poll(header, job_setup=first[1]["message_id"])
    assert ids(second) == ["a"]
    assert await b.poll(header, job_setup=first[1]["message_id"], job_kill=second[0]["message_id"]) == []
    assert await b.mail.read(MANAGER.outbox) == []


@on
async def test_a_cursor_of_an_earlier_login_acknowledges_nothing(b: Bench) -> None:
    """Pulsar saves its cursor before it works: killed then, it comes back with one behind what it never did."""
    await b.post.send(SETUP, {"job_id": "a"})
    (message,) = await b.poll(await login(b.client))
    again = await login(b.client)
    (same,) = await b.poll(again, job_setup=message["message_id"])
    assert ids([same]) == ["a"]
    assert same["message_id"] != message["message_id"]
    assert await b.poll(again, job_setup=same["message_id"]) == []


@pytest.mark.parametrize("since", ["", "x", "-", "1", "-1", "x-1", "9" * 30, "é-1", "\0", "x-" + "1" * 5000, "x--1"])
def test_a_cursor_that_is_none_of_ours_is_passed_over(since: str) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.post.send(SETUP, {"job_id": "a"})
            assert ids(await b.poll(await login(b.client), job_setup=since, job_kill=since)) == ["a"]

    asyncio.run(main())


@on
async def test_a_poll_is_held_until_a_letter_comes(b: Bench) -> None:
    header = await login(b.client)
    polling = asyncio.create_task(b.poll(header, timeout=60))
    while not b.mail.doorbell._listening:
        await asyncio.sleep(0)
    await b.post.send(SETUP, {"job_id": "a"})
    assert ids(await polling) == ["a"]
    assert await b.poll(header, timeout=0.01, job_setup=(await b.poll(header))[0]["message_id"]) == []


def test_a_poll_sees_what_another_process_has_put(tmp_path: Path) -> None:
    async def main() -> None:
        async with SqliteStore(tmp_path / "s") as ours, SqliteStore(tmp_path / "s") as theirs:
            client = httpx.AsyncClient(transport=httpx.ASGITransport(relay_app(ours.mail)), base_url="http://relay")
            question = {"topics": TOPICS, "timeout": 60}
            polling = asyncio.create_task(client.post("/messages/poll", json=question, headers=await login(client)))
            while not ours.mail.doorbell._listening:
                await asyncio.sleep(0.01)
            await RelayPost(theirs.mail, MANAGER).send(SETUP, {"job_id": "a"})
            assert ids((await polling).json()["messages"]) == ["a"]

    asyncio.run(main())


@on
async def test_what_pulsar_posts_is_read_until_the_next_is_asked_for(b: Bench) -> None:
    header = await login(b.client)
    answers = [
        await b.client.post(
            "/api/v1/messages", content=json.dumps({"topic": MANAGER.update, "payload": payload}), headers=header
        )
        for payload in ({"job_id": "a", "status": "running"}, {"job_id": "a", "status": "complete", "x": "\ud800"})
    ]
    assert [each.status_code for each in answers] == [200, 200]
    assert set(answers[0].json()) == {"message_id", "topic", "timestamp"}
    letters = b.post.letters()
    assert await anext(letters) == {"job_id": "a", "status": "running"}
    async with RelayPost(b.mail, MANAGER) as other:
        seen = other.letters()
        assert [(await anext(seen))["status"] for _ in range(2)] == ["running", "complete"]  # type: ignore[index]
        copies = other.copies()
        next_copy = asyncio.ensure_future(anext(copies))
        new = {"topic": MANAGER.update, "payload": {"job_id": "new"}}
        assert (await b.client.post("/api/v1/messages", json=new, headers=header)).status_code == 200
        assert await next_copy == {"job_id": "new"}, "what was there before is no answer"
    assert (await anext(letters))["x"] == "\ud800"  # type: ignore[index]


@on
async def test_letters_that_were_worked_on_are_dropped_after_a_while(b: Bench) -> None:
    post = RelayPost(b.mail, MANAGER, keep=0.5)
    header = await login(b.client)
    body = {"topic": MANAGER.update, "payload": {"job_id": "a"}}
    await b.client.post("/api/v1/messages", json=body, headers=header)

    async def read() -> None:
        async for _ in post.letters():
            pass

    reading = asyncio.create_task(read())
    while await b.mail.read(MANAGER.inbox):
        await asyncio.sleep(0.1)
    reading.cancel()


@on
async def test_a_post_that_is_repeated_with_its_key_is_one(b: Bench) -> None:
    header = {**await login(b.client), "Idempotency-Key": "k"}
    body = {"topic": MANAGER.update, "payload": {"job_id": "a"}}
    answers = [(await b.client.post("/api/v1/messages", json=body, headers=header)).json() for _ in range(2)]
    assert answers[0]["message_id"] == answers[1]["message_id"]
    assert len(await b.mail.read(MANAGER.inbox)) == 1
    del header["Idempotency-Key"]
    await b.client.post("/api/v1/messages", json=body, headers=header)
    assert len(await b.mail.read(MANAGER.inbox)) == 2


@on
async def test_pulsar_tells_its_version(b: Bench) -> None:
    header = await login(b.client)
    assert await b.post.version() == ""
    for version in ("0.15.16", "0.16.0"):
        body = {"topic": MANAGER.capabilities, "payload": {"pulsar_version": version}}
        assert (await b.client.post("/api/v1/messages", json=body, headers=header)).status_code == 200
        assert await b.post.version() == version
    await b.client.post("/api/v1/messages", json={"topic": MANAGER.capabilities, "payload": {}}, headers=header)
    assert await b.post.version() == ""


@on
async def test_the_calls_are_below_relay_too(b: Bench) -> None:
    answer = await b.client.post("/relay/auth/login", data=FORM)
    header = {"Authorization": f"bearer {answer.json()['access_token']}"}
    await b.post.send(SETUP, {"job_id": "a"})
    answer = await b.client.post("/relay/messages/poll", json={"topics": TOPICS}, headers=header)
    assert ids(answer.json()["messages"]) == ["a"]
    body = {"topic": MANAGER.update, "payload": {}}
    assert (await b.client.post("/relay/api/v1/messages", json=body, headers=header)).status_code == 200


# The carrier's side


@on
async def test_what_still_waits_is_not_written_twice(b: Bench) -> None:
    for _ in range(3):
        for box in (SETUP, STATUS, KILL):
            await b.post.send(box, {"job_id": "a"})
    assert [each["topic"] for each in await b.poll(await login(b.client))] == [
        "job_setup",
        "job_status_request",
        "job_kill",
    ]


@on
async def test_a_question_that_was_handed_out_may_be_asked_again(b: Bench) -> None:
    header = await login(b.client)
    await b.post.send(STATUS, {"job_id": "a"})
    (message,) = await b.poll(header)
    await b.post.send(STATUS, {"job_id": "a"})
    assert ids(await b.poll(header, job_status_request=message["message_id"])) == ["a"]


@on
async def test_questions_to_a_pulsar_that_is_away_do_not_fill_its_box(b: Bench) -> None:
    """Each look whether it is back is a question about a new errand."""
    for _ in range(BOX_LETTERS + 1):
        await b.post.send(STATUS, {"job_id": errand.new_id(), "request": "status"})
    await b.post.send(KILL, {"job_id": "t-1"})
    headers = await login(b.client)
    b.clock.now += relay_api.SETTLE
    asked, seen = await b.poll(headers), list[str]()
    while asked:
        seen += [each["topic"] for each in asked]
        asked = await b.poll(headers, job_kill=asked[-1]["message_id"])
    assert seen[-1] == MANAGER.kill
    assert len(seen) <= 257


@on
async def test_a_full_box_is_a_site_that_does_not_hear(b: Bench) -> None:
    for number in range(BOX_LETTERS):
        await b.mail.put(MANAGER.outbox, "x\n{}", str(number))
    with pytest.raises(SiteUnavailable, match="does not fetch them") as caught:
        await b.post.send(SETUP, {"job_id": "a"})
    assert caught.value.unsent


@on
async def test_a_letter_that_is_too_long_is_refused(b: Bench) -> None:
    with pytest.raises(SiteRefused, match="too long"):
        await b.post.send(SETUP, {"job_id": "a", "x": "x" * LETTER_BYTES})


def test_a_store_that_is_away_is_a_site_that_may_have_heard() -> None:
    async def main() -> None:
        post = RelayPost(SqliteStore(":memory:").mail, MANAGER)
        with pytest.raises(SiteUnavailable):
            await post.version()
        with pytest.raises(SiteUnavailable) as caught:
            await post.send(SETUP, {"job_id": "a"})
        assert not caught.value.unsent

    asyncio.run(main())


# Who may


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"password": "gu3ss"}, 401),
        ({"password": ""}, 401),
        ({"password": PASSWORD + "x"}, 401),
        ({"username": "nobody"}, 401),
        ({"username": "other"}, 401),
        ({"username": "é"}, 401),
        ({"username": "\udcff"}, 400),
        ({"grant_type": "refresh_token"}, 400),
        ({"username": None}, 400),
        ({"password": None}, 400),
    ],
)
def test_a_wrong_login(changes: dict[str, Any], status: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench() as b:
            form = {key: value for key, value in {**FORM, **changes}.items() if value is not None}
            body = "&".join(f"{key}={value}" for key, value in form.items()).encode("utf-8", "surrogateescape")
            answer = await b.client.post("/auth/login", content=body)
            assert answer.status_code == status, answer.text
            assert "access_token" not in answer.text
            assert "gu3ss" not in answer.text

    asyncio.run(main())
    assert PASSWORD not in caplog.text
    assert "gu3ss" not in caplog.text


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"{}", b"&&&", b"username", b"a=1&" * 1000, b"username=x" * 2000])
def test_a_login_that_is_no_form(body: bytes) -> None:
    async def main() -> None:
        async with bench() as b:
            answer = await b.client.post("/auth/login", content=body)
            assert answer.status_code in (400, 413), answer.text
            assert answer.json()["status"] == answer.status_code

    asyncio.run(main())


def test_guessing_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with SqliteStore(":memory:") as store:
            app = relay_app(store.mail, ACCOUNT, OTHER, penalty=0.5)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://relay") as client:
                wrong = {**FORM, "password": "guess"}
                answers = await asyncio.gather(*(client.post("/auth/login", data=wrong) for _ in range(50)))
                found = [each.status_code for each in answers]
                assert found.count(401) <= relay_api.GUESSES
                assert set(found) == {401, 429}
                guesses = [
                    asyncio.create_task(client.post("/auth/login", data=wrong)) for _ in range(relay_api.GUESSES)
                ]
                await login(client, "other", "another password")
                await login(client)  # no guess keeps out who knows it
                await asyncio.gather(*guesses)
                await login(client)

    asyncio.run(main())
    assert "guess" not in caplog.text


@on
async def test_calls_without_a_good_token(b: Bench) -> None:
    good = (await login(b.client))["Authorization"]
    theirs = (await login(b.client, "other", "another password"))["Authorization"]
    body, _, signature = good.removeprefix("Bearer ").rpartition(".")
    bad = [
        "",
        "Bearer",
        "Bearer x",
        "Bearer .",
        "Bearer ..",
        f"Basic {good[7:]}",
        f"Bearer {body}",
        f"Bearer {body}.",
        f"Bearer {body}.{signature[:-1]}0x",
        f"Bearer {theirs[7:].rpartition('.')[0]}.{signature}",
        f"Bearer {body}.{theirs.rpartition('.')[2]}",
        f"Bearer WzEsMiwzXQ==.{signature}",
        f"Bearer W1tdLDIsM10=.{signature}",
        f"Bearer bnVsbA==.{signature}",
        "Bearer " + "[" * 100_000,
    ]
    for path, document in (
        ("/messages/poll", {"topics": TOPICS}),
        ("/api/v1/messages", {"topic": MANAGER.update, "payload": {}}),
    ):
        for each in bad:
            answer = await b.client.post(path, json=document, headers={"Authorization": each} if each else {})
            assert answer.status_code == 401, (each[:100], answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await b.client.post(path, json=document, headers={"Authorization": good})).status_code == 200
    b.clock.now += 3601
    answer = await b.client.post("/messages/poll", json={"topics": TOPICS}, headers={"Authorization": good})
    assert answer.status_code == 401
    await b.poll(await login(b.client))


def test_a_token_is_good_at_every_process_and_after_a_restart_until_the_password_changes() -> None:
    async def main() -> None:
        async with SqliteStore(":memory:") as store:
            clients = [
                httpx.AsyncClient(
                    transport=httpx.ASGITransport(relay_app(store.mail, account)), base_url="http://relay"
                )
                for account in (ACCOUNT, ACCOUNT, Account(USER, "new", [MANAGER]))
            ]
            header = await login(clients[0])
            found = [
                (await each.post("/messages/poll", json={"topics": TOPICS}, headers=header)).status_code
                for each in clients
            ]
            assert found == [200, 200, 401]

    asyncio.run(main())


@on
async def test_an_account_sees_its_own_topics_only(b: Bench) -> None:
    await b.post.send(SETUP, {"job_id": "secret"})
    other = await login(b.client, "other", "another password")
    assert await b.poll(other) == [], "the same name, and another box"
    for topics in (["job_status_update"], [*TOPICS, "job_setup_x"], ["prod_job_setup_small"], ["x" * 10_000]):
        answer = await b.client.post("/messages/poll", json={"topics": topics}, headers=other)
        assert answer.status_code == 403, answer.text
    big = [f"prod_{each}_big" for each in TOPICS]
    assert (await b.client.post("/messages/poll", json={"topics": big}, headers=other)).status_code == 200
    mine = await login(b.client)
    assert (await b.client.post("/messages/poll", json={"topics": big}, headers=mine)).status_code == 403
    for topic in (*TOPICS, "prod_job_status_update_big", "", "x" * 10_000):
        body = {"topic": topic, "payload": {}}
        assert (await b.client.post("/api/v1/messages", json=body, headers=mine)).status_code == 403
    body = {"topic": "prod_job_status_update_big", "payload": {"job_id": "x"}}
    assert (await b.client.post("/api/v1/messages", json=body, headers=other)).status_code == 200
    assert await b.mail.read(MANAGER.inbox) == []
    assert len(await b.mail.read("relay second in")) == 1


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ([], "body"),
        (None, "body"),
        ({}, "topics"),
        ({"topics": "job_setup"}, "topics"),
        ({"topics": []}, "topics"),
        ({"topics": [1]}, "topics"),
        ({"topics": TOPICS[:2]}, "topics"),
        ({"topics": TOPICS, "timeout": "30"}, "timeout"),
        ({"topics": TOPICS, "timeout": -1}, "timeout"),
        ({"topics": TOPICS, "timeout": True}, "timeout"),
        ({"topics": TOPICS, "timeout": float("nan")}, "timeout"),
        ({"topics": TOPICS, "timeout": None}, "timeout"),
        ({"topics": TOPICS, "since": []}, None),
        ({"topics": TOPICS, "since": [1]}, "since"),
        ({"topics": TOPICS, "since": {"job_setup": 1}}, "since"),
    ],
)
def test_a_poll_that_makes_no_sense(document: Any, field: str | None) -> None:
    async def main() -> None:
        async with bench() as b:
            body = json.dumps(document)
            answer = await b.client.post("/messages/poll", content=body, headers=await login(b.client))
            assert answer.status_code == (400 if field else 200), answer.text
            if field:
                assert [each["field"] for each in answer.json()["details"]] == [field]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xff", 400),
        (b"[" * 200_000, 400),
        (b'{"topic": "job_status_update", "payload": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
        (b'{"topic": 1, "payload": {}}', 400),
        (b'{"topic": "job_status_update"}', 400),
        (b'{"topic": "job_status_update", "payload": []}', 400),
        (b'{"topic": "job_status_update", "payload": {"n": ' + b"1" * 10_000 + b"}}", 400),
        (b'{"topic": "job_status_update", "payload": {"x": "' + b"x" * (2 << 20) + b'"}}', 413),
        (b'{"topic": "job_status_update", "payload": {"x": NaN}}', 200),
    ],
)
def test_a_message_that_makes_no_sense(body: bytes, status: int) -> None:
    async def main() -> None:
        async with bench() as b:
            answer = await b.client.post("/api/v1/messages", content=body, headers=await login(b.client))
            assert answer.status_code == status, answer.text[:500]
            assert len(await b.mail.read(MANAGER.inbox)) == (status == 200)

    asyncio.run(main())


@on
async def test_limits(b: Bench) -> None:
    header = await login(b.client)
    answer = await b.client.post("/messages/poll", content=b" " * (1 << 20), headers=header)
    assert answer.status_code == 413
    body = {"topic": MANAGER.update, "payload": {}}
    answer = await b.client.post("/api/v1/messages", json=body, headers={**header, "Idempotency-Key": "k" * 1000})
    assert answer.status_code == 400
    for number in range(BOX_LETTERS):
        await b.mail.put(MANAGER.inbox, "{}", str(number))
    answer = await b.client.post("/api/v1/messages", json=body, headers=header)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    for method in ("GET", "PUT", "DELETE"):
        assert (await b.client.request(method, "/auth/login")).status_code == 405


@on
async def test_the_store_is_away(b: Bench) -> None:
    async with SqliteStore(":memory:") as store:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(relay_app(store.mail)), base_url="http://relay")
        header = await login(client)
    answer = await client.post("/messages/poll", json={"topics": TOPICS}, headers=header)
    assert answer.status_code == 503
    body = {"topic": MANAGER.update, "payload": {}}
    assert (await client.post("/api/v1/messages", json=body, headers=header)).status_code == 503


# Many, slow and gone


@on
async def test_a_poll_too_many_takes_the_place_of_the_oldest(b: Bench) -> None:
    header = await login(b.client)
    question = {"topics": TOPICS, "timeout": 60}
    polls = []
    for number in range(relay_api.POLLS + 1):
        polls.append(asyncio.create_task(b.client.post("/messages/poll", json=question, headers=header, timeout=90)))
        while len(b.mail.doorbell._listening.get(MANAGER.outbox, ())) < min(number + 1, relay_api.POLLS):
            await asyncio.sleep(0)
    assert (await polls[0]).status_code == 429
    await b.post.send(SETUP, {"job_id": "a"})
    for each in polls[1:]:
        assert ids((await each).json()["messages"]) == ["a"]
    assert not b.mail.doorbell._listening


def test_nothing_is_handed_out_to_a_pulsar_that_has_just_started() -> None:
    async def main() -> None:
        async with SqliteStore(":memory:") as store:
            clock = Clock()
            app = relay_app(store.mail, clock=clock, settle=600)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://relay")
            b = Bench(store.mail, client, clock)
            header = await login(client)
            await b.post.send(SETUP, {"job_id": "a"})
            assert await b.poll(header, timeout=0.1) == []
            clock.now += 601
            assert ids(await b.poll(header)) == ["a"]

    asyncio.run(main())


def test_held_polls_are_answered_when_the_service_stops() -> None:
    async def main() -> None:
        async with SqliteStore(":memory:") as store:
            relay = relay_api.Relay(store.mail, [ACCOUNT])
            app = FastAPI()
            relay.add_to(app.router)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://relay")
            header, question = await login(client), {"topics": TOPICS, "timeout": 60}
            polling = asyncio.create_task(client.post("/messages/poll", json=question, headers=header))
            while not store.mail.doorbell._listening:
                await asyncio.sleep(0)
            relay.close()
            for answer in (await polling, await client.post("/messages/poll", json=question, headers=header)):
                assert (answer.status_code, answer.json()) == (200, {"messages": []})

    asyncio.run(main())


def test_who_goes_away_or_is_slow_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with SqliteStore(":memory:") as store, served(relay_app(store.mail, body_within=1.0)) as url:
            async with httpx.AsyncClient(base_url=url, timeout=90) as client:
                header = await login(client)
                question = {"topics": TOPICS, "timeout": 60}
                polling = asyncio.create_task(client.post("/messages/poll", json=question, headers=header))
                while not store.mail.doorbell._listening:
                    await asyncio.sleep(0.01)
                polling.cancel()
                await asyncio.gather(polling, return_exceptions=True)
            while store.mail.doorbell._listening:  # it would be held for a minute
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            writer.write(b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nusername=")
            assert b" 408 " in await reader.readline()
            writer.close()

    async def within() -> None:
        async with asyncio.timeout(50):
            await main()

    asyncio.run(within())
