"""The relay: a Pulsar without an open port logs in here, waits for letters, and posts its own.

The calls are those of a stock Pulsar's relay client. Its only acknowledgement is `since`, the id of the last message
that it took; it saves that before it works on what it took, and loses the messages if it is killed then. So an id names
the login that the message was handed out in, and counts as acknowledgement within that login only: who comes back with
one has worked on the message, while who logs in anew gets all that was not acknowledged once more. A set-up, a kill and
a question may be repeated.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tesp_api.api.problems import BodyTooLarge
from tesp_api.api.routes import Methods
from tesp_api.api.tasks import read_body
from tesp_api.api.views import Json
from tesp_api.errors import Detail, InvalidRequest
from tesp_api.relay import Manager, read_letter
from tesp_api.store.mailbox import LETTER_BYTES, Letter, Mailbox, rung
from tesp_api.task import rfc3339

log = logging.getLogger(__name__)

PREFIXES: Final = ("", "/relay")
"""Where they are served. Pulsar's client takes no URL with a path; the second is for proxies, which may map to it."""

TOKEN_SECONDS: Final = 3600
"""For how long a login is good. Pulsar logs in anew five minutes before."""

FORM_BYTES: Final = 8 << 10
POLL_BYTES: Final = 64 << 10
KEY_LENGTH: Final = 200
TOKEN_LENGTH: Final = 2000

LONGEST_POLL: Final = 60.0
LOOK_EVERY: Final = 0.5
"""Seconds between two looks into the store: another process may have put a letter."""

SETTLE: Final = 2.0
"""Seconds after a login in which nothing is handed out. A Pulsar that starts asks at once, and then takes what it was
sent meanwhile for jobs of its former life: such a job runs, but is called lost."""

POLLS: Final = 2
"""Polls of one manager that are held open. (Of a Pulsar that was killed one may still be there.)"""

GUESSES: Final = 4
"""Failed logins of one account that are kept waiting at a time."""

TELL_EVERY: Final = 60.0
"""Seconds between two lines in the log about failed logins of one account."""


@dataclass(frozen=True)
class Account:
    """Who may log in, and the managers whose topics it sees."""

    user: str
    password: str = field(repr=False)
    managers: Sequence[Manager]

    @property
    def key(self) -> bytes:
        """Signs the account's tokens: every process of ours can check them, and a new password ends them."""
        return hashlib.sha256(json.dumps(["tesp-api relay", self.user, self.password]).encode()).digest()


@dataclass(frozen=True)
class Login:
    """An account that has logged in, when that was, and what tells its logins apart."""

    account: Account
    id: str
    at: float

    def message_id(self, letter_id: int) -> str:
        """How a message is called that is handed out in this login."""
        return f"{self.id}-{letter_id}"

    def letter_id(self, message_id: str) -> int:
        """The letter behind it; 0 if it was handed out in another login."""
        login, _, number = message_id.rpartition("-")
        return int(number) if login == self.id and number.isascii() and number.isdigit() and len(number) < 19 else 0


@dataclass(frozen=True)
class Poll:
    """What a poll asks for: the messages of a manager after a letter, for which it waits some seconds."""

    manager: Manager
    after: int
    timeout: float


class Relay:
    """The calls, each a handler.

    `max_body` is the limit for a message in bytes. `penalty` are the seconds that a failed login waits for its answer,
    `body_within` those that a body may take to arrive; `settle`, `look_every`: see SETTLE, LOOK_EVERY.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        accounts: Sequence[Account],
        *,
        max_body: int = LETTER_BYTES,
        penalty: float = 1.0,
        body_within: float = 60.0,
        settle: float = SETTLE,
        look_every: float = LOOK_EVERY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._mailbox = mailbox
        self._accounts = {account.user: account for account in accounts}
        self._max_body = min(max_body, LETTER_BYTES)
        self._penalty = penalty
        self._body_within = body_within
        self._settle = settle
        self._look_every = look_every
        self._closing = False
        self._clock = clock
        self._failing: Counter[str] = Counter()
        self._tell_at: dict[str, float] = {}
        self._polls: dict[str, list[asyncio.Event]] = {}
        self._passed: dict[str, int] = {}

    def add_to(self, router: APIRouter) -> None:
        """Serve the calls; they are no part of the TES document."""
        for prefix in PREFIXES:
            Methods(POST=self.login).add_to(router, f"{prefix}/auth/login")
            Methods(POST=self.poll).add_to(router, f"{prefix}/messages/poll")
            Methods(POST=self.post).add_to(router, f"{prefix}/api/v1/messages")

    # Login

    async def login(self, request: Request) -> Response:
        """`POST /auth/login`: a form with username and password for a token."""
        form = _form(await self._body(request, FORM_BYTES))
        account = self._accounts.get(form["username"])
        name = account.user if account else ""
        if account is None or not _same(form["password"], account.password):
            await self._fail(name)
        assert account is not None
        document = [account.user, secrets.token_hex(6), int(self._clock()) + TOKEN_SECONDS]
        answer = {"access_token": _sign(document, account.key), "expires_in": TOKEN_SECONDS, "token_type": "bearer"}
        return Json(answer, headers={"Cache-Control": "no-store"})

    async def _fail(self, name: str) -> None:
        """Refuse a login, after a while. No guess keeps the right password out, which is too long to be guessed."""
        if self._failing[name] >= GUESSES:
            raise HTTPException(429, "Too many failed logins; please try again.", {"Retry-After": "2"})
        if time.monotonic() >= self._tell_at.get(name, 0.0):
            log.warning("Relay: a login %s was refused.", f"as {name!r} with a wrong password" if name else "of nobody")
            self._tell_at[name] = time.monotonic() + TELL_EVERY
        self._failing[name] += 1
        try:
            await asyncio.sleep(self._penalty)
        finally:
            self._failing[name] -= 1
        raise _stranger("The user or the password is wrong.")

    def _caller(self, request: Request) -> Login:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        body, _, signature = token.strip().rpartition(".")
        if scheme.lower() == "bearer" and len(token) <= TOKEN_LENGTH:
            with contextlib.suppress(ValueError, TypeError, KeyError, binascii.Error, RecursionError):
                user, login_id, until = json.loads(base64.urlsafe_b64decode(body.encode("ascii")))
                account = self._accounts[user]
                if _same(signature, _signature(body, account.key)) and self._clock() < until:
                    return Login(account, login_id, until - TOKEN_SECONDS)
        raise _stranger("This call needs the token of a login that is not older than an hour.")

    # Poll

    async def poll(self, request: Request) -> Response:
        """`POST /messages/poll`: held open until there is a message, or as long as the caller wants to wait."""
        login = self._caller(request)
        poll = _read_poll(await self._body(request, POLL_BYTES), login)
        settled = min(login.at + self._settle - self._clock(), self._settle)
        box = poll.manager.outbox
        if poll.after > self._passed.get(box, 0):
            await self._mailbox.drop(box, poll.after)
            self._passed[box] = poll.after
        async with self._held(box) as replaced:
            letters = await self._letters(poll, request, replaced, settled)
        if not letters and replaced.is_set() and not self._closing:
            raise HTTPException(429, "Another poll has taken the place of this one.", {"Retry-After": "5"})
        messages = ",".join(_message(login, each) for each in letters)
        return Response(f'{{"messages":[{messages}]}}', media_type="application/json")

    @asynccontextmanager
    async def _held(self, box: str) -> AsyncIterator[asyncio.Event]:
        """One more open poll; the event is set when it has to make room."""
        held = self._polls.setdefault(box, [])
        me = asyncio.Event()
        held.append(me)
        if self._closing:
            me.set()
        if len(held) > POLLS:
            held[-1 - POLLS].set()
        try:
            yield me
        finally:
            held.remove(me)

    async def _letters(self, poll: Poll, request: Request, replaced: asyncio.Event, settled: float) -> Sequence[Letter]:
        """Letters, as soon as there are any, but not within the next `settled` seconds; none if it was in vain, the
        caller has left, or has to make room."""
        loop = asyncio.get_running_loop()
        until, settled = loop.time() + poll.timeout, loop.time() + settled
        leaving = asyncio.create_task(_left(request))
        making_room = asyncio.create_task(replaced.wait())
        try:
            with self._mailbox.doorbell.listen(poll.manager.outbox) as bell:
                for each in (leaving, making_room):
                    each.add_done_callback(lambda _: bell.set())
                while True:
                    bell.clear()
                    if leaving.done() or making_room.done():
                        return []
                    early = settled - loop.time()
                    if early <= 0 and (letters := await self._mailbox.read(poll.manager.outbox, poll.after)):
                        return letters
                    if (rest := until - loop.time()) <= 0:
                        return []
                    await rung(bell, min(rest, early if early > 0 else self._look_every))
        finally:
            leaving.cancel()
            making_room.cancel()

    def close(self) -> None:
        """Answer the polls that are held, and hold no more: the service is about to stop."""
        self._closing = True
        for held in self._polls.values():
            for each in held:
                each.set()

    # Post

    async def post(self, request: Request) -> Response:
        """`POST /api/v1/messages`: a status update, or what a Pulsar says of itself."""
        login = self._caller(request)
        key = _read_key(request)
        body = await self._body(request, self._max_body)
        topic, text = await asyncio.to_thread(_read_message, body)
        box = _box_of(topic, login.account)
        if len(text) > LETTER_BYTES:
            raise BodyTooLarge(f"The payload must not be larger than {LETTER_BYTES} bytes.")
        letter_id = await self._mailbox.put(box, text, key)
        return Json({"message_id": str(letter_id), "topic": topic, "timestamp": rfc3339(self._clock())})

    async def _body(self, request: Request, limit: int) -> bytes:
        try:
            async with asyncio.timeout(self._body_within):
                return await read_body(request, limit)
        except TimeoutError:
            raise HTTPException(408, f"The body did not arrive within {self._body_within:g} seconds.") from None


# What comes in


async def _left(request: Request) -> None:
    """Return when the caller has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _form(body: bytes) -> dict[str, str]:
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, strict_parsing=True, max_num_fields=20)
    except ValueError:
        raise _refuse("body", "must be a form with username and password") from None
    for name in ("username", "password"):
        if len(fields.get(name, ())) != 1:
            raise _refuse(name, "must be given once")
    if fields.get("grant_type", ["password"]) != ["password"]:
        raise _refuse("grant_type", "must be password")
    return {name: values[0] for name, values in fields.items()}


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _refuse("body", "must be JSON") from None
    if not isinstance(document, dict):
        raise _refuse("body", "must be a JSON object")
    return document


def _read_poll(body: bytes, login: Login) -> Poll:
    document = _document(body)
    topics, timeout, since = document.get("topics"), document.get("timeout", 0), document.get("since") or {}
    if not isinstance(topics, list) or not topics or not all(isinstance(each, str) for each in topics):
        raise _refuse("topics", "must be a list of names")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise _refuse("timeout", "must be a number of seconds")
    if not isinstance(since, dict) or not all(isinstance(each, str) for each in since.values()):
        raise _refuse("since", "must be an object of message ids")
    for topic in topics:
        if not any(topic in each.reads for each in login.account.managers):
            raise HTTPException(403, f"The topic {topic[:200]!r} is not for this account to read.")
    manager = next((each for each in login.account.managers if each.reads == set(topics)), None)
    if manager is None:
        raise _refuse("topics", "must be the three of one manager: job_setup, job_status_request and job_kill")
    # A batch is worked on as a whole before the next poll, in the order of the letters, whatever their topics.
    after = max((login.letter_id(since[topic]) for topic in topics if topic in since), default=0)
    return Poll(manager, after, min(timeout, LONGEST_POLL))


def _read_key(request: Request) -> str:
    key = request.headers.get("idempotency-key", "")
    if len(key) > KEY_LENGTH:
        raise _refuse("Idempotency-Key", f"must not have more than {KEY_LENGTH} characters")
    return key or secrets.token_hex(16)


def _read_message(body: bytes) -> tuple[str, str]:
    """The topic, and the payload as JSON in ASCII, which every store can hold."""
    document = _document(body)
    topic, payload = document.get("topic"), document.get("payload")
    if not isinstance(topic, str):
        raise _refuse("topic", "must be a name")
    if not isinstance(payload, dict):
        raise _refuse("payload", "must be an object")
    try:
        return topic, json.dumps(payload, separators=(",", ":"))
    except RecursionError:
        raise _refuse("payload", "is nested too deeply") from None


def _box_of(topic: str, account: Account) -> str:
    for each in account.managers:
        if topic == each.update:
            return each.inbox
        if topic == each.capabilities:
            return each.about
    raise HTTPException(403, f"The topic {topic[:200]!r} is not for this account to write.")


# What goes out


def _message(login: Login, letter: Letter) -> str:
    topic, payload = read_letter(letter.text)
    return f'{{"message_id":"{login.message_id(letter.id)}","topic":{json.dumps(topic)},"payload":{payload}}}'


def _sign(document: object, key: bytes) -> str:
    body = base64.urlsafe_b64encode(json.dumps(document, separators=(",", ":")).encode()).decode()
    return f"{body}.{_signature(body, key)}"


def _signature(body: str, key: bytes) -> str:
    return hmac.new(key, body.encode(), hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    """Whether two secrets are the same, in a time that tells nothing of them, nor of their lengths."""
    return hmac.compare_digest(*(hashlib.sha256(each.encode("utf-8", "replace")).digest() for each in (one, other)))


def _stranger(message: str) -> HTTPException:
    return HTTPException(401, message, {"WWW-Authenticate": "Bearer"})


def _refuse(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {message}.", [Detail(name, message)])


__all__ = ["Account", "Relay"]
