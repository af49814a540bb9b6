"""Nothing lost, nothing run twice: the service is killed with -9 again and again while tasks run."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine import IMAGE, docker_host
from tests.running import FINAL, Service, roots, until
from tests.support import require

pytestmark = [pytest.mark.acceptance, pytest.mark.service, pytest.mark.timeout(600)]


def _task(index: int, shared: Path) -> dict[str, object]:
    line = f"echo task-{index} >> /shared/ran"
    return {
        "name": f"task-{index}",
        "inputs": [{"url": str(shared), "path": "/shared", "type": "DIRECTORY"}],
        "executors": [{"image": IMAGE, "command": ["sh", "-c", line]}],
    }


@pytest.mark.parametrize("seed", [1])
def test_200_tasks_survive_kills_and_none_runs_twice(tmp_path: Path, seed: int) -> None:
    require(bool(docker_host()), "no Docker engine with busybox")
    chance = random.Random(seed)
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    service = Service(tmp_path, TESP_EMBEDDED__FILE_ROOTS=roots(shared, mount=True), CONTAINER_TYPE="docker")
    service.start()
    try:
        with ThreadPoolExecutor(20) as pool:
            ids = list(pool.map(lambda index: service.post(_task(index, shared)), range(200)))
        for kill_at in sorted(chance.sample(range(5, 180), 4)):
            until(lambda at=kill_at: _done(service) >= at, 300, f"{kill_at} tasks done")
            service.kill()
            service.start()
        until(lambda: _done(service) == 200, 400, "200 final states")
        assert Counter(service.states().values()) == {"COMPLETE": 200}
        assert set(service.states()) == set(ids)
        assert Counter((shared / "ran").read_text().split()) == {f"task-{index}": 1 for index in range(200)}
        until(lambda: not _ours(ids), 10, "no container of ours")
    finally:
        service.stop()


def test_30_cancels_at_random_moments_leave_no_container(tmp_path: Path) -> None:
    require(bool(docker_host()), "no Docker engine with busybox")
    chance = random.Random(7)
    task = {"executors": [{"image": IMAGE, "command": ["sleep", "300"]}]}
    service = Service(tmp_path, CONTAINER_TYPE="docker", TESP_EMBEDDED__MAX_JOBS="6")
    service.start()
    try:
        ids = []
        for _ in range(30):
            task_id = service.post(task)
            ids.append(task_id)
            # A moment is a stage of the task's life, not a time: any state that it has to pass through.
            moment = chance.choice(["", "INITIALIZING", "RUNNING"])
            if moment == "RUNNING":
                until(lambda task_id=task_id: service.state(task_id) == "RUNNING", 30)
            elif moment:
                until(lambda task_id=task_id: service.state(task_id) in ("INITIALIZING", "RUNNING"), 30)
            service.cancel(task_id)
        until(lambda: set(service.states().values()) <= FINAL, 60, "all final")
        assert Counter(service.states().values()) == {"CANCELED": 30}
        until(lambda: not _ours(ids), 5, "no container of ours")
    finally:
        service.stop()


def _done(service: Service) -> int:
    return sum(state in FINAL for state in service.states().values())


def _ours(ids: list[str]) -> list[str]:
    command = ["docker", "ps", "-a", "--filter", "label=tesp.task", "--format", '{{.Label "tesp.task"}}']
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [task_id for task_id in listed if task_id in ids]
