"""The HTTP side: TES 1.1 in front of the store. It starts nothing and waits for nobody but the store."""

from __future__ import annotations

from fastapi import APIRouter

from tesp_api.api import sites
from tesp_api.api.routes import Methods
from tesp_api.api.service_info import ServiceDescription, ServiceInfo
from tesp_api.api.sites import Sites
from tesp_api.api.tasks import Access, Api, Tasks, everyone

PREFIXES = ("/ga4gh/tes/v1", "/v1")
"""Where the router belongs: the path of the standard, and the one that older clients know."""


def router(api: Api) -> APIRouter:
    """The five operations of TES, to be included under each of `PREFIXES`; documented by `openapi`."""
    tasks = Tasks(api)
    info = ServiceInfo(api.service)
    routes = APIRouter()
    for path, methods in (
        ("/service-info", Methods(GET=info.current)),
        ("/tasks/service-info", Methods(GET=info.old)),
        ("/tasks", Methods(GET=tasks.list, POST=tasks.create)),
        ("/tasks/{id}:cancel", Methods(POST=tasks.cancel)),
        ("/tasks/{id}", Methods(GET=tasks.get)),
    ):
        methods.add_to(routes, path)
    return routes


def extensions(api: Api) -> APIRouter:
    """What is ours and not TES's, with whole paths."""
    routes = APIRouter()
    Methods(GET=Sites(api).list).add_to(routes, sites.PATH)
    return routes


__all__ = ["PREFIXES", "Access", "Api", "ServiceDescription", "everyone", "extensions", "router"]
