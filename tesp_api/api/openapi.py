"""The description of the API: an OpenAPI document with the operations of TES under the standard's own names, and the
page that shows it.

The schemas come from the models; the operations are written down here, because the handlers read requests themselves.
`scripts/compare_openapi.py` holds the result against the published document.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from tesp_api import tes
from tesp_api.api import sites
from tesp_api.api.tasks import MAX_PAGE_SIZE, PAGE_SIZE
from tesp_api.api.views import Document

TAG: Final = "TaskService"

MODELS: Final = (
    tes.TesCancelTaskResponse,
    tes.TesCreateTaskResponse,
    tes.TesListTasksResponse,
    tes.TesServiceInfo,
    tes.Service,
)

EXAMPLES: Final = {
    "hello": {
        "summary": "Say hello",
        "value": {"name": "hello", "executors": [{"image": "busybox", "command": ["echo", "Hello, world"]}]},
    },
    "stdin": {
        "summary": "Read a given text, and keep what is printed in a volume for a second container",
        "value": {
            "name": "count words",
            "inputs": [{"path": "/in/text.txt", "content": "one two three\n"}],
            "volumes": ["/work"],
            "executors": [
                {"image": "busybox", "command": ["wc", "-w"], "stdin": "/in/text.txt", "stdout": "/work/words"},
                {"image": "busybox", "command": ["cat", "/work/words"]},
            ],
            "resources": {"cpu_cores": 1, "ram_gb": 0.5},
            "tags": {"project": "examples"},
        },
    },
}

PROBLEM: Final = {
    "type": "object",
    "description": "Why a request was not carried out.",
    "required": ["status", "error", "message", "details"],
    "properties": {
        "status": {"type": "integer", "description": "The HTTP status.", "examples": [400]},
        "error": {"type": "string", "description": "The status in words.", "examples": ["Bad Request"]},
        "message": {
            "type": "string",
            "description": "One sentence for a reader.",
            "examples": ["executors[0].image must not be empty."],
        },
        "details": {
            "type": "array",
            "description": "Every field at fault.",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {
                    "field": {
                        "type": "string",
                        "description": "Where in the request.",
                        "examples": ["executors[0].image"],
                    },
                    "message": {
                        "type": "string",
                        "description": "What is wrong there.",
                        "examples": ["must not be empty"],
                    },
                },
            },
        },
    },
}


# --- the document --------------------------------------------------------------------------------------------------


def openapi(app: FastAPI) -> Document:
    """The whole document for an app that serves the TES router: assign `lambda: openapi(app)` to `app.openapi`.

    Other routes of the app keep their own description and lie at the root of the server.
    """
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    for path in document["paths"].values():
        path["servers"] = [{"url": "/"}]
    document["servers"] = [{"url": "/ga4gh/tes/v1"}, {"url": "/v1"}]
    document["paths"] = {**_paths(), **document["paths"]}
    ours = any(getattr(route, "path", None) == sites.PATH for route in app.routes)
    if ours:
        document["paths"][sites.PATH] = {"get": sites.OPERATION, "servers": [{"url": "/"}]}
    components = document.setdefault("components", {})
    components["schemas"] = {**_schemas(), **components.get("schemas", {})}
    if ours:
        components["schemas"]["site"] = sites.SCHEMA
    components["parameters"] = {**components.get("parameters", {}), "view": _VIEW}
    app.openapi_schema = document
    return document


def _paths() -> Document:
    return {
        "/service-info": {
            "get": _operation("GetServiceInfo", "What this server is and offers.", "tesServiceInfo", errors=()),
        },
        "/tasks": {
            "get": _operation(
                "ListTasks",
                "Tasks that the sender may see, newest first, page by page. All filters must match.",
                "tesListTasksResponse",
                parameters=_LIST,
                errors=(400,),
            ),
            "post": {
                **_operation(
                    "CreateTask",
                    "Hand in a task. The answer means that it is stored and will be carried out. With the header "
                    "`Idempotency-Key` (1 to 255 printable ASCII characters, new for each task) this can be repeated: "
                    "the same key with the same body is answered with the same id.",
                    "tesCreateTaskResponse",
                    errors=(400, 413),
                ),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _ref("tesTask"), "examples": EXAMPLES}},
                },
            },
        },
        "/tasks/{id}": {
            "get": _operation(
                "GetTask", "One task.", "tesTask", parameters=[_ID, _ref("view", "parameters")], errors=(400, 404)
            ),
        },
        "/tasks/{id}:cancel": {
            "post": _operation(
                "CancelTask",
                "Ask for a task to be stopped. A task that has ended already stays as it is, and that is no error.",
                "tesCancelTaskResponse",
                parameters=[_ID],
                errors=(404,),
            ),
        },
    }


def _operation(
    name: str, description: str, answer: str, *, errors: tuple[int, ...], parameters: list[Document] | None = None
) -> Document:
    responses: Document = {"200": {"description": "Done.", "content": {"application/json": {"schema": _ref(answer)}}}}
    for status in (*errors, 500, 503):
        responses[str(status)] = {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": _ref("problem")}},
        }
    operation = {
        "tags": [TAG],
        "summary": name,
        "description": description,
        "operationId": name,
        "responses": responses,
    }
    return operation if parameters is None else {**operation, "parameters": parameters}


def _ref(name: str, kind: str = "schemas") -> Document:
    return {"$ref": f"#/components/{kind}/{name}"}


def _query(name: str, description: str, schema: Document, **more: Any) -> Document:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema, **more}


_ERRORS: Final = {
    400: "The request is wrong; the answer names the field.",
    404: "There is no such task, or it belongs to somebody else.",
    413: "The request is too large.",
    500: "The server made a mistake.",
    503: "The task store does not answer; try again after `Retry-After` seconds.",
}
_ID: Final = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The task's id, as the answer to its creation gave it.",
    "schema": {"type": "string"},
}
_VIEW: Final = _query(
    "view",
    "How much to show. `MINIMAL`: `id` and `state` only. `BASIC`: everything but `stdout` and `stderr` of the executor "
    "logs, `content` of inputs and `system_logs`. `FULL`: everything. Upper and lower case are the same.",
    {"type": "string", "enum": [str(view) for view in tes.TesView], "default": "MINIMAL"},
)
_STRINGS: Final = {"type": "array", "items": {"type": "string"}}
_LIST: Final = [
    _query("name_prefix", "Only tasks whose name starts with this text.", {"type": "string"}),
    _query("state", "Only tasks in this state. Upper and lower case are the same.", _ref("tesState")),
    _query(
        "tag_key",
        "Only tasks with this tag. May be given several times; the n-th `tag_value` belongs to the n-th `tag_key`. "
        "All must match, and a task may have other tags as well.",
        _STRINGS,
        example=["project"],
    ),
    _query(
        "tag_value", "The value of the tag. Empty or left out: any value will do, if the task has the tag.", _STRINGS
    ),
    _query(
        "page_size",
        f"How many tasks to show at most, from 1 to {MAX_PAGE_SIZE}; {PAGE_SIZE} when left out.",
        {"type": "integer", "format": "int32", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": PAGE_SIZE},
    ),
    _query(
        "page_token",
        "The `next_page_token` of the page before. The filters must be the same as there.",
        {"type": "string"},
    ),
    _ref("view", "parameters"),
]


def _schemas() -> Document:
    _, document = models_json_schema(
        [(model, "validation") for model in MODELS], ref_template="#/components/schemas/{model}"
    )
    schemas = {_spec_name(name): _tidy(schema) for name, schema in document["$defs"].items()}
    schemas["tesState"].update({"readOnly": True, "default": "UNKNOWN", "examples": ["COMPLETE"]})
    schemas["tesFileType"]["default"] = "FILE"
    schemas["problem"] = PROBLEM
    return dict(sorted(schemas.items()))


def _spec_name(name: str) -> str:
    """`TesTask` is `tesTask` in the published document."""
    return f"t{name[1:]}" if name.startswith("Tes") else name


def _tidy(schema: Any) -> Any:
    """Without titles, with the standard's names, and without nulls: they are tolerated but nothing to be promised."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "default" and (value is None or "$ref" in schema):  # what a reference names has its own default
            continue
        if key == "$ref":
            tidy[key] = "#/components/schemas/" + _spec_name(value.rpartition("/")[2])
        elif key in ("examples", "default", "enum"):
            tidy[key] = value
        elif key == "anyOf":
            kinds = [item for item in value if item != {"type": "null"}]
            tidy.update(_tidy(kinds[0]) if len(kinds) == 1 else {"anyOf": _tidy(kinds)})
        else:
            tidy[key] = _tidy(value)
    return tidy


# --- the page ------------------------------------------------------------------------------------------------------


def add_docs(app: FastAPI) -> None:
    """Show the API at `/docs`, and send `/` there. Give the app `docs_url=None, redoc_url=None` before.

    The page's own files come from the package fastapi-offline, so that it works without the internet; without that
    package they come from a public server.
    """
    files: dict[str, Any] = {}
    if (static := _static_files()) is not None:
        app.mount("/docs/static", StaticFiles(directory=static), name="docs-static")
        files = {
            "swagger_js_url": "/docs/static/swagger-ui-bundle.js",
            "swagger_css_url": "/docs/static/swagger-ui.css",
            "swagger_favicon_url": "/docs/static/favicon.png",
        }
    page = get_swagger_ui_html(
        openapi_url=app.openapi_url or "/openapi.json",
        title=app.title,
        swagger_ui_parameters={"docExpansion": "list", "displayRequestDuration": True},
        **files,
    )

    async def docs(request: Request) -> Response:
        return page

    async def root(request: Request) -> Response:
        return RedirectResponse("/docs")

    app.add_route("/docs", docs, include_in_schema=False)
    app.add_route("/", root, include_in_schema=False)


def _static_files() -> Path | None:
    """Where fastapi-offline keeps its files, if it is installed; the package itself is not used."""
    found = importlib.util.find_spec("fastapi_offline")
    if found is None or found.origin is None:
        return None
    static = Path(found.origin).parent / "static"
    return static if (static / "swagger-ui-bundle.js").is_file() else None
