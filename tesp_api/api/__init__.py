"""The HTTP side: TES 1.1 in front of the store. It starts nothing and waits for nobody but the store."""

from __future__ import annotations

from fastapi import APIRouter

from tesp_api.api import sites
from tesp_api.api.routes import Methods
from tesp_api.api.service_info import ServiceDescription, ServiceInfo
from tesp_api.api.sites import Sites
from tesp_api.api.tasks import Access, Api, Tasks, everyone

PREFIXES = ("/ga4gh/tes/v1", "/v1")
"""Where TES lies: the path of the standard, and the one that older clients know."""


def router(api: Api) -> APIRouter:
    """The five operations of TES under each of `PREFIXES`, with whole paths; documented by `openapi`.

    Routes are tried in their order, so the one that most requests are for comes first.
    """
    tasks = Tasks(api)
    info = ServiceInfo(api.service)
    routes = APIRouter()
    for prefix in PREFIXES:
        for path, methods in (
            ("/tasks", Methods(GET=tasks.list, POST=tasks.create)),
            ("/tasks/service-info", Methods(GET=info.old)),
            ("/tasks/{id}:cancel", Methods(POST=tasks.cancel)),
            ("/tasks/{id}", Methods(GET=tasks.get)),
            ("/service-info", Methods(GET=info.current)),
        ):
            methods.add_to(routes, prefix + path)
    return routes


def extensions(api: Api) -> APIRouter:
    """What is ours and not TES's, with whole paths."""
    routes = APIRouter()
    Methods(GET=Sites(api).list).add_to(routes, sites.PATH)
    return routes


__all__ = ["PREFIXES", "Access", "Api", "ServiceDescription", "everyone", "extensions", "router"]
