"""Reports of jobs at a real Pulsar to a real service process: with them, nobody has to look at the jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pulsars import PulsarServer, free_port
from tests.running import Service, until


@pytest.fixture
def pulsar(tmp_path: Path) -> Iterator[PulsarServer]:
    server = PulsarServer(tmp_path / "pulsar")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def service(tmp_path: Path, pulsar: PulsarServer, port: int) -> Iterator[Service]:
    """It looks at a job every ten minutes at most, and much more rarely at one that reports."""
    running = Service(
        tmp_path / "service",
        CONTAINER_TYPE="host",
        TESP_LOGGING__LEVEL="DEBUG",
        TESP_PULSAR__URL=pulsar.url,
        TESP_PULSAR__PRIVATE_TOKEN=pulsar.token,
        TESP_PULSAR__STATUS__POLL_INTERVAL="600",
        TESP_SERVER__PUBLIC_URL=f"http://127.0.0.1:{port}/",
    )
    running.start("--port", str(port))
    yield running
    running.stop()


def sh(script: str) -> dict[str, Any]:
    return {"executors": [{"image": "none", "command": ["sh", "-c", script]}]}


def tail(service: Service, task_id: str) -> str | None:
    (log,) = service.get(task_id).get("logs", [{}])
    text: str | None = log.get("metadata", {}).get("stdout_tail")
    return text


def test_output_state_and_end_without_a_look(service: Service, pulsar: PulsarServer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    task_id = service.post(sh(f"echo begun; while [ ! -e {go} ]; do sleep 0.05; done; echo done"))
    until(lambda: tail(service, task_id) == "begun\n")
    assert service.state(task_id) == "RUNNING"
    looks = pulsar.log().count(f"/jobs/{task_id}-1/status")
    go.touch()
    task = service.end(task_id)
    assert (task["state"], task["logs"][0]["logs"][0]["stdout"]) == ("COMPLETE", "begun\ndone\n")
    assert pulsar.log().count(f"/jobs/{task_id}-1/status") - looks <= 6, "those of the clean-up"


def test_a_cancel_by_report_while_pulsar_is_away(service: Service, pulsar: PulsarServer) -> None:
    task_id = service.post(sh("echo begun; sleep 1000"))
    until(lambda: tail(service, task_id) == "begun\n")
    pulsar.kill()  # its job lives on
    service.cancel(task_id)
    assert service.end(task_id)["state"] == "CANCELED"


def test_a_service_that_is_killed_and_comes_back_is_told_the_rest(service: Service, port: int, tmp_path: Path) -> None:
    go = tmp_path / "go"
    task_id = service.post(sh(f"echo begun; while [ ! -e {go} ]; do sleep 0.05; done; echo done"))
    until(lambda: tail(service, task_id) == "begun\n")
    service.kill()
    service.start("--port", str(port))
    assert service.state(task_id) == "RUNNING"
    go.touch()
    task = service.end(task_id, 120)
    assert (task["state"], len(task["logs"])) == ("COMPLETE", 1)
    assert task["logs"][0]["logs"][0]["stdout"] == "begun\ndone\n"


def test_a_service_stops_at_once_however_many_jobs_keep_a_question_open(service: Service, port: int) -> None:
    """Its graceful end would else wait for them, and then cut them off with a word in its log."""
    task_id = service.post(sh("echo begun; sleep 1000"))
    until(lambda: tail(service, task_id) == "begun\n")
    until(lambda: f"{task_id}-1 keeps a question open" in service.log.read_text())
    service.stop()
    assert "graceful shutdown exceeded" not in service.log.read_text()
    service.start("--port", str(port))
    service.cancel(task_id)
    assert service.end(task_id)["state"] == "CANCELED"
