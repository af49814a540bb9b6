"""What the benchmarks share: a running service, a bare `docker run`, and a line about the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

IMAGE = "busybox:latest"
NOOP = {"executors": [{"image": IMAGE, "command": ["true"]}]}
FINAL = {"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"}


def machine() -> str:
    """One line about where this ran."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    load = os.getloadavg()[0]
    cpu = model.group(1) if model else platform.machine()
    return f"{os.cpu_count()} CPUs ({cpu}), Python {platform.python_version()}, load {load:.1f}"


@contextlib.contextmanager
def service(**variables: str) -> Iterator[httpx.Client]:
    """A service with its embedded Pulsar and a fresh data directory; yields a client for its TES API."""
    with tempfile.TemporaryDirectory(prefix="tesp-bench-") as directory:
        log = Path(directory, "service.log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tesp_api", "serve", "--port", "0", "--data-dir", f"{directory}/data"],
                env={**os.environ, **variables},
                stderr=file,
                stdout=file,
            )
        try:
            yield httpx.Client(base_url=_address(process, log) + "/ga4gh/tes/v1", timeout=60)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        if found := re.search(r"running on (http://\S+)", log.read_text(errors="replace")):
            return found.group(1)
        time.sleep(0.02)
    sys.exit(log.read_text(errors="replace"))


def post(client: httpx.Client, task: dict[str, object] | None = None) -> str:
    """Create a task; its id."""
    answer = client.post("/tasks", json=task or NOOP)
    answer.raise_for_status()
    task_id: str = answer.json()["id"]
    return task_id


def wait(client: httpx.Client, task_id: str, pause: float = 0.005) -> str:
    """The final state of a task."""
    while True:
        state: str = client.get(f"/tasks/{task_id}").json()["state"]
        if state in FINAL:
            return state
        time.sleep(pause)


def demand(client: httpx.Client, task_id: str) -> None:
    """Stop unless the task is COMPLETE: a failed task is quick for the wrong reason."""
    task = client.get(f"/tasks/{task_id}", params={"view": "FULL"}).json()
    if task["state"] != "COMPLETE":
        sys.exit(f"task {task_id} is {task['state']}: {task.get('logs')}")


def docker_run() -> float:
    """Seconds of one bare `docker run` of the no-op."""
    start = time.perf_counter()
    subprocess.run(["docker", "run", "--rm", IMAGE, "true"], check=True)
    return time.perf_counter() - start
