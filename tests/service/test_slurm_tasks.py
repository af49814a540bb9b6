"""Tasks of the whole service at a Slurm: what their clients see in the end."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.carried import Place, write_settings
from tests.running import Service, until
from tests.slurm import Slurm, pulsar_with
from tests.support import require

pytestmark = [pytest.mark.service, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def service(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
    directory = tmp_path_factory.mktemp("service")
    pulsar = pulsar_with(slurm, directory / "pulsar")
    (directory / "shared").mkdir()
    place = Place(
        directory, 0, name="slurm", url=pulsar.url, private_token=pulsar.token, batch=True, client_timeout=60.0
    )
    place.keys["carrier"] = "rest"
    retry = {"backoff": 0.1, "max_attempts": 2}
    write_settings(directory / "settings.toml", [place], container={"runtime": "host"}, retry=retry)
    service = Service(directory)
    try:
        pulsar.start()
        service.start()
        yield service
    finally:
        service.stop()
        pulsar.stop()


def task(script: str, **wishes: str) -> dict[str, Any]:
    executor = {"image": "none", "command": ["sh", "-c", script]}
    return {"executors": [executor], "resources": {"cpu_cores": 1, "ram_gb": 0.125, "backend_parameters": wishes}}


def number(slurm: Slurm, task_id: str, attempt: int, state: str) -> str:
    def look() -> str:
        facts = slurm.job(f"{task_id}-{attempt}")
        return facts.get("JobId", "") if facts.get("JobState") == state else ""

    return str(until(look, 120, f"attempt {attempt} {state}"))


def test_a_job_that_others_cancelled_is_tried_again(slurm: Slurm, service: Service, tmp_path: Path) -> None:
    script = f"echo once >> {tmp_path}/witness; until test -e {tmp_path}/gate; do sleep 0.1; done"
    task_id = service.post(task(script, queue="long", time_limit="00:10:00"))
    first = number(slurm, task_id, 1, "RUNNING")
    until(lambda: service.state(task_id) == "RUNNING", 120)
    slurm.tell("scancel", first)
    number(slurm, task_id, 2, "RUNNING")
    facts = slurm.job(f"{task_id}-2")
    assert (facts["Partition"], facts["TimeLimit"], facts["MinMemoryNode"]) == ("long", "00:10:00", "128M")
    (tmp_path / "gate").touch()
    full = service.end(task_id)
    assert full["state"] == "COMPLETE"
    assert [len(each["logs"]) for each in full["logs"]] == [1, 1], (
        "the executor that was stopped, and the one that ended"
    )
    assert [each["logs"][0]["exit_code"] == 0 for each in full["logs"]] == [False, True]
    assert "told the runner to stop" in full["logs"][0]["system_logs"][-1]


def test_a_partition_that_is_not_there_is_said_once(service: Service) -> None:
    full = service.end(service.post(task("true", queue="nowhere")))
    assert (full["state"], len(full["logs"])) == ("SYSTEM_ERROR", 1)
    assert "Invalid partition" in " ".join(full["logs"][0]["system_logs"])


def test_a_cancelled_task_leaves_the_queue(slurm: Slurm, service: Service, tmp_path: Path) -> None:
    slurm.tell("scontrol", "update", "PartitionName=long", "State=DOWN")
    try:
        task_id = service.post(task(f"touch {tmp_path}/ran", queue="long"))
        number(slurm, task_id, 1, "PENDING")
        service.http.post(f"/ga4gh/tes/v1/tasks/{task_id}:cancel")
        assert service.end(task_id)["state"] == "CANCELED"
        number(slurm, task_id, 1, "CANCELLED")
    finally:
        slurm.tell("scontrol", "update", "PartitionName=long", "State=UP")
    assert not (tmp_path / "ran").exists()
