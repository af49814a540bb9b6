"""What the server says of itself, in the form of TES 1.1 and in the old one of TES 1.0."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from tesp_api.api.views import Document, Json
from tesp_api.tes import Organization, TesServiceInfo, TesServiceType

TES_VERSION = "1.1.0"
"""The version of the standard, not of this server."""


@dataclass(frozen=True, kw_only=True)
class ServiceDescription:
    """What the operator wants to be known. Empty texts are left out; times are RFC 3339."""

    id: str
    name: str
    organization_name: str
    organization_url: str
    version: str
    description: str = ""
    contact_url: str = ""
    documentation_url: str = ""
    environment: str = ""
    storage: tuple[str, ...] = ()
    backend_parameters: tuple[str, ...] = ()
    created_at: str = ""
    updated_at: str = ""


class ServiceInfo:
    """The two pages. They are the same for everybody, so no access is checked."""

    def __init__(self, service: ServiceDescription) -> None:
        self._current = document(service)
        self._old = old_document(service)

    async def current(self, request: Request) -> Response:
        """`GET /service-info`."""
        return Json(self._current)

    async def old(self, request: Request) -> Response:
        """`GET /tasks/service-info`, where TES 1.0 had it; clients of that time know these three keys only."""
        return Json(self._old)


def document(service: ServiceDescription) -> Document:
    """The service info of TES 1.1."""
    return TesServiceInfo(
        id=service.id,
        name=service.name,
        type=TesServiceType(group="org.ga4gh", artifact="tes", version=TES_VERSION),
        description=service.description or None,
        organization=Organization(name=service.organization_name, url=service.organization_url),
        contact_url=service.contact_url or None,
        documentation_url=service.documentation_url or None,
        created_at=service.created_at or None,
        updated_at=service.updated_at or None,
        environment=service.environment or None,
        version=service.version,
        storage=list(service.storage),
        backend_parameters=list(service.backend_parameters),
    ).model_dump(mode="json", by_alias=True, exclude_none=True)


def old_document(service: ServiceDescription) -> Document:
    """The service info of TES 1.0."""
    return {"name": service.name, "doc": service.description, "storage": list(service.storage)}
