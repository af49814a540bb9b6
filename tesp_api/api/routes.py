"""One path with its methods.

Bodies and answers of TES go through our own code, because FastAPI's would cost more than the rest of a request. So a
path is a plain ASGI application, and `openapi` documents it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]


class Methods:
    """Calls the handler for the request's method; HEAD is GET, OPTIONS says what there is."""

    def __init__(self, **handlers: Handler) -> None:
        self._handlers = dict(handlers)
        if "GET" in handlers:
            self._handlers["HEAD"] = handlers["GET"]
        self._allow = {"Allow": ", ".join(sorted({*self._handlers, "OPTIONS"}))}

    def add_to(self, router: APIRouter, path: str) -> None:
        """Serve `path` of the router."""
        router.routes.append(Route(path, endpoint=self, include_in_schema=False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        handler = self._handlers.get(method)
        if handler is not None:
            response = await handler(Request(scope, receive, send))
        elif method == "OPTIONS":
            response = Response(status_code=204, headers=self._allow)
        else:
            raise HTTPException(405, headers=self._allow)
        await response(scope, receive, send)
