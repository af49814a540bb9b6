"""The REST carrier: Pulsar's web server, over TCP or a unix socket.

Pulsar reads all parameters from the query, the private token among them. So the query never enters a URL that httpx
might log or put into an error: it is added below the client, on the way to the socket.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote, urlencode

import httpx

from tesp_api.errors import SiteClosed, SiteError, SiteRefused, SiteUnavailable
from tesp_api.runner.bundle import FILE_NAME, Bundle, pseudo_job
from tesp_api.sites import documents
from tesp_api.sites.pulsar import messages
from tesp_api.sites.pulsar.messages import INPUT, LOST, OUTPUT, OUTPUT_METADATA, PLAN, Launch, Status

log = logging.getLogger(__name__)

CONTROLS: Final = 4
"""Control requests at once: Pulsar has four threads, and more only wait in its queue."""

TRANSFERS: Final = 2
"""Transfers of files at once, so that slow ones leave Pulsar threads for control."""

QUERY: Final = 7000
"""Longest query, encoded: proxies between us and Pulsar often stop at 8 kB."""

LONGEST_CONTROL: Final = 3.0
LONGEST_TRANSFER: Final = 10.0
"""How many times its timeout, which is for each step of it, a request may take altogether."""

ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Longest answer to a status request: it holds the result and lists of files."""

DEDUPLICATES: Final = (0, 15, 15)
"""The first Pulsar that ignores a repeated submit; older ones start the job again, and the runner's lock stops it."""

OF_THE_JOB: Final = frozenset({400, 409, 413, 414, 422, 431})
"""HTTP codes that may be about this request alone; other refusals would meet any."""

NOBODY: Final = "tesp-check"
"""A job that is nowhere."""

MARKER: Final = "delivered"
"""A file of the runner's pseudo job: the runner's upload is whole. It is an output; inputs cannot be downloaded."""


@dataclass(frozen=True)
class Answer:
    """What came back: the HTTP status, and the body, None if it was longer than allowed."""

    code: int
    body: bytes | None


class RestCarrier:
    """A Pulsar behind `url`, or behind the unix socket `uds` (then `url` only names it in messages).

    `manager` is the Pulsar manager's name if it is not the default one. `gate` is awaited before each request.
    """

    by_mail = False
    file_pause = 0.0

    def __init__(
        self,
        url: str = "http://pulsar",
        *,
        private_token: str | None = None,
        manager: str | None = None,
        uds: str | None = None,
        timeout: float = 10.0,
        verify: ssl.SSLContext | bool = True,
        gate: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        base = httpx.URL(url)
        self.where = f"Pulsar at {uds}" if uds else f"Pulsar at {base.scheme}://{base.netloc.decode('ascii')}"
        prefix = f"/managers/{quote(manager, safe='')}" if manager else ""
        self._base = base.copy_with(path=base.path.rstrip("/") + prefix, query=None, fragment=None)
        self._manager = manager
        self._private_token = private_token
        self._uds = uds
        self._verify = verify
        self._gate = gate
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, 5.0))
        self._transfer_timeout = httpx.Timeout(max(timeout, 60.0), connect=min(timeout, 5.0))
        self._controls = asyncio.Semaphore(CONTROLS)
        self._transfers = asyncio.Semaphore(TRANSFERS)
        self._stack = AsyncExitStack()
        self._client: httpx.AsyncClient | None = None
        self._under_way = set[asyncio.Task[Answer]]()
        self._warned = False

    async def __aenter__(self) -> Self:
        # gunicorn drops an idle connection after 2 s, and a request on its way at that moment is lost.
        limits = httpx.Limits(max_connections=CONTROLS + TRANSFERS, keepalive_expiry=1.5)
        transport = httpx.AsyncHTTPTransport(uds=self._uds, verify=self._verify, limits=limits)
        client = httpx.AsyncClient(transport=_WithQuery(transport), base_url=self._base, follow_redirects=False)
        self._client = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client = None
        for request in self._under_way:
            request.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._stack.aclose()

    # The carrier's verbs

    async def deliver(self, runner: Bundle, *, again: bool) -> None:
        """See Carrier. Another service that delivers the same at the same time is told by the marker."""
        pseudo, mark = pseudo_job(runner.sha256), runner.sha256.encode("ascii")
        known = await self.status(pseudo)
        await self._set_up_runner(pseudo)
        if not again and (known is None or known.state != LOST):
            there = await self._control("GET", f"/jobs/{pseudo}/files", {"name": MARKER, "type": OUTPUT}, limit=256)
            if there.code == 200 and there.body == mark:
                return
        await self._upload(pseudo, FILE_NAME, INPUT, runner.data)
        await self._upload(pseudo, MARKER, OUTPUT, mark)
        log.info("%s has the runner %s now.", self.where, runner.sha256[:12])

    async def _set_up_runner(self, pseudo: str) -> None:
        """Create the pseudo job, and learn from the answer whether we can work with this Pulsar at all."""
        answer = self._good(await self._control("POST", "/jobs", {"job_id": pseudo}), "set-up")
        made = messages.read_setup(_json(answer))
        if made is None:
            raise SiteUnavailable(f"{self.where} did not answer a set-up as a Pulsar does.")
        if made.job_id != pseudo:
            if messages.JOB_ID.fullmatch(made.job_id):
                await self.clean(made.job_id)
            raise SiteClosed(
                f"{self.where} gives jobs ids of its own, so that a job could not be found again after a lost answer: "
                "remove `assign_ids` from the manager in its app.yml."
            )
        if unsafe := messages.UNSAFE_PATH.search(made.job_directory):
            raise SiteClosed(
                f"{self.where} has {unsafe.group()!r} in the path of its staging_directory, which breaks every job of "
                "Pulsar: choose a path of plain characters."
            )
        if not self._warned and _version(made.version) < DEDUPLICATES:
            self._warned = True
            log.warning(
                "%s is version %s; 0.15.16 or later is recommended: older ones lose more jobs in a restart.",
                self.where,
                made.version or "unknown",
            )

    async def launch(self, launch: Launch) -> None:
        """See Carrier. One call does it all unless the plan is long; then the plan is uploaded first."""
        path = f"/jobs/{messages.check_id(launch.job_id)}"
        query = messages.submit_query(launch, set_up=True)
        if self._length(query) > QUERY:
            plan = next(each for each in launch.files if each.name == PLAN)
            others = tuple(each for each in launch.files if each is not plan)
            self._good(await self._control("POST", "/jobs", {"job_id": launch.job_id}), "set-up")
            try:
                await self._upload(launch.job_id, plan.name, plan.kind, plan.text.encode("ascii"))
                query = messages.submit_query(replace(launch, files=others), set_up=False)
                answer = await self._control("POST", f"{path}/submit", query)
            except SiteUnavailable as error:
                raise SiteUnavailable(str(error)) from error  # it has heard of the job already
        else:
            answer = await self._control("POST", f"{path}/submit", query)
        answer = self._good(answer, "submit")
        if answer.body != b"OK":
            raise SiteUnavailable(f"{self.where} did not answer a submit as a Pulsar does.")

    async def status(self, job_id: str) -> Status | None:
        """See Carrier."""
        answer = await self._control("GET", f"/jobs/{messages.check_id(job_id)}/status", limit=ANSWER_BYTES)
        if answer.code == 500 or answer.body is None:
            return None
        status = messages.read_status(_json(self._good(answer, "status")))
        if status is None:
            raise SiteUnavailable(f"{self.where} did not answer a status request as a Pulsar does.")
        return status

    async def fetch(self, job_id: str, name: str, limit: int) -> bytes | None:
        """See Carrier."""
        query = {"name": name, "type": OUTPUT_METADATA}
        small = limit <= 1024 * 1024
        answer = await self._send(
            "GET", f"/jobs/{messages.check_id(job_id)}/files", query, limit=limit, transfer=not small
        )
        return None if answer.code in (404, 500) else self._good(answer, "download").body

    async def put(self, job_id: str, name: str, kind: str, data: bytes) -> None:
        """See Carrier."""
        query = {"name": name, "type": kind}
        path = f"/jobs/{messages.check_id(job_id)}/files"
        self._good(await self._control("POST", path, query, content=data), "upload")

    async def kill(self, job_id: str) -> None:
        """See Carrier."""
        self._good(await self._control("PUT", f"/jobs/{messages.check_id(job_id)}/cancel"), "kill")

    async def clean(self, job_id: str) -> None:
        """See Carrier."""
        self._good(await self._control("DELETE", f"/jobs/{messages.check_id(job_id)}"), "clean-up")

    async def updates(self) -> AsyncIterator[tuple[str, Status]]:
        """None ever: over REST Pulsar only answers."""
        await asyncio.Event().wait()
        yield "", Status(LOST)

    async def check(self) -> str:
        """See Carrier. The status of a job needs the token; the health check does not, and older ones have none."""
        await self.status(NOBODY)
        with suppress(SiteRefused):
            return documents.words(await self.version(), 40)
        return ""

    async def version(self) -> str:
        """Pulsar's version, by its health check (0.15 and later)."""
        document = _json(self._good(await self._control("GET", "/healthz"), "health check"))
        return str(document.get("version", "")) if isinstance(document, dict) else ""

    # One request

    async def _upload(self, job_id: str, name: str, kind: str, data: bytes) -> None:
        # bytes, so that Content-Length is sent: before 0.15.15 a chunked upload stores nothing, and says 200
        query = {"name": name, "type": kind}
        answer = await self._send("POST", f"/jobs/{job_id}/files", query, content=data, transfer=True)
        self._good(answer, "upload")

    async def _control(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        content: bytes | None = None,
        limit: int = 1024 * 1024,
    ) -> Answer:
        return await self._send(method, path, query or {}, content=content, limit=limit, transfer=False)

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        *,
        content: bytes | None = None,
        limit: int = 1024 * 1024,
        transfer: bool,
    ) -> Answer:
        """One request, which takes its own time however little its caller has: broken off in the middle, it would cost
        the pool of connections one for ever."""
        if self._gate is not None:
            await self._gate()
        turns = self._transfers if transfer else self._controls
        await turns.acquire()
        request = asyncio.create_task(self._exchange(method, path, query, content, limit, transfer))
        self._under_way.add(request)
        request.add_done_callback(lambda done: self._exchanged(done, turns))
        return await asyncio.shield(request)

    def _exchanged(self, request: asyncio.Task[Answer], turns: asyncio.Semaphore) -> None:
        turns.release()
        self._under_way.discard(request)
        if not request.cancelled():
            request.exception()  # whoever asked may have gone

    async def _exchange(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        content: bytes | None,
        limit: int,
        transfer: bool,
    ) -> Answer:
        if self._client is None:
            raise SiteUnavailable(f"{self.where} is not in use any more.", unsent=True)
        timeout = self._transfer_timeout if transfer else self._timeout
        longest = (timeout.read or 0.0) * (LONGEST_TRANSFER if transfer else LONGEST_CONTROL)
        try:
            async with (
                asyncio.timeout(longest),  # an answer may come byte by byte; by then the connection stands
                self._client.stream(
                    method,
                    path,
                    content=content,
                    headers={"Accept-Encoding": "identity"},
                    timeout=timeout,
                    extensions={"pulsar_query": self._encoded(query)},
                ) as response,
            ):
                return Answer(response.status_code, await _bounded(response, limit))
        except httpx.ConnectError as error:
            raise SiteUnavailable(f"{self.where} cannot be reached: {error}", unsent=True) from error
        except (httpx.TimeoutException, TimeoutError) as error:
            raise SiteUnavailable(f"{self.where} did not answer in time.") from error
        except httpx.RemoteProtocolError as error:
            raise SiteUnavailable(f"{self.where} closed the connection without an answer.") from error
        except httpx.TransportError as error:
            raise SiteUnavailable(f"The connection to {self.where} broke: {type(error).__name__}.") from error

    def _good(self, answer: Answer, what: str) -> Answer:
        """The answer if it is a 200, else its error; the body is not quoted, because it may repeat the query."""
        if answer.code == 200:
            return answer
        raise self._error(answer.code, what)

    def _error(self, code: int, what: str) -> SiteError:
        if code == 401:
            return SiteClosed(
                f"{self.where} refuses us (401): the site's `private_token` is not the one in Pulsar's configuration."
            )
        if code >= 500 or code in (408, 425, 429):
            doubt = f"; has it a manager {self._manager!r}?" if self._manager and code == 500 else "."
            return SiteUnavailable(f"{self.where} failed to answer the {what} (HTTP {code}){doubt}")
        refused = SiteRefused if code in OF_THE_JOB else SiteClosed
        return refused(f"{self.where} refused the {what} (HTTP {code}); is there a Pulsar at that address?")

    def _encoded(self, query: Mapping[str, str]) -> bytes:
        values = dict(query)
        if self._private_token:
            values["private_token"] = self._private_token
        return urlencode(values, quote_via=quote, safe="").encode("ascii")

    def _length(self, query: Mapping[str, str]) -> int:
        return len(self._encoded(query))


class _WithQuery(httpx.AsyncBaseTransport):
    """Adds the query to a request below everything that logs URLs or keeps them in errors."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        extensions = dict(request.extensions)
        query: bytes = extensions.pop("pulsar_query", b"")
        whole = httpx.Request(
            request.method,
            request.url.copy_with(query=query or None),
            headers=request.headers,
            stream=request.stream,
            extensions=extensions,
        )
        return await self._transport.handle_async_request(whole)

    async def aclose(self) -> None:
        await self._transport.aclose()


async def _bounded(response: httpx.Response, limit: int) -> bytes | None:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _json(answer: Answer) -> object:
    try:
        document: object = json.loads(answer.body or b"")
    except (ValueError, RecursionError):
        return None
    return document


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
