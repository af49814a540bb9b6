"""Web pages of others must not post tasks with the reader's reach: a browser names the page's origin, and we look."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tesp_api.api.problems import problem

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class ForeignPages:
    """Refuses changes that come from a web page of another origin than ours and those in `allowed`.

    CORS alone does not do that: a browser sends a simple POST without asking, and only hides the answer. Clients that
    are no browsers send no Origin.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE and self._is_foreign(scope):
            answer = problem(403, "A page of this origin may not do that; server.cors_origins lists those that may.")
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_foreign(self, scope: Scope) -> bool:
        if not any(name == b"origin" for name, _ in scope["headers"]):
            return False  # at once, as for nearly every request
        headers = Headers(scope=scope)
        origin = headers["origin"]
        if origin in self._allowed or "*" in self._allowed:
            return False
        try:
            return not (urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != "")
        except ValueError:
            return True
