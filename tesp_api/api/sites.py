"""`GET /tesp/v1/sites`: where tasks run and how that is. Ours, not TES's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from tesp_api.api.tasks import Api
from tesp_api.api.views import Document, Json
from tesp_api.sites import SiteFacts
from tesp_api.store import Load

PATH: Final = "/tesp/v1/sites"

STALE: Final = 90.0
"""Seconds after which a report says nothing of how a site is now: those who dispatch repeat theirs more often."""

UNKNOWN: Final = "unknown"


class Sites:
    """The page. Loads are counted from the tasks; health is what a dispatching process reported last."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def list(self, request: Request) -> Response:
        """`GET /tesp/v1/sites`."""
        await self._api.access(request)
        loads, reports = await self._api.store.loads(), await self._api.store.reports()
        now = self._api.clock()
        sites = [
            _site(facts, loads.get(facts.name, Load()), _report(reports.get(facts.name), now))
            for facts in self._api.sites
        ]
        return Json({"sites": sites})


def _report(found: tuple[float, str] | None, now: float) -> Mapping[str, Any]:
    if found is None:
        return {}
    at, text = found
    try:
        report = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(report, dict):
        return {}
    return report if now - at < STALE else {**report, "health": UNKNOWN}


def _site(facts: SiteFacts, load: Load, report: Mapping[str, Any]) -> Document:
    capacity = {"max_jobs": facts.max_jobs, "cpus": facts.cpus, "ram_gb": facts.ram_gb, "disk_gb": facts.disk_gb}
    document: Document = {
        "name": facts.name,
        "carrier": facts.carrier,
        "health": report.get("health", UNKNOWN),
        "capacity": {name: value for name, value in capacity.items() if value is not None},
        "load": {"jobs": load.jobs, "cpus": load.cpus, "ram_gb": load.ram_gb},
        "zones": sorted(facts.zones),
        "labels": dict(facts.labels),
        "preemptible": facts.preemptible,
        "draining": facts.draining,
        "batch": facts.batch,
        "queues": list(facts.queues),
    }
    return document | {name: report[name] for name in ("version", "last_error") if report.get(name)}


_AMOUNT: Final = {"type": "number"}
OPERATION: Final[Document] = {
    "tags": ["Extensions"],
    "summary": "ListSites",
    "description": "The sites that run tasks. Not part of TES.",
    "operationId": "ListSites",
    "responses": {
        "200": {
            "description": "Done.",
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["sites"],
                        "properties": {
                            "sites": {
                                "type": "array",
                                "items": {"$ref": "#/components/schemas/site"},
                            }
                        },
                    }
                }
            },
        },
        "503": {
            "description": "The task store does not answer; try again after `Retry-After` seconds.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/problem"}}},
        },
    },
}
SCHEMA: Final[Document] = {
    "type": "object",
    "required": ["name", "carrier", "health", "capacity", "load"],
    "properties": {
        "name": {"type": "string"},
        "carrier": {"type": "string", "description": "How it is reached.", "examples": ["rest"]},
        "health": {"type": "string", "enum": ["up", "down", "probing", UNKNOWN]},
        "version": {"type": "string", "description": "Of the Pulsar there, if it tells."},
        "capacity": {
            "type": "object",
            "description": "What our tasks may have together, `disk_gb` each of them; no limit where a key is missing.",
            "properties": {
                "max_jobs": {"type": "integer"},
                "cpus": _AMOUNT,
                "ram_gb": _AMOUNT,
                "disk_gb": _AMOUNT,
            },
        },
        "load": {
            "type": "object",
            "description": "What the tasks there ask for together.",
            "properties": {"jobs": {"type": "integer"}, "cpus": _AMOUNT, "ram_gb": _AMOUNT},
        },
        "last_error": {
            "type": "object",
            "description": "What went wrong last between the service and the site.",
            "properties": {"message": {"type": "string"}, "time": {"type": "string"}},
        },
        "zones": {"type": "array", "items": {"type": "string"}},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "preemptible": {"type": "boolean"},
        "draining": {"type": "boolean", "description": "Whether it gets no more jobs, by an operator's wish."},
        "batch": {"type": "boolean", "description": "Whether it honours a time limit and a queue."},
        "queues": {"type": "array", "items": {"type": "string"}},
    },
}
