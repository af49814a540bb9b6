"""The same promises on every carrier: truthful ends, live tails, quick cancels, nothing lost, nothing run twice."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.carried import PLACES, Carried, Gate, containers
from tests.engine import IMAGE
from tests.running import FINAL, until

pytestmark = [pytest.mark.acceptance, pytest.mark.service, pytest.mark.timeout(400)]

MAX_JOBS = 4

CANCEL_WITHIN = float(os.environ.get("TESP_CANCEL_WITHIN", "90"))
"""Seconds; the promise on a quiet machine is 5. The grace after which jobs are killed is longer than either."""


@pytest.fixture(scope="module", params=PLACES)
def calm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Carried]:
    """A service with one site, which nobody harms."""
    directory = tmp_path_factory.mktemp(request.param)
    with Carried(directory, request.param, max_jobs=MAX_JOBS, cancel_grace=120.0) as running:
        yield running


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"image": IMAGE, "command": ["sh", "-c", script], **more}


def live(shared: Path) -> dict[str, Any]:
    """An input that mounts the shared directory as it is."""
    return {"url": str(shared), "path": "/shared", "type": "DIRECTORY"}


# Truthful ends


def test_complete_with_files_and_streams(calm: Carried) -> None:
    task = {
        "inputs": [{"path": "/in/text", "content": "hello\n"}],
        "outputs": [{"path": "/out/upper", "url": f"{calm.shared}/upper"}],
        "executors": [
            sh("tr a-z A-Z; echo said >&2", stdin="/in/text", stdout="/out/upper"),
            sh("cat /out/upper; exit 4", ignore_error=True),
            sh("cat /out/upper"),
        ],
    }
    full = calm.service.end(calm.service.post(task))
    (log,) = full["logs"]
    assert full["state"] == "COMPLETE", log
    assert [each["exit_code"] for each in log["logs"]] == [0, 4, 0]
    assert [each.get("stdout", "") for each in log["logs"]][1:] == ["HELLO\n", "HELLO\n"]
    assert log["logs"][0]["stderr"] == "said\n"
    assert [(each["path"], each["size_bytes"]) for each in log["outputs"]] == [("/out/upper", "6")]
    assert (calm.shared / "upper").read_text() == "HELLO\n"
    assert not containers(full["id"])
    until(lambda: not list(calm.place.staging.glob(f"{full['id']}*")), 60, "nothing is left of the job")


def test_a_failed_executor_is_an_executor_error_and_the_next_does_not_run(calm: Carried) -> None:
    full = calm.service.end(calm.service.post({"executors": [sh("echo a"), sh("exit 3"), sh("echo c")]}))
    (log,) = full["logs"]
    assert full["state"] == "EXECUTOR_ERROR"
    assert [each["exit_code"] for each in log["logs"]] == [0, 3]


def test_a_missing_image_is_a_system_error_that_names_it(calm: Carried) -> None:
    task = {"executors": [{"image": "127.0.0.1:1/nobody/nothing:1", "command": ["true"]}]}
    full = calm.service.end(calm.service.post(task))
    assert full["state"] == "SYSTEM_ERROR"
    assert "127.0.0.1:1/nobody/nothing:1" in " ".join(full["logs"][-1]["system_logs"])


def test_a_missing_input_is_a_system_error_that_names_it(calm: Carried) -> None:
    task = {"inputs": [{"url": f"{calm.shared}/not-there", "path": "/in"}], "executors": [sh("true")]}
    full = calm.service.end(calm.service.post(task))
    assert full["state"] == "SYSTEM_ERROR"
    assert "not-there" in " ".join(full["logs"][-1]["system_logs"])


# While it runs


def test_the_tail_of_a_running_task_can_be_read(calm: Carried) -> None:
    script = "echo first line; until [ -e /shared/go-on ]; do sleep 0.1; done; echo last line"
    (calm.shared / "go-on").unlink(missing_ok=True)
    task_id = calm.service.post({"inputs": [live(calm.shared)], "executors": [sh(script)]})
    until(lambda: "first line" in _tail(calm, task_id), 60, "the first line")
    assert calm.service.state(task_id) == "RUNNING"
    (calm.shared / "go-on").touch()
    full = calm.service.end(task_id)
    assert full["logs"][-1]["logs"][0]["stdout"] == "first line\nlast line\n"


def _tail(calm: Carried, task_id: str) -> str:
    logs = calm.service.get(task_id).get("logs", [])
    return str(logs[-1].get("metadata", {}).get("stdout_tail", "")) if logs else ""


# Cancel


def test_cancel_of_a_queued_task(calm: Carried) -> None:
    """It waits for room, so nobody runs it: it is over at once."""
    running = [calm.service.post({"executors": [sh("sleep 600")]}) for _ in range(MAX_JOBS)]
    for each in running:
        until(lambda each=each: calm.service.state(each) == "RUNNING", 60, "a full site")
    queued = calm.service.post({"executors": [sh("sleep 600")]})
    assert calm.service.state(queued) == "QUEUED"
    calm.service.cancel(queued)
    assert calm.service.state(queued) == "CANCELED"
    for each in running:
        _canceled(calm, each)


def test_cancel_while_inputs_are_staged(calm: Carried) -> None:
    with Gate() as gate:
        task = {"inputs": [{"url": gate.url, "path": "/in"}], "executors": [sh("true")]}
        task_id = calm.service.post(task)
        assert gate.came.wait(60)
        _canceled(calm, task_id)


def test_cancel_of_a_running_executor_that_ignores_sigterm(calm: Carried) -> None:
    task_id = calm.service.post({"executors": [sh("trap '' TERM; while true; do sleep 1; done")]})
    until(lambda: calm.service.state(task_id) == "RUNNING", 60, "it runs")
    _canceled(calm, task_id)


def test_cancel_while_outputs_are_uploaded(calm: Carried) -> None:
    with Gate() as gate:
        task = {"outputs": [{"url": gate.url, "path": "/out/file"}], "executors": [sh("echo x > /out/file")]}
        task_id = calm.service.post(task)
        assert gate.came.wait(60)
        _canceled(calm, task_id)


def _canceled(calm: Carried, task_id: str) -> None:
    """Cancel it; when it is CANCELED its containers are gone."""
    began = time.monotonic()
    calm.service.cancel(task_id)
    until(lambda: calm.service.state(task_id) in FINAL, CANCEL_WITHIN, f"the end of the canceled {task_id}")
    print(f"{calm.place.carrier}: canceled within {time.monotonic() - began:.1f} s")
    assert calm.service.state(task_id) == "CANCELED"
    assert not containers(task_id)


# Kills


@pytest.mark.parametrize("carrier", PLACES)
def test_20_tasks_survive_kills_of_everything_and_none_runs_twice(carrier: str, tmp_path: Path) -> None:
    with Carried(tmp_path / "c", carrier, max_jobs=MAX_JOBS, status={"poll_interval": 1.0}) as running:
        service, ran = running.service, running.shared / "ran"
        ids = [
            service.post(
                {"inputs": [live(running.shared)], "executors": [sh(f"echo {name} >> /shared/ran; sleep 0.5")]}
            )
            for name in range(20)
        ]
        for at, what in zip((2, 6, 10, 14), _kills(running), strict=False):
            until(lambda at=at: _done(running) >= at, 120, f"{at} ends")
            what()
        until(lambda: _done(running) == len(ids), 240, "all ends")
        ends = Counter(service.states().values())
        assert ends == {"COMPLETE": 20}, [service.get(each) for each in ids if service.state(each) != "COMPLETE"]
        assert Counter(ran.read_text().split()) == {str(name): 1 for name in range(20)}
        until(lambda: not any(map(containers, ids)), 120, "no container of ours")


def _kills(running: Carried) -> list[Callable[[], object]]:
    """kill -9 of the service, of all that stands behind the site, and of the service again."""

    def service() -> None:
        running.service.kill()
        running.service.start()

    return [service, *running.place.kills(), service]


def _done(running: Carried) -> int:
    return sum(state in FINAL for state in running.service.states().values())
