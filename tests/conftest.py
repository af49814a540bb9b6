"""Every test starts from a clean environment (no settings of the developer's leak in), and what scripts/test adds."""

from __future__ import annotations

import os

import pytest

_OURS = ("TESP_REQUIRE_SERVICES", "TESP_SITES_TASKS", "TES_OPENAPI", "TESP_UPDATE_GOLDEN", "TESP_PULSAR_PYTHON")
for _name in [name for name in os.environ if name.startswith(("TESP_", "TES_", "CONTAINER_TYPE", "FASTAPI_PROFILE"))]:
    if _name not in _OURS and not _name.startswith("TESP_CHAOS"):
        del os.environ[_name]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--second-try`: this run repeats failures (scripts/test); what passes now is named loudly."""
    parser.addoption("--second-try", action="store_true", help="name the tests that pass, which failed before")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A test that passes only at the second try is a defect somewhere: it must not go unseen."""
    passed = [report.nodeid for report in terminalreporter.getreports("passed") if report.when == "call"]
    if config.getoption("--second-try") and passed:
        terminalreporter.section("PASSED ONLY AT THE SECOND TRY", sep="!", red=True, bold=True)
        for nodeid in passed:
            terminalreporter.line(f"PASSED ONLY AT THE SECOND TRY: {nodeid}", red=True)
