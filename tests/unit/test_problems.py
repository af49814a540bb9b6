"""Errors as answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from starlette.responses import StreamingResponse

from tesp_api import errors
from tesp_api.api import problems
from tesp_api.errors import Detail, InvalidRequest, StoreUnavailable, TaskNotFound
from tests.builders import client_of, run


def app_that_raises(error: BaseException) -> FastAPI:
    app = FastAPI()
    problems.install(app)

    @app.get("/raise")
    async def fail(number: int = 0) -> None:
        raise error

    return app


def ask(app: FastAPI, method: str, path: str) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client_of(app, "http://tes") as client:
            return await client.request(method, path)

    return run(go())


def body(status: int, error: str, message: str, details: Any = ()) -> dict[str, Any]:
    return {"status": status, "error": error, "message": message, "details": list(details)}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            InvalidRequest("a must be b.", [Detail("a", "must be b")]),
            body(400, "Bad Request", "a must be b.", [{"field": "a", "message": "must be b"}]),
        ),
        (TaskNotFound("x"), body(404, "Not Found", "There is no task 'x'.")),
        (HTTPException(404, "Gone fishing."), body(404, "Not Found", "Gone fishing.")),
        (HTTPException(418), body(418, "I'm a Teapot", "I'm a Teapot")),
        (HTTPException(401, "No.", {"WWW-Authenticate": "Basic"}), body(401, "Unauthorized", "No.")),
    ],
)
def test_known(error: Exception, expected: dict[str, Any]) -> None:
    answer = ask(app_that_raises(error), "GET", "/raise")
    assert (answer.status_code, answer.json()) == (expected["status"], expected)
    if expected["status"] == 401:
        assert answer.headers["www-authenticate"] == "Basic"


def test_too_large() -> None:
    answer = ask(app_that_raises(problems.BodyTooLarge("The body must not be larger than 5 bytes.")), "GET", "/raise")
    assert answer.status_code == answer.json()["status"] == 413


def test_store_away(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(app_that_raises(StoreUnavailable("mongodb://user:secret@h is away")), "GET", "/raise")
    assert answer.status_code == answer.json()["status"] == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "secret" not in answer.text
    assert "is away" in caplog.text


def test_unexpected(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = ask(app_that_raises(KeyError("secret")), "GET", "/raise")
    assert answer.json() == body(500, "Internal Server Error", "The server made a mistake; its log says more.")
    assert answer.status_code == 500
    assert "KeyError: 'secret'" in caplog.text


def test_unexpected_in_the_middle_of_an_answer() -> None:
    app = FastAPI()
    problems.install(app)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        raise KeyError("two")

    @app.get("/raise")
    async def fail() -> StreamingResponse:
        return StreamingResponse(pieces())

    with pytest.raises((KeyError, ExceptionGroup)):
        ask(app, "GET", "/raise")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nowhere", 404, "There is nothing at /nowhere."),
        ("POST", "/raise", 405, "POST is not possible at /raise."),
        ("GET", "/raise?number=x", 400, "number is wrong: "),
    ],
)
def test_before_any_handler(method: str, path: str, status: int, message: str) -> None:
    answer = ask(app_that_raises(AssertionError()), method, path)
    assert answer.status_code == answer.json()["status"] == status
    assert answer.json()["message"].startswith(message)
    assert answer.json().keys() == {"status", "error", "message", "details"}


def test_every_error_that_reaches_the_api_has_a_status() -> None:
    """The others belong to the start, the dispatcher, the planner or the sites, and end in a task's logs."""
    elsewhere = {
        *("TespError", "SettingsError", "PlanError", "RightLost", "MailboxFull"),
        *("SiteError", "SiteUnavailable", "SiteRefused", "SiteClosed"),
    }
    named = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TespError) and name not in elsewhere
    }
    assert named - {"StoreUnusable"} <= {kind.__name__ for kind in problems.STATUS}
    assert issubclass(errors.StoreUnusable, errors.StoreUnavailable), "so it has the status of that"
