"""What all tests share."""

from __future__ import annotations

import os

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the test unless the condition holds; with TESP_REQUIRE_SERVICES=1, as in CI, that is a failure."""
    if condition:
        return
    if os.environ.get("TESP_REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
