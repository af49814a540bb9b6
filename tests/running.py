"""The real service as a process, for tests that kill it, and a client for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

SERVE = [sys.executable, "-m", "tesp_api", "serve"]
FINAL = {"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"}


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """What `condition` returns as soon as it is true; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


class Service:
    """`tesp serve` with a data directory that outlives its processes, on `port` (0: a free one at each start)."""

    def __init__(self, directory: Path, *, port: int = 0, **variables: str) -> None:
        self.directory, self._port = directory, port
        self.log = directory / "service.log"
        self._variables = variables
        self._process: subprocess.Popen[bytes] | None = None
        self._http: httpx.Client | None = None

    def start(self, *options: str) -> None:
        """Start a process and wait until it answers; `options` are those of `tesp serve`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        seen = self.log.stat().st_size if self.log.exists() else 0
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TESP_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*SERVE, "--port", str(self._port), "--data-dir", str(self.directory / "data"), *options],
                env={**environment, "PYTHONPATH": str(Path(__file__).parent.parent), **self._variables},
                cwd=self.directory,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        url = until(lambda: self._address(seen), 30, "the service's address")
        self._http = httpx.Client(base_url=url, timeout=30)
        until(self._answers, 30, "an answer")  # workers listen a little later than they say

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/healthz").is_success
        return False

    def _address(self, seen: int) -> str | None:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        found = re.search(r"running on (http://\S+)", self.log.read_text(errors="replace")[seen:])
        return found.group(1) if found else None

    @property
    def http(self) -> httpx.Client:
        """A client for the root of the running process."""
        assert self._http is not None
        return self._http

    @property
    def pid(self) -> int:
        """The running process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                raise
            self._process = None
        if self._http is not None:
            self._http.close()

    def post(self, task: dict[str, Any]) -> str:
        """Create a task; its id."""
        answer = self.http.post("/ga4gh/tes/v1/tasks", json=task)
        assert answer.status_code == 200, answer.text
        task_id: str = answer.json()["id"]
        return task_id

    def get(self, task_id: str, view: str = "FULL") -> dict[str, Any]:
        """A task as its document."""
        answer = self.http.get(f"/ga4gh/tes/v1/tasks/{task_id}", params={"view": view})
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def state(self, task_id: str) -> str:
        """A task's state."""
        state: str = self.get(task_id, "MINIMAL")["state"]
        return state

    def cancel(self, task_id: str) -> None:
        """Ask for a cancel."""
        answer = self.http.post(f"/ga4gh/tes/v1/tasks/{task_id}:cancel")
        assert (answer.status_code, answer.json()) == (200, {})

    def end(self, task_id: str, seconds: float = 60.0) -> dict[str, Any]:
        """The task in FULL, once it is final."""
        until(lambda: self.state(task_id) in FINAL, seconds, f"the end of {task_id}")
        return self.get(task_id)

    def states(self) -> dict[str, str]:
        """The state of every task."""
        found: dict[str, str] = {}
        token: str | None = ""
        while token is not None:
            parameters = {"page_size": "2000", **({"page_token": token} if token else {})}
            page = self.http.get("/ga4gh/tes/v1/tasks", params=parameters).json()
            found |= {task["id"]: task["state"] for task in page["tasks"]}
            token = page.get("next_page_token")
        return found


@contextlib.contextmanager
def service(directory: Path, **variables: str) -> Iterator[Service]:
    """A started service; stopped at the end."""
    running = Service(directory, **variables)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def roots(*paths: Path | str, mount: bool = False) -> str:
    """The value of TESP_EMBEDDED__FILE_ROOTS for these directories."""
    return "[" + ", ".join(f"{{path = {json.dumps(str(path))}, mount = {json.dumps(mount)}}}" for path in paths) + "]"
