"""Tasks that leave traces, whoever posts them while things break, and the verdict on what became of them."""

from __future__ import annotations

import json
import random
import secrets
import select
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.chaos import MAX_ATTEMPTS, Cluster, marked
from tests.engine import IMAGE
from tests.running import FINAL, until

KINDS = {
    "plain": ("COMPLETE", 1),
    "chain": ("COMPLETE", 3),
    "failing": ("EXECUTOR_ERROR", 3),
    "files": ("COMPLETE", 1),
    "canceled": ("CANCELED", 2),
    "long": ("COMPLETE", 1),
}
"""What tasks there are: the state in which each must end, and its number of executors."""

EXIT_CODE = 3
"""What the second executor of a failing task ends with."""

BACKLOG = 12
"""Posted tasks that have not ended; no more are posted meanwhile, so that the faults find all stages of a life."""

ERRANDS = 20
"""Directories of errands that may be left in the end."""

KILLED = "The runner was killed"
"""How the result begins that a reaper writes for its runner."""


@dataclass(frozen=True)
class Work:
    """One task to be posted. `trick`: how the poster loses the first answer; `moment`: when it cancels."""

    name: str
    kind: str
    trick: str
    moment: str
    body: bytes

    @property
    def executors(self) -> int:
        """How many it has."""
        return KINDS[self.kind][1]

    @property
    def end(self) -> str:
        """The only state in which it may end."""
        return KINDS[self.kind][0]


def works(seed: int, count: int, shared: Path) -> list[Work]:
    """`count` tasks of all kinds."""
    chance = random.Random(f"works of {seed}")
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(count)]
    chance.shuffle(kinds)
    return [_work(f"task-{number}", kind, shared, chance) for number, kind in enumerate(kinds)]


def _work(name: str, kind: str, shared: Path, chance: random.Random) -> Work:
    document: dict[str, Any] = {
        "name": name,
        "inputs": [{"url": str(shared), "path": "/shared", "type": "DIRECTORY"}],
        "executors": [
            {"image": IMAGE, "command": ["sh", "-c", _command(name, kind, index, chance)]}
            for index in range(KINDS[kind][1])
        ],
    }
    if kind == "files":
        document["inputs"].append({"content": text_of(name), "path": "/in/text"})
        document["outputs"] = [{"url": f"{shared}/out-{name}", "path": "/out/result"}]
    trick = chance.choice(["", "", "", "", "", "", "leave at once", "leave at the answer"])
    moment = chance.choice(["QUEUED", "INITIALIZING", "RUNNING"])
    return Work(name, kind, trick, moment, json.dumps(document).encode())


def text_of(name: str) -> str:
    """The content of a task's input."""
    return f"the input of {name}\n" * 5


def _command(name: str, kind: str, index: int, chance: random.Random) -> str:
    """Leave a trace of this very start first of all, in one short write; then do what the kind asks for."""
    rest = ""
    if kind == "long":
        rest = f"sleep {chance.uniform(1, 2):.1f}; "
    elif kind == "canceled":
        rest = "sleep 600; " if index == 1 else ""
    elif kind == "failing" and index == 1:
        rest = f"exit {EXIT_CODE}; "
    elif kind == "files":
        rest = "tr a-z A-Z < /in/text > /out/result; "
    trace = f'read -r token < /proc/sys/kernel/random/uuid; echo "{name} {index} $token" >> /shared/ran; '
    return f"{trace}{rest}echo done {name} {index}"


class Posters:
    """Threads that post works to any replica that answers, each until its create is acknowledged."""

    def __init__(self, cluster: Cluster, every: Sequence[Work], threads: int = 6) -> None:
        self._cluster = cluster
        self._left = list(reversed(every))
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._counter = threading.Thread(target=self._count, daemon=True)
        self.acknowledged: dict[str, str] = {}
        """Name -> id."""
        self.repeats = 0
        """Creates that were sent again."""
        self.ended = 0
        """How many of the stored tasks have ended."""
        self.errors: list[BaseException] = []

    def start(self) -> None:
        """Begin."""
        for thread in (*self._threads, self._counter):
            thread.start()

    def stop(self) -> None:
        """Post nothing more."""
        self._stopped.set()
        for thread in (*self._threads, self._counter):
            thread.join(150)

    @property
    def done(self) -> bool:
        """Whether everything is posted, and canceled where that was planned. Raises what went wrong."""
        if self.errors:
            raise self.errors[0]
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None and not self._stopped.is_set():
                task_id = self._create(work)
                with self._lock:
                    self.acknowledged[work.name] = task_id
                if work.kind == "canceled":
                    self._cancel(work, task_id)
        except BaseException as error:
            self.errors.append(error)

    def _count(self) -> None:
        try:
            while not self._stopped.is_set():
                self.ended = sum(state in FINAL for state in self._cluster.states().values())
                time.sleep(0.1)
        except BaseException as error:
            self.errors.append(error)

    def _next(self) -> Work | None:
        """The next work, as soon as there is room for it."""
        while not self._stopped.is_set():
            with self._lock:
                if not self._left:
                    return None
                if len(self.acknowledged) - self.ended < BACKLOG:
                    return self._left.pop()
            time.sleep(0.02)
        return None

    def _create(self, work: Work) -> str:
        key = secrets.token_hex(16)
        if work.trick:
            self._post_and_leave(work, key)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self._stopped.is_set():
            if (task_id := self._post(work, key)) is not None:
                return task_id
            self.repeats += 1
            time.sleep(0.05)
        raise AssertionError(f"{work.name} could not be posted")

    def _post(self, work: Work, key: str) -> str | None:
        """The id; None if no answer came, or one that says to try again."""
        url = random.choice(self._cluster.replicas).url
        if url is None:
            return None
        try:
            answer = httpx.post(
                f"{url}/ga4gh/tes/v1/tasks",
                content=work.body,
                headers={"Idempotency-Key": key},
                timeout=3.0,
                verify=False,
            )
        except httpx.TransportError:
            return None
        assert answer.status_code == 200 or answer.status_code >= 500, answer.text
        return str(answer.json()["id"]) if answer.status_code == 200 else None

    def _post_and_leave(self, work: Work, key: str) -> None:
        """Send a create, and hang up without reading the answer: at once, or when it has begun to arrive."""
        self.repeats += 1
        url = random.choice(self._cluster.replicas).url
        if url is None:
            return
        where = httpx.URL(url)
        head = (
            f"POST /ga4gh/tes/v1/tasks HTTP/1.1\r\nHost: {where.netloc.decode()}\r\nIdempotency-Key: {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(work.body)}\r\n\r\n"
        )
        with suppress(OSError), socket.create_connection((where.host, where.port), timeout=3) as connection:
            connection.sendall(head.encode() + work.body)
            if work.trick == "leave at the answer":
                select.select([connection], [], [], 3)

    def _cancel(self, work: Work, task_id: str) -> None:
        """When the task has come as far as planned, or farther."""
        stages = ["QUEUED", "INITIALIZING", "RUNNING"]
        wanted = stages[stages.index(work.moment) :]
        until(lambda: self._cluster.task(task_id, "MINIMAL")["state"] in wanted, 240, f"{work.name} {work.moment}")
        self._cluster.ask("POST", f"/tasks/{task_id}:cancel")


# The verdict


class Verdict:
    """What is wrong with the end of a run: sentences, with the documents that they are about."""

    def __init__(self, cluster: Cluster, every: Sequence[Work], acknowledged: Mapping[str, str]) -> None:
        self._cluster = cluster
        self._works = {work.name: work for work in every}
        self._acknowledged = acknowledged
        self.documents: dict[str, dict[str, Any]] = {}
        """Of every stored task, by id."""
        self.wrong: list[str] = []

    def find(self) -> None:
        """Look at everything."""
        self.documents = {task_id: self._cluster.task(task_id) for task_id in self._cluster.states()}
        self._nothing_lost_nothing_twice()
        starts = _starts(self._cluster.shared / "ran")
        for task_id, document in self.documents.items():
            work = self._works.get(document.get("name", ""))
            if work is not None:
                found = judge(work, document, starts[work.name], self._cluster.shared)
                self.wrong += [f"{work.name} ({work.kind}, {task_id}): {sentence}" for sentence in found]
        self.wrong += [f"a trace of the unknown {name}" for name in starts.keys() - self._works.keys()]
        self._nothing_left()

    def _nothing_lost_nothing_twice(self) -> None:
        names = Counter(document.get("name", "") for document in self.documents.values())
        self.wrong += [f"{name}: stored {count} times" for name, count in names.items() if count > 1]
        self.wrong += [f"{name}: not acknowledged, but stored" for name in names.keys() - self._acknowledged.keys()]
        for name, task_id in self._acknowledged.items():
            if task_id not in self.documents:
                self.wrong.append(f"{name} ({task_id}): acknowledged, but not stored")

    def _nothing_left(self) -> None:
        """What is cleaned up after the end may take a moment."""
        for what in (self._containers, self._directories, self._processes):
            deadline = time.monotonic() + 60
            while what() and time.monotonic() < deadline:
                time.sleep(0.1)
            self.wrong += what()

    def _containers(self) -> list[str]:
        command = ["docker", "ps", "-a", "--filter", "label=tesp.task", "--format", '{{.Label "tesp.task"}} {{.Names}}']
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [f"the container {line} is left" for line in listed if line.split()[0] in self.documents]

    def _directories(self) -> list[str]:
        there = [each.name for each in self._cluster.place.staging.iterdir()]
        errands = [name for name in there if name.startswith("tes-errand-")]
        left = [name for name in there if name not in errands and not name.startswith("tes-runner-")]
        # The next errand takes away what the one before has left; nobody takes away the last ones of a killed service.
        return [f"the job directory {name} is left" for name in [*left, *errands[ERRANDS:]]]

    def _processes(self) -> list[str]:
        found = [seen for seen in marked(self._cluster.mark) if "runner.pyz" in seen.command]
        return [f"the process {seen} is left" for seen in found]

    def retried(self) -> dict[str, list[str]]:
        """Job id -> the reasons, of each attempt that was followed by another."""
        return {
            f"{task_id}-{number}": log.get("system_logs", [])
            for task_id, document in self.documents.items()
            for number, log in enumerate(document.get("logs", [])[:-1], 1)
        }

    def about(self) -> str:
        """The documents of all that is wrong."""
        named = [task_id for task_id in self.documents if any(task_id in sentence for sentence in self.wrong)]
        return "\n".join(json.dumps(self.documents[task_id], indent=1) for task_id in named)


def _starts(path: Path) -> defaultdict[str, Counter[int]]:
    """Task name -> executor index -> how often it was started."""
    found: defaultdict[str, Counter[int]] = defaultdict(Counter)
    tokens = set()
    for line in path.read_text().splitlines():
        name, index, token = line.split()
        assert token not in tokens, f"one start left two traces: {line}"
        tokens.add(token)
        found[name][int(index)] += 1
    return found


def judge(work: Work, document: Mapping[str, Any], starts: Counter[int], shared: Path) -> list[str]:
    """What is untrue in the document of an ended task, given how often each executor was really started."""
    wrong = []
    logs = document.get("logs", [])
    if document["state"] != work.end and not _was_killed_after_its_failure(work, document["state"], logs):
        wrong.append(f"{document['state']} in place of {work.end}")
    if len(logs) > MAX_ATTEMPTS:
        wrong.append(f"{len(logs)} attempts")
    for number, log in enumerate(logs[:-1], 1):
        if not log.get("system_logs"):
            wrong.append(f"attempt {number} was followed by another without a reason")
    for index in range(work.executors):
        least = sum(_least(log, index) for log in logs)
        most = sum(_most(log, index, is_last=log is logs[-1], state=document["state"]) for log in logs)
        if not least <= starts[index] <= most:
            wrong.append(f"executor {index} was started {starts[index]} times, the logs tell of {least} to {most}")
    last = logs[-1].get("logs", []) if logs else []
    codes = [each.get("exit_code") for each in last]
    wrong += _wrong_codes(work, document["state"], codes, [log.get("logs", []) for log in logs[:-1]])
    said = logs[-1].get("system_logs", []) if logs else []
    wrong += _wrong_contents(work, document["state"], last, said, shared)
    return wrong


def _was_killed_after_its_failure(work: Work, state: str, logs: Sequence[Mapping[str, Any]]) -> bool:
    """The failure is in the logs, and no other attempt followed; but the end was the killed runner's, and says so."""
    if work.kind != "failing" or state != "SYSTEM_ERROR" or not logs:
        return False
    codes = [each.get("exit_code") for each in logs[-1].get("logs", [])]
    return codes == [0, EXIT_CODE] and any(line.startswith(KILLED) for line in logs[-1].get("system_logs", []))


def _least(log: Mapping[str, Any], index: int) -> int:
    """How often an attempt has started an executor for sure: one that has ended was started. One that was stopped may
    not have come to its first line."""
    ended = log.get("logs", [])
    return int(index < len(ended) and not _was_stopped(ended[index]))


def _was_stopped(executor: Mapping[str, Any]) -> bool:
    return executor.get("exit_code", 0) in (128 + signal.SIGTERM, 128 + signal.SIGKILL)


def _most(log: Mapping[str, Any], index: int, *, is_last: bool, state: str) -> int:
    """How often it may have: also the one after the last that ended, if the attempt was cut off.

    An attempt that left no result, not even its reaper's, may have come to any.
    """
    ended = len(log.get("logs", []))
    if index < ended:
        return 1
    if is_last and state in ("COMPLETE", "EXECUTOR_ERROR"):
        return 0
    told = ended > 0 or any(line.startswith(KILLED) for line in log.get("system_logs", []))
    return int(index == ended or not told)


def _wrong_codes(work: Work, state: str, codes: list[Any], earlier: list[list[Any]]) -> list[str]:
    wanted = {"COMPLETE": [0] * work.executors, "EXECUTOR_ERROR": [0, EXIT_CODE]}.get(state)
    wrong = [f"exit codes {codes} in place of {wanted}"] if wanted is not None and codes != wanted else []
    if any(each.get("exit_code") and not _was_stopped(each) for log in earlier for each in log):
        wrong.append("tried again after an executor had failed")
    return wrong


def _wrong_contents(work: Work, state: str, last: list[Any], said: list[str], shared: Path) -> list[str]:
    if state != "COMPLETE":
        return []
    wrong = []
    printed = [each.get("stdout") for each in last]
    is_cut = any(line.endswith("its later output is lost.") for line in said)
    if not is_cut and printed != [f"done {work.name} {index}\n" for index in range(work.executors)]:
        wrong.append(f"stdout {printed}")
    if work.kind == "files":
        path = shared / f"out-{work.name}"
        if not path.exists() or path.read_text() != text_of(work.name).upper():
            wrong.append("its output is not what it should be")
    return wrong
