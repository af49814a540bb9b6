"""Pulsar's letters over an AMQP broker (RabbitMQ), with the names that a stock Pulsar uses.

All queues are declared here, durable, before anything is sent: nobody else declares that of the status updates, and
without one they are lost. Beside it each process has a queue of its own with the same routing key, because a shared
queue hands each message to one of its readers only, and the one who asked may be another.

A message that is not exactly as Pulsar's consumers expect kills them for good, so all are made in one place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aio_pika
from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueue,
    DeliveryMode,
    ExchangeType,
)
from aiormq import exceptions as amqp
from yarl import URL

from tesp_api.errors import SettingsError, SiteRefused, SiteUnavailable
from tesp_api.sites import documents
from tesp_api.sites.pulsar.post import KILL, SETUP, STATUS

log = logging.getLogger(__name__)

T = TypeVar("T")

EXCHANGE: Final = "pulsar"
STATUS_UPDATE: Final = "status_update"
DEFAULT_MANAGER: Final = "_default_"

LETTER_BYTES: Final = 64 * 1024 * 1024
"""Longest letter that is read: it holds a result and lists of files."""

LONG: Final = 256 * 1024
"""Letters longer than this are parsed beside the event loop."""

PREFETCH: Final = 32
"""Letters that the broker hands out before one of them was noted."""

SENDING: Final = 64
"""Letters under way to the broker at once."""

HEARTBEAT: Final = 15
"""Seconds; a peer that is silent for three of these is gone. `heartbeat` in the URL says otherwise."""

RECONNECT: Final = 2.0
"""Seconds for which a letter waits for a connection that has just broken."""

LONGEST_PAUSE: Final = 10.0
"""Seconds between two tries to connect, at most."""

STEADY: Final = 1.0
"""Seconds after which a connection counts as good; before, the next one is not tried at once."""

CHECK_EVERY: Final = 30.0
"""Seconds between two looks whether our consumer is still there: an admin may have deleted its queue."""


class AmqpPost:
    """See Post. `url` as aio-pika takes it: `amqp[s]://user:password@host:port/vhost?cafile=...`.

    `manager` is the Pulsar manager's name if it is not the default one; `key_prefix` is Pulsar's `amqp_key_prefix` if
    that is set. `timeout` is for one call of the broker; `check_every`: see CHECK_EVERY.
    """

    def __init__(
        self,
        url: str,
        *,
        manager: str = "",
        key_prefix: str = "",
        timeout: float = 30.0,
        check_every: float = CHECK_EVERY,
    ) -> None:
        self._url, shown = _url(url)
        manager = manager or DEFAULT_MANAGER
        self.where = f"Pulsar behind {shown}" + ("" if manager == DEFAULT_MANAGER else f" (manager {manager})")
        self.doubt = "does Pulsar run there, with this manager" + (
            f" and the prefix {key_prefix!r}" if key_prefix else ""
        )
        self._broker = f"The broker {shown}"
        self._prefix = key_prefix or ("pulsar_" if manager == DEFAULT_MANAGER else f"pulsar_{manager}_")
        self._timeout = timeout
        self._check_every = check_every
        self._letters: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self._copies: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
        self._sending = asyncio.Semaphore(SENDING)
        self._tried = asyncio.Event()
        self._ready = asyncio.Event()
        self._broken = asyncio.Event()
        self._exchange: AbstractExchange | None = None
        self._trouble = ""
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        for name in ("aio_pika", "aiormq"):  # they log frames and URLs; what matters is said here
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._keeper = asyncio.create_task(self._keep_connected())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._trouble = f"{self.where} is not in use any more."

    # Post

    async def send(self, box: str, letter: Mapping[str, object]) -> None:
        """See Post. SiteRefused: the broker takes no letter of this length."""
        exchange = await self._connected()
        message = self._message(box, letter)
        try:
            async with self._sending:
                await _ours(exchange.publish(message, self._name(box), mandatory=True, timeout=self._timeout))
        except amqp.PublishError as error:  # given back: no queue; connecting again declares it
            self._broken.set()
            raise SiteUnavailable(f"{self._broker} has no queue {self._name(box)!r} any more.", unsent=True) from error
        except amqp.DeliveryError as error:
            raise SiteUnavailable(f"{self._broker} could not keep a message.") from error
        except TimeoutError as error:
            raise SiteUnavailable(f"{self._broker} did not confirm a message in time.") from error
        except Exception as error:  # aiormq passes on whatever closed the connection, at times a bare Exception
            self._broken.set()
            if _is_too_long(error, len(message.body)):
                raise SiteRefused(
                    f"{self._broker} takes no message of {len(message.body)} bytes; see its max_message_size."
                ) from error
            raise SiteUnavailable(f"The connection to {self._broker[4:]} broke: {_told(error)}") from error

    async def letters(self) -> AsyncIterator[object]:
        """See Post."""
        while True:
            message = await self._letters.get()
            if message.channel.is_closed:
                continue  # the broker hands it out again
            found, document = await self._document(message)
            if found:
                yield document
            with suppress(Exception):  # whatever closed the connection; then it comes again
                await _ours(message.ack())

    async def copies(self) -> AsyncIterator[object]:
        """See Post."""
        while True:
            message = await self._copies.get()
            found, document = await self._document(message, aloud=False)
            if found:
                yield document

    async def version(self) -> str:
        """See Post: over a broker Pulsar gives none."""
        return ""

    # Messages

    def _message(self, box: str, letter: Mapping[str, object]) -> aio_pika.Message:
        return aio_pika.Message(
            json.dumps(letter, separators=(",", ":")).encode("ascii"),
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=DeliveryMode.PERSISTENT,
            # Nobody waits for the answer to an old question, and while Pulsar is down they would pile up.
            expiration=self._timeout if box == STATUS else None,
        )

    async def _document(self, message: AbstractIncomingMessage, *, aloud: bool = True) -> tuple[bool, object]:
        body = message.body
        try:
            if len(body) > LETTER_BYTES:
                raise ValueError(f"{len(body)} bytes are too many")
            if len(body) > LONG:
                return True, await asyncio.to_thread(json.loads, body)
            return True, json.loads(body)
        except (ValueError, RecursionError) as error:
            if aloud:
                log.warning("%s: a message that is no JSON was dropped: %s", self.where, _words(error))
            return False, None

    def _name(self, box: str) -> str:
        return f"{self._prefix}_{box}"

    # The connection

    async def _connected(self) -> AbstractExchange:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timeout):
                await self._tried.wait()
            async with asyncio.timeout(RECONNECT):
                await self._ready.wait()
        if self._exchange is None:
            raise SiteUnavailable(self._trouble or f"{self._broker} does not answer.", unsent=True)
        return self._exchange

    async def _keep_connected(self) -> None:
        pause = 0.0
        while True:
            connection: AbstractConnection | None = None
            try:
                async with asyncio.timeout(self._timeout):
                    connection = aio_pika.Connection(aio_pika.connection.make_url(self._url))  # to close it if it fails
                    await _ours(connection.connect())
                    shared, own = await _ours(self._open(connection))
                self._tell("")
                began = time.monotonic()
                await self._until_broken(shared, own)
                pause = 0.0 if time.monotonic() - began > STEADY else max(pause, STEADY / 2)
                self._trouble = f"The connection to {self._broker[4:]} broke."
            except Exception as error:
                self._tell(self._words(error))
            finally:
                self._ready.clear()
                self._exchange = None
                await _close(connection)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - so that replicas do not come in step
            pause = min(LONGEST_PAUSE, 2 * pause or 0.2)

    async def _open(self, connection: AbstractConnection) -> tuple[AbstractQueue, AbstractQueue]:
        """Declare everything, then listen, then let letters go out. The queues of status updates: the shared one, and
        that of this process."""
        self._broken.clear()
        connection.close_callbacks.add(self._on_close)
        sender = await self._channel(connection)
        exchange = await sender.declare_exchange(EXCHANGE, ExchangeType.DIRECT, durable=True)
        for box in (STATUS_UPDATE, SETUP, KILL, STATUS):
            queue = await sender.declare_queue(self._name(box), durable=True)
            await queue.bind(exchange, self._name(box))
        own = await self._listen_alone(await self._channel(connection), exchange)
        reader = await self._channel(connection)
        await reader.set_qos(prefetch_count=PREFETCH)
        shared = await reader.declare_queue(self._name(STATUS_UPDATE), durable=True)
        self._exchange = exchange
        self._ready.set()
        await shared.consume(self._letters.put)
        return shared, own

    async def _listen_alone(self, channel: AbstractChannel, exchange: AbstractExchange) -> AbstractQueue:
        own = await channel.declare_queue(exclusive=True, auto_delete=True)
        await own.bind(exchange, self._name(STATUS_UPDATE))
        await own.consume(self._copies.put, no_ack=True)
        return own

    async def _channel(self, connection: AbstractConnection) -> AbstractChannel:
        channel = connection.channel(publisher_confirms=True, on_return_raises=True)
        await channel.initialize()
        channel.close_callbacks.add(self._on_close)
        return channel

    def _on_close(self, *_: Any) -> None:
        self._broken.set()

    async def _until_broken(self, shared: AbstractQueue, own: AbstractQueue) -> None:
        while True:
            try:
                async with asyncio.timeout(self._check_every):
                    await self._broken.wait()
                return
            except TimeoutError:
                async with asyncio.timeout(self._timeout):
                    found = await _ours(shared.declare())
                    # The broker chose its name, under which nobody may declare one that is gone.
                    still = await _ours(own.channel.declare_queue(own.name, passive=True))
                if not (found.consumer_count and still.declaration_result.consumer_count):
                    return

    def _tell(self, trouble: str) -> None:
        """Note how the connection is, and say it once."""
        if trouble and trouble != self._trouble:
            log.warning("%s", trouble)
        elif not trouble:
            log.info("%s is connected.", self._broker)
        self._trouble = trouble
        self._tried.set()

    def _words(self, error: Exception) -> str:
        """Why there is no connection, in one sentence without secrets."""
        seen: BaseException | None = error
        while seen is not None:
            if (words := _reason(seen)) is not None:
                return f"{self._broker} {words}"
            seen = seen.__cause__
        return f"{self._broker} cannot be used: {_told(error)}"


def _reason(error: BaseException) -> str | None:
    if isinstance(error, amqp.ProbableAuthenticationError | amqp.AuthenticationError):
        return "refuses our login: the user or the password in `amqp_url` is wrong."
    if isinstance(error, amqp.ConnectionNotAllowed) or _is_shut_out(error):
        return "does not let us use the virtual host in `amqp_url`: is there one of that name, and may our user use it?"
    if isinstance(error, amqp.ChannelAccessRefused):
        return f"does not allow our user what it needs: {_told(error)}"
    if isinstance(error, amqp.ChannelPreconditionFailed):
        return f"has a queue or an exchange of the same name with other properties: {_told(error)}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"has a certificate that is not trusted: {documents.words(error.verify_message, 120)}."
    if isinstance(error, ssl.SSLError):
        return f"and we find no common TLS: {documents.words(error.reason or str(error), 120)}."
    if isinstance(error, TimeoutError):
        return "did not answer in time."
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return f"cannot be used: a file that `amqp_url` names for TLS cannot be read: {error.strerror}."
    if isinstance(error, OSError) and not isinstance(error, amqp.AMQPError):
        return f"cannot be reached: {documents.words(error.strerror or str(error), 120) or type(error).__name__}."
    return None


async def _ours(work: Awaitable[T]) -> T:
    """What comes of `work`; ConnectionError if that is cancelled, but not whoever waits for it here: when a connection
    is closed, aiormq calls all cancelled that is under way on it, and the waiting task would end without a word."""
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError("it was closed") from None


def _told(error: BaseException) -> str:
    """What the broker says, which knows no password of ours."""
    words = next((each for each in reversed(error.args) if isinstance(each, str)), "")
    return documents.words(words, 160) or type(error).__name__


def _words(error: Exception) -> str:
    return documents.words(str(error), 100)


def _is_shut_out(error: BaseException) -> bool:
    """Whether the broker said good-bye in place of its consent to the virtual host; aiormq keeps its words back."""
    return isinstance(error, amqp.InvalidFrameError) and "Connection.OpenOk" in str(error)


def _is_too_long(error: BaseException, length: int) -> bool:
    return isinstance(error, amqp.ChannelPreconditionFailed) and f"size {length} " in _told(error)


def _url(text: str) -> tuple[URL, str]:
    """The address to connect to, and how it is shown: without user, password and parameters."""
    try:
        url = URL(text)
        host, port = url.host, url.port
    except ValueError:
        raise SettingsError("settings: amqp_url is no URL") from None
    if url.scheme not in ("amqp", "amqps") or not host:
        raise SettingsError("settings: amqp_url must be amqp:// or amqps:// with a host")
    port = port or (5671 if url.scheme == "amqps" else 5672)
    defaults = {"heartbeat": str(HEARTBEAT), "name": "tesp-api"}
    shown_host = f"[{host}]" if ":" in host else host
    return (
        url.update_query({key: value for key, value in defaults.items() if key not in url.query}),
        f"{url.scheme}://{shown_host}:{port}{url.path if url.path != '/' else ''}",
    )


async def _close(connection: AbstractConnection | None) -> None:
    if connection is None:
        return
    with suppress(amqp.AMQPError, OSError, RuntimeError, TimeoutError):
        async with asyncio.timeout(2.0):
            await connection.close()
