"""What many running tasks cost the service when nothing happens: CPU and memory with a site that only says `running`.

The service is the real one without its HTTP side: store, dispatcher, poller, keeper. The site is simulated: each job
runs, its heartbeat goes on, and an answer takes a millisecond. All tasks were under way before the start, as after a
restart, so the first looks come at once; measured is what comes after each has been looked at, for longer than the
pause between two looks at one of so many.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench

from tesp_api.app import Service
from tesp_api.dispatch.dispatcher import Dispatcher
from tesp_api.dispatch.keeper import Keeper
from tesp_api.dispatch.poller import Poller
from tesp_api.lifecycle import Policy
from tesp_api.runner.job import Progress
from tesp_api.sites import SiteFacts
from tesp_api.store import TaskStore
from tesp_api.store.mongo import MongoStore
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Attempt, Observation, Phase, Task, job_id, new_task
from tesp_api.tes import TesState, TesTask
from tests.doubles import SiteDouble
from tests.mongod import ReplicaSet

SPEC = TesTask.model_validate(
    {
        "name": "align (1)",
        "inputs": [{"url": f"/data/in/{n}.fq", "path": f"/work/{n}.fq"} for n in range(4)],
        "outputs": [{"url": "/data/out/x.bam", "path": "/work/x.bam"}],
        "executors": [{"image": "busybox", "command": ["sh", "-c", "sleep 86400"], "workdir": "/work"}],
        "tags": {"workflow": "rnaseq", "sample": "7"},
    }
)


class Simulated(SiteDouble):
    """A site whose jobs run for ever."""

    def __init__(self, tasks: int) -> None:
        super().__init__(SiteFacts(name="simulated", max_jobs=100_000))
        self.looks = 0
        self._tasks = tasks
        self.all_seen = asyncio.Event()

    async def observe(self, job_ids: Sequence[str]) -> Sequence[Observation]:
        await asyncio.sleep(0.001)
        self.looks += len(job_ids)
        if self.looks >= self._tasks:
            self.all_seen.set()
        beat = int(time.time())
        return [
            Observation(job_id=each, phase=Phase.RUNNING, progress=Progress(each, "running", started="x", beat=beat))
            for each in job_ids
        ]

    async def updates(self) -> AsyncIterator[Observation]:
        await asyncio.Event().wait()
        yield Observation(job_id="", phase=Phase.UNKNOWN)


def running(now: float) -> Task:
    """A task that has been running for an hour."""
    task = new_task(SPEC, now=now - 3600)
    attempt = Attempt(
        number=1, job_id=job_id(task.id, 1), site="simulated", assigned=now - 3600, submitted=now - 3600, heard=now
    )
    fields: dict[str, Any] = {"state": TesState.RUNNING, "attempts": (attempt,), "due_at": now, "version": 9}
    return Task(id=task.id, document=task.document, created=task.created, **fields)


async def measure(store: TaskStore, tasks: int, seconds: float) -> None:
    site = Simulated(tasks)
    sites, policies = {"simulated": site}, {"simulated": Policy()}
    dispatcher = Dispatcher(store, sites, policies, store.clock)
    poller = Poller(store, sites, policies, dispatcher.submit, store.clock)
    async with store:
        for start in range(0, tasks, 100):
            await asyncio.gather(*(store.add(running(store.clock())) for _ in range(start, min(start + 100, tasks))))
    async with Service(store, sites, dispatcher, poller, Keeper(store)).run():
        await site.all_seen.wait()
        first, cpu, began = site.looks, time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        passed = time.perf_counter() - began
        share = (time.process_time() - cpu) / passed
        rate = (site.looks - first) / passed
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {share:.2f} of a core (limit 0.50), at most {memory:.0f} MB (limit 300), {rate:.0f} looks/s")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-n", type=int, default=10_000, help="active tasks")
    options.add_argument("-s", type=float, default=180.0, help="seconds to measure")
    options.add_argument("--store", choices=["sqlite", "mongo"], help="only this one, in this process")
    given = options.parse_args()
    if given.store is None:  # each in a process of its own, for its memory
        print(bench.machine())
        for name in ("sqlite", "mongo"):
            print(f"{name}: {given.n} active tasks", flush=True)
            command = [sys.executable, __file__, "-n", str(given.n), "-s", str(given.s), "--store", name]
            if os.spawnv(os.P_WAIT, sys.executable, command):
                sys.exit(1)
        return
    with tempfile.TemporaryDirectory(prefix="tesp-bench-") as directory:
        if given.store == "sqlite":
            asyncio.run(measure(SqliteStore(Path(directory, "tasks.sqlite")), given.n, given.s))
        else:
            with ReplicaSet(Path(directory, "mongod"), 1) as server:
                asyncio.run(measure(MongoStore(server.uri), given.n, given.s))


if __name__ == "__main__":
    main()
