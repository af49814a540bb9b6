"""Jobs for the runner's tests: a staging directory as a site lays it out, and the real zipapp started in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tesp_api.runner import bundle, job

PATIENCE = 30.0

BUNDLE = bundle.build()

PASSED_ON = ("PATH", "HOME", "DOCKER_HOST")
"""What a job sees of our environment; the engine of the tests may be a private one."""


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait for an event that can only be looked for: the first true value of the condition."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Job:
    """One job directory, and the runner's process in it."""

    def __init__(self, base: Path, plan: dict[str, Any], python: str = sys.executable) -> None:
        self.id = plan.pop("job_id", f"t{uuid.uuid4().hex[:12]}-1")
        self.root = base / "staging" / self.id
        self.python = python
        archive = base / "staging" / bundle.pseudo_job(BUNDLE.sha256) / "inputs" / bundle.FILE_NAME
        if not archive.parent.exists():
            archive.parent.mkdir(parents=True)
            archive.write_bytes(BUNDLE.data)
        for name in ("inputs", "working", "metadata"):
            (self.root / name).mkdir(parents=True)
        self.plan = job.Plan(job_id=self.id, task_id=self.id.rpartition("-")[0], **plan)
        self.plan_file = self.root / "inputs" / "job.json"
        self.plan_file.write_text(json.dumps(job.to_document(self.plan)), "ascii")
        self.process: subprocess.Popen[bytes] | None = None
        self.said = b""

    @property
    def mark(self) -> dict[str, str]:
        """A variable that only the processes of this job have, the reaper among them."""
        return {"TES_TEST_JOB": self.id}

    def start(self, command: str = "", env: dict[str, str] | None = None) -> Job:
        """Start the runner, as Pulsar would."""
        line = (command or bundle.command(BUNDLE.sha256)).split()
        self.process = subprocess.Popen(
            [self.python, *line[1:]],
            cwd=self.root / "working",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ} | self.mark | (env or {}),
        )
        return self

    def wait(self) -> int:
        """The runner's exit code; `said` is what it wrote."""
        assert self.process is not None
        self.said, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode

    def run(self, **options: Any) -> job.Result:
        """Start it, wait for a good end, and give the result."""
        code = self.start(**options).wait()
        assert (code, self.said) == (0, b"")
        return self.result()

    def result(self) -> job.Result:
        """The result as metadata has it; the copy in working must be the same, and progress must say `done`."""
        text = (self.root / "metadata" / "result.json").read_text("ascii")
        assert (self.root / "working" / "result.json").read_text("ascii") == text
        return job.read_result(json.loads(text))

    def has_result(self) -> bool:
        return (self.root / "working" / "result.json").exists()

    def progress(self) -> job.Progress | None:
        try:
            return job.read_progress(json.loads((self.root / "metadata" / "progress.json").read_text("ascii")))
        except FileNotFoundError:
            return None

    def wait_for_phase(self, phase: str) -> job.Progress:
        def there() -> job.Progress | None:
            progress = self.progress()
            return progress if progress and progress.phase == phase else None

        found: job.Progress = until(there)
        return found

    def cancel(self) -> None:
        """Answer like the service: by an upload, which is not atomic."""
        (self.root / "answer.json").write_text('{"can')
        (self.root / "answer.json").write_text(json.dumps(job.to_document(job.Answer(cancel=True))))

    def kill(self) -> None:
        """Kill the runner and all its children, like psutil in Pulsar."""
        assert self.process is not None
        for pid in [*children(self.process.pid), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.wait()


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    below: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            below += [*children(int(child)), int(child)]
    return below


def executor(*command: str, **options: Any) -> job.Executor:
    return job.Executor(image=options.pop("image", "busybox:latest"), command=list(command), **options)


def sh(script: str, **options: Any) -> job.Executor:
    """An executor that runs a shell script."""
    return executor("sh", "-c", script, **options)


def mounts(*targets: str) -> list[job.Mount]:
    return [job.Mount(target, f"m{number}") for number, target in enumerate(targets)]


def in_time(action: Callable[[], Any]) -> Any:
    """The value of an action that must not hang."""
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(action()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert box, "it hangs, or failed"
    return box[0]
