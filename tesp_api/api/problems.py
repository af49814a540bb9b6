"""Errors as answers: one table, one shape, for everything that can go wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tesp_api.api.views import Json
from tesp_api.errors import Detail, InvalidRequest, MailboxFull, StoreUnavailable, TaskNotFound, TespError
from tesp_api.tes import field_name, refusal

logger = logging.getLogger(__name__)


class BodyTooLarge(TespError):
    """The body of a request is larger than the limit."""


STATUS: Final[Mapping[type[Exception], HTTPStatus]] = {
    InvalidRequest: HTTPStatus.BAD_REQUEST,
    ClientDisconnect: HTTPStatus.BAD_REQUEST,  # nobody is there to read it
    TaskNotFound: HTTPStatus.NOT_FOUND,
    BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    MailboxFull: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""The status for each error that may reach the API; any other exception is ours to mend and answers 500."""

RETRY_AFTER: Final = "2"
"""Seconds after which a client may try again when the store was away."""


def problem(
    status: int, message: str, details: Iterable[Detail] = (), headers: Mapping[str, str] | None = None
) -> Json:
    """An error as an answer."""
    listed = [{"field": item.field, "message": item.message} for item in details]
    body = {"status": int(status), "error": _phrase(status), "message": message, "details": listed}
    return Json(body, status_code=status, headers=dict(headers or {}))


def install(app: FastAPI) -> None:
    """Make the app answer every error in this shape.

    Middleware that is added later lies around this, so that for example CORS headers reach the errors too.
    """
    for kind in STATUS:
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_middleware(Unexpected)


class Unexpected:
    """Turns an exception that nobody expected into a 500 that tells nothing, and logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await problem(500, "The server made a mistake; its log says more.")(scope, receive, send)


def _status(error: Exception) -> HTTPStatus | None:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), None)


def _render(status: HTTPStatus, error: Exception) -> Json:
    headers = {"Retry-After": RETRY_AFTER} if status is HTTPStatus.SERVICE_UNAVAILABLE else None
    if isinstance(error, StoreUnavailable):
        return problem(status, "The task store does not answer; please try again.", headers=headers)
    return problem(status, str(error), getattr(error, "details", ()), headers)


def _known(request: Request, error: Exception) -> Response:
    status = _status(error)
    assert status is not None
    if isinstance(error, StoreUnavailable):
        logger.warning("%s %s: the store does not answer: %s", request.method, request.url.path, error)
    return _render(status, error)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == _phrase(error.status_code):  # nobody gave a better one
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path}."
        elif error.status_code == 405:
            message = f"{request.method} is not possible at {request.url.path}."
    return problem(error.status_code, message, headers=error.headers)


def _validation(request: Request, error: Exception) -> Response:
    """What FastAPI found wrong with a request to one of our own pages."""
    assert isinstance(error, RequestValidationError)
    details = [_outside(item) for item in error.errors()]
    return _render(HTTPStatus.BAD_REQUEST, refusal(details) if details else InvalidRequest("The request is wrong."))


def _outside(item: Mapping[str, Any]) -> Detail:
    location = [part for part in item["loc"] if part not in ("body", "query", "path", "header")]
    return Detail(field_name(location), f"is wrong: {item['msg']}")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
