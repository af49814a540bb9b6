"""The description of the API; `scripts/compare_openapi.py` holds it against the published one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from tesp_api.api.openapi import EXAMPLES, openapi
from tesp_api.tes import read_task


def described() -> dict[str, Any]:
    app = FastAPI(title="Test", version="1")

    @app.get("/healthz", operation_id="Health")
    async def health() -> str:
        return "ok"

    return openapi(app)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_reference_leads_somewhere() -> None:
    document = described()
    found = set(references(document))
    assert len(found) > 10
    for reference in found:
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_it_is_json_without_nulls() -> None:
    assert "null" not in json.dumps(described())


def test_operations_and_servers() -> None:
    document = described()
    operations = {
        f"{method} {path}": operation["operationId"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method != "servers"
    }
    assert operations == {
        "get /service-info": "GetServiceInfo",
        "get /tasks": "ListTasks",
        "post /tasks": "CreateTask",
        "get /tasks/{id}": "GetTask",
        "post /tasks/{id}:cancel": "CancelTask",
        "get /healthz": "Health",
    }
    assert document["servers"] == [{"url": "/ga4gh/tes/v1"}, {"url": "/v1"}]
    assert document["paths"]["/healthz"]["servers"] == [{"url": "/"}]
    assert "servers" not in document["paths"]["/tasks"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_can_be_posted(name: str) -> None:
    assert read_task(json.dumps(EXAMPLES[name]["value"]).encode()).executors
