"""The composition root: settings in, a running service out. Only this module knows concrete classes and settings."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tesp_api import __version__
from tesp_api.api import Api, ServiceDescription, extensions, problems, router
from tesp_api.api import relay as relay_api
from tesp_api.api.jobs import PATH, Jobs
from tesp_api.api.openapi import add_docs, openapi
from tesp_api.api.origins import ForeignPages
from tesp_api.api.repeats import Creates
from tesp_api.api.routes import Methods
from tesp_api.descriptors import raise_limit
from tesp_api.dispatch import loop
from tesp_api.dispatch.dispatcher import Dispatcher
from tesp_api.dispatch.health import Health
from tesp_api.dispatch.inspector import Inspector
from tesp_api.dispatch.keeper import Keeper
from tesp_api.dispatch.poller import Poller
from tesp_api.errors import SettingsError, StoreUnavailable, TespError
from tesp_api.lifecycle import Policy
from tesp_api.parameters import Offer, Offers, known
from tesp_api.relay import Manager
from tesp_api.runner.bundle import build
from tesp_api.runner.job import FileRoot, Runtime
from tesp_api.settings import BY_MAIL, Settings, SiteKeys, SiteSettings
from tesp_api.sites import Site, SiteFacts
from tesp_api.sites.local import LocalSite
from tesp_api.sites.pulsar.embedded import EmbeddedSite
from tesp_api.sites.pulsar.mail import MailCarrier
from tesp_api.sites.pulsar.relay import RelayPost
from tesp_api.sites.pulsar.rest import RestCarrier
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.store import TaskStore
from tesp_api.store.copy import copy
from tesp_api.store.mailbox import Mailbox
from tesp_api.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from tesp_api.store.mongo import MongoStore

log = logging.getLogger(__name__)

SQLITE_FILE = "tasks.sqlite"
"""The embedded store, in server.data_dir."""

CALM = 30.0
"""The least `poll_interval` in seconds where Pulsar tells of the ends of jobs itself, and a look at a file is dear."""

STOP_WITHIN = 5.0
"""Seconds that work under way may take when the service stops; what is cut off comes back with its lease."""


@dataclass
class Service:
    """The parts of one service; without the role `dispatch` it has neither sites nor loops."""

    store: TaskStore
    mailbox: Mailbox
    sites: Mapping[str, Site]
    dispatcher: Dispatcher
    poller: Poller
    keeper: Keeper
    policies: Mapping[str, Policy]
    inspector: Inspector
    dispatches: bool = True
    loops: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether all loops live."""
        return not self.dispatches or (bool(self.loops) and not any(each.done() for each in self.loops))

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Open store and sites, run the loops; stop in reverse."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            if not self.dispatches:
                yield
                return
            await self._claim_own_sites()
            for site in self.sites.values():
                await stack.enter_async_context(site)
            self.loops = [
                *(
                    asyncio.create_task(loop.run(each, self.store.bell, self.store.clock), name=each.name)
                    for each in (self.dispatcher, self.poller, self.keeper, self.inspector)
                ),
                *(
                    asyncio.create_task(self._listen(site), name=f"updates of {site.facts.name}")
                    for site in self.sites.values()
                ),
            ]
            for each in self.loops:
                each.add_done_callback(_tell_of_death)
            try:
                yield
            finally:
                await self._stop()

    async def _claim_own_sites(self) -> None:
        """Two services on different machines must not take each other's embedded Pulsar for their own."""
        with suppress(StoreUnavailable):  # the keeper says it later
            if site := await self.keeper.foreign():
                raise SettingsError(
                    f"The site {site!r} on this machine cannot be used: another service with the same db.mongodb_uri "
                    "but another server.data_dir has one of that name. Name it in [[default.sites]], or set pulsar.url."
                )

    async def _listen(self, site: Site) -> None:
        async for seen in site.updates():
            await self.poller.note(site.facts.name, seen)

    async def _stop(self) -> None:
        for each in self.loops:
            each.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)
        try:
            async with asyncio.timeout(STOP_WITHIN):
                await asyncio.gather(*(each.drain() for each in (self.dispatcher, self.poller, self.inspector)))
        except TimeoutError:
            log.warning("Stopping with work under way; the next start goes on with it.")


def _tell_of_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("The loop %r died; the service is not ready any more.", task.get_name(), exc_info=error)


@contextmanager
def _before_stop(*calls: Callable[[], None]) -> Iterator[None]:
    """Have `calls` made when the process is told to stop. The server waits for open requests before it tells us, and
    so would all those that stay open until something happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def heard(number: int, frame: FrameType | None) -> None:
        for call in calls:
            loop.call_soon_threadsafe(call)
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    chained = [number for number, handler in before.items() if callable(handler)]
    for number in chained:
        signal.signal(number, heard)
    try:
        yield
    finally:
        for number in chained:
            signal.signal(number, before[number])


def create_app(settings: Settings, service: Service | None = None) -> FastAPI:
    """The web application, whose lifespan runs the whole service. Raises TespError for settings that cannot work.

    `service` in place of the one that the settings describe.
    """
    service = service or build_service(settings)
    creates = Creates(service.store)
    jobs = Jobs(service.store, service.policies, service.store.clock)
    relay = _relay(service.mailbox, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.run(), creates.noting():
            with _before_stop(*(each.close for each in (jobs, relay) if each is not None)):
                yield

    app = FastAPI(
        title="tesp-api",
        version=__version__,
        description="GA4GH Task Execution Service 1.1 in front of Galaxy Pulsar.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(ForeignPages, allowed=settings.server.cors_origins)
    if settings.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.server.cors_origins),
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
        )
    if "api" in settings.server.roles:
        _add_api(app, service, creates, settings)
        Methods(POST=jobs.report).add_to(app.router, f"{PATH}/{{id}}")
    if relay is not None:
        relay.add_to(app.router)
    _add_health(app, service)
    return app


def _add_api(app: FastAPI, service: Service, creates: Creates, settings: Settings) -> None:
    api = Api(
        store=service.store,
        service=_description(settings),
        fold_canceling=settings.server.hide_canceling,
        fold_attempts=settings.retry.fold,
        max_body=int(settings.server.max_body_mb * (1 << 20)),
        creates=creates,
        offers=_offers(settings),
        sites=[_facts(settings, keys) for keys in _all_site_settings(settings)],
        clock=service.store.clock,
    )
    app.router.routes.extend([*router(api).routes, *extensions(api).routes])
    add_docs(app)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]


def _relay(mailbox: Mailbox, settings: Settings) -> relay_api.Relay | None:
    """The calls of Pulsars that log in here, if there are to be such."""
    managers: dict[tuple[str, str], list[Manager]] = {}
    for keys in _all_site_settings(settings):
        if keys.carrier == "relay":
            managers.setdefault((keys.relay_account, keys.relay_password), []).append(_manager(keys))
    if not managers or "api" not in settings.server.roles:
        return None
    accounts = [relay_api.Account(user, password, each) for (user, password), each in managers.items()]
    return relay_api.Relay(mailbox, accounts, max_body=int(settings.server.max_body_mb * (1 << 20)))


def _manager(keys: SiteSettings) -> Manager:
    return Manager(keys.name, keys.relay_topic_prefix, keys.manager)


def build_service(settings: Settings) -> Service:
    """The parts of the service, not yet opened."""
    store = _store(settings)
    dispatches = "dispatch" in settings.server.roles
    sites = {site.facts.name: site for site in _sites(settings, store.mail)} if dispatches else {}
    policies = {keys.name: _policy(settings, _facts(settings, keys)) for keys in _all_site_settings(settings)}
    health = Health(sites, store.clock)
    dispatcher = Dispatcher(store, sites, policies, store.clock, health, settings.dispatch.take_over)
    poller = Poller(store, sites, policies, dispatcher.submit, store.clock, health)
    inspector = Inspector(store, sites, health, store.clock)
    keeper = Keeper(store, settings.retention.days, _owned(settings) if dispatches else {}, policies.values())
    return Service(store, store.mail, sites, dispatcher, poller, keeper, policies, inspector, dispatches)


def _policy(settings: Settings, facts: SiteFacts) -> Policy:
    return Policy(
        lease=settings.dispatch.lease,
        patience=facts.patience,
        first_look=facts.first_look,
        poll_interval=facts.poll_interval,
        cancel_grace=facts.cancel_grace,
        max_attempts=settings.retry.max_attempts,
        backoff=settings.retry.backoff,
    )


def _store(settings: Settings) -> SqliteStore | MongoStore:
    if settings.db.mongodb_uri:
        return _mongo(settings.db.mongodb_uri)
    return SqliteStore(settings.server.data_dir.absolute() / SQLITE_FILE)


def _mongo(uri: str) -> MongoStore:
    from tesp_api.store.mongo import MongoStore  # slow to load, so only for those who use it

    return MongoStore(uri)


def settle() -> None:
    """Set up this process to serve: call it once, when the application is there.

    It gets all the file descriptors that it may have. As to the garbage collector: what there is by then stays, and
    need not be looked through again and again. And one request makes so many objects, all of which go without its
    help, that it would run at every other one.
    """
    raise_limit()
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


async def migrate(settings: Settings) -> tuple[int, int]:
    """Move the tasks of the embedded store into db.mongodb_uri; how many were moved, and how many were there already.

    May be repeated when it was interrupted. In the end the file is called `tasks.sqlite.moved`, so that no service
    starts on it by mistake. Raises TespError; nothing is lost then.
    """
    path = settings.server.data_dir.absolute() / SQLITE_FILE
    if not settings.db.mongodb_uri:
        raise SettingsError("settings: db.mongodb_uri says where the tasks are to go, and is not set")
    if not path.is_file():
        raise SettingsError(f"settings: there are no tasks to move: {path} does not exist")
    async with SqliteStore(path, alone=True) as source, _mongo(settings.db.mongodb_uri) as target:
        counts = await copy(source, target)
    path.rename(path.with_name(SQLITE_FILE + ".moved"))
    return counts


def _owned(settings: Settings) -> Mapping[str, str]:
    """The sites that live in our data directory, and what tells it from those of other services on a shared store."""
    names = [keys.name for keys in _all_site_settings(settings) if keys.carrier in ("embedded", "local")]
    if not names or not settings.db.mongodb_uri:
        return {}
    path = settings.server.data_dir.absolute() / "instance"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    mine.write_text(secrets.token_hex(8))
    with suppress(FileExistsError):  # then another process, or an earlier one, was first
        os.link(mine, path)
    mine.unlink()
    return dict.fromkeys(names, path.read_text())


def _add_health(app: FastAPI, service: Service) -> None:
    async def healthz(request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok", "version": __version__})

    async def readyz(request: Request) -> Response:
        """The store can be read and the loops live."""
        try:
            await service.store.ping()
        except TespError as error:
            return problems.problem(503, f"Not ready: {error}")
        if not service.running:
            return problems.problem(503, "Not ready: a background loop has died; see the log.")
        return JSONResponse({"status": "ready"})

    app.add_route("/healthz", healthz, include_in_schema=False)
    app.add_route("/readyz", readyz, include_in_schema=False)


def _description(settings: Settings) -> ServiceDescription:
    service = settings.service
    return ServiceDescription(
        id=service.id,
        name=service.name,
        organization_name=service.organization_name,
        organization_url=service.organization_url,
        version=__version__,
        description=service.description,
        contact_url=service.contact_url,
        documentation_url=service.documentation_url,
        environment=service.environment,
        storage=service.storage or _roots_as_storage(settings),
        backend_parameters=known(_offers(settings)),
    )


def _offers(settings: Settings) -> Offers:
    return {keys.name: Offer(keys.batch, keys.queues) for keys in _all_site_settings(settings)}


def _roots_as_storage(settings: Settings) -> tuple[str, ...]:
    """Toil, for one, sends files only below a URL that is listed as storage."""
    roots = [root.path for keys in _all_site_settings(settings) for root in keys.file_roots]
    return tuple(f"file://{path.rstrip('/')}/" for path in dict.fromkeys(roots))


# Sites


def _all_site_settings(settings: Settings) -> tuple[SiteSettings, ...]:
    """The sites to use: those listed, else the one Pulsar, else the embedded one."""
    if settings.sites:
        return settings.sites
    if settings.pulsar.url:
        return (SiteSettings(name="pulsar", carrier="rest", **_keys(settings.pulsar)),)
    if settings.pulsar.amqp_url:
        return (SiteSettings(name="pulsar", carrier="amqp", **_keys(settings.pulsar)),)
    return (SiteSettings(name="embedded", carrier="embedded", **_keys(settings.embedded)),)


def _keys(keys: SiteKeys) -> dict[str, Any]:
    return keys.model_dump()


def _sites(settings: Settings, mailbox: Mailbox) -> list[Site]:
    return [_site(settings, mailbox, keys) for keys in _all_site_settings(settings)]


def _site(settings: Settings, mailbox: Mailbox, keys: SiteSettings) -> Site:
    bundle = build()
    facts = _facts(settings, keys)
    if keys.carrier in ("embedded", "local"):
        _make_roots(keys)
    directory = settings.server.data_dir.absolute()
    if keys.carrier == "local":
        return LocalSite(facts, directory / "sites" / keys.name, bundle)
    if keys.carrier == "embedded":
        return EmbeddedSite(facts, directory / "sites" / keys.name if settings.sites else directory / "pulsar", bundle)
    if keys.carrier == "amqp":
        from tesp_api.sites.pulsar.amqp import AmqpPost  # as above

        post = AmqpPost(
            keys.amqp_url, manager=keys.manager, key_prefix=keys.amqp_key_prefix, timeout=keys.client_timeout
        )
        return PulsarSite(facts, MailCarrier(post, timeout=keys.client_timeout), bundle)
    if keys.carrier == "relay":
        relay_post = RelayPost(mailbox, _manager(keys))
        return PulsarSite(facts, MailCarrier(relay_post, timeout=keys.client_timeout), bundle)
    carrier = RestCarrier(
        keys.url, private_token=keys.private_token or None, manager=keys.manager or None, timeout=keys.client_timeout
    )
    return PulsarSite(facts, carrier, bundle)


def _make_roots(keys: SiteKeys) -> None:
    """File roots on our own machine must be there; those that tasks may write are made."""
    for root in keys.file_roots:
        path = Path(root.path)
        try:
            if root.write:
                path.mkdir(parents=True, exist_ok=True)
            path.stat()
        except OSError as error:
            raise SettingsError(f"settings: the file root {path} cannot be used: {error.strerror}") from error
        if not path.is_dir():
            raise SettingsError(f"settings: the file root {path} is no directory")


def _facts(settings: Settings, keys: SiteSettings) -> SiteFacts:
    own = keys.carrier in ("embedded", "local")
    by_mail = keys.carrier in BY_MAIL
    docker_host = settings.container.docker_host or (os.environ.get("DOCKER_HOST", "") if own else "")
    return SiteFacts(
        name=keys.name,
        carrier=keys.carrier,
        max_jobs=keys.max_jobs or (max(4, 2 * (os.cpu_count() or 2)) if own else None),
        cpus=keys.cpus or None,
        ram_gb=keys.ram_gb or None,
        disk_gb=keys.disk_gb or None,
        zones=frozenset(keys.zones),
        labels={key.lower(): value for key, value in keys.labels.items()},
        preemptible=keys.preemptible,
        draining=keys.draining,
        batch=keys.batch,
        queues=keys.queues,
        file_roots=tuple(FileRoot(root.path, root.write, root.mount) for root in keys.file_roots),
        runtime=Runtime(
            kind=keys.runtime or settings.container.runtime,
            docker_host=docker_host,
            network=settings.container.network,
            hide=[str(settings.server.data_dir.absolute())] if own else [],
            pull=settings.container.pull,
        ),
        log_bytes=settings.container.log_bytes,
        patience=max(keys.status.poll_interval * keys.status.max_polls, 4 * CALM if by_mail else 0.0),
        poll_interval=max(keys.status.poll_interval, CALM if by_mail else 0.0),
        first_look=2.0
        if own
        else 1.0
        if by_mail
        else 0.1,  # ours tell of their jobs by themselves, and so does a broker
        cancel_grace=keys.cancel_grace,
        # Of jobs on our own machine we see every step in their files.
        report_url="" if own or not settings.server.public_url else settings.server.public_url.rstrip("/") + PATH,
    )
