"""How many due tasks several processes on one store claim per second, and that each task goes to one of them alone."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import bench
from store import mongod, open_store
from store_records import SPEC

from tesp_api.task import Task, new_task

BATCH = 64
"""As many as the dispatcher takes at a time."""

LEASE = 1000.0
PROCESSES = (1, 2, 4)


async def fill(place: str, count: int) -> set[str]:
    """Add tasks that are due; their ids."""
    tasks: list[Task] = [new_task(SPEC) for _ in range(count)]
    async with open_store(place) as store:
        for start in range(0, count, 500):
            await asyncio.gather(*map(store.add, tasks[start : start + 500]))
    return {task.id for task in tasks}


def replica(place: str, pipe: Connection) -> None:
    """A process like a service's: a store of its own, which claims when it is told to."""
    asyncio.run(_replica(place, pipe))


async def _replica(place: str, pipe: Connection) -> None:
    async with open_store(place) as store:
        pipe.send("ready")
        while ahead := pipe.recv():
            claimed: list[str] = []
            start = time.time()
            # `ahead`: each round is so much later that what the round before has claimed is due again.
            while taken := await store.take_due(queued=True, now=store.clock() + ahead, lease=LEASE, limit=BATCH):
                claimed += [task.id for task in taken]
            pipe.send((claimed, start, time.time()))


@contextlib.contextmanager
def replicas(place: str, count: int) -> Iterator[list[Connection]]:
    """So many processes that are ready."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=replica, args=(place, theirs), daemon=True) for _, theirs in pairs]
    try:
        for process in processes:
            process.start()
        for ours, _ in pairs:
            ours.recv()
        yield [ours for ours, _ in pairs]
        for ours, _ in pairs:
            ours.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def claim_all(pipes: list[Connection], wanted: set[str], ahead: float) -> float:
    """Let them claim all there is; claims per second. Stops the program if one was claimed twice, or not at all."""
    for pipe in pipes:
        pipe.send(ahead)
    answers = [pipe.recv() for pipe in pipes]
    claimed = [task_id for ids, _, _ in answers for task_id in ids]
    if len(claimed) != len(wanted) or set(claimed) != wanted:
        sys.exit(f"{len(claimed)} claims of {len(set(claimed))} tasks, and there are {len(wanted)}")
    seconds: float = max(end for _, _, end in answers) - min(start for _, start, _ in answers)
    return len(claimed) / seconds


def measure(kind: str, place: str, count: int, rounds: int) -> None:
    """Claim everything again and again, by one, two and four processes in turns, and print the rates."""
    wanted = asyncio.run(fill(place, count))
    rates: dict[int, list[float]] = {number: [] for number in PROCESSES}
    ahead = 0.0
    for _ in range(rounds):
        for number in PROCESSES:
            ahead += 2 * LEASE
            with replicas(place, number) as pipes:
                rates[number].append(claim_all(pipes, wanted, ahead))
    one = statistics.median(rates[PROCESSES[0]])
    print(f"\n{kind}: {count:,} tasks, {BATCH} at a time; none was claimed twice, none was missed")
    for number, each in rates.items():
        rate = statistics.median(each)
        listed = ", ".join(f"{value:.0f}" for value in each)
        print(f"{number} processes: median {rate:7.0f} claims/s  ratio {rate / one:.2f}  ({listed})")


def main() -> None:
    """Measure each kind of store."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-n", type=int, default=50_000, help="tasks to claim")
    options.add_argument("-r", type=int, default=3, help="rounds")
    options.add_argument("--stores", default="sqlite,mongo", help="which to measure")
    given = options.parse_args()
    print(bench.machine())
    with tempfile.TemporaryDirectory(prefix="tesp-bench-") as directory, contextlib.ExitStack() as stack:
        for kind in given.stores.split(","):
            if kind == "sqlite":
                place = str(Path(directory) / "claims.sqlite")
            else:
                place = stack.enter_context(mongod(Path(directory) / "mongod")).uri_of("claims")
            measure(kind, place, given.n, given.r)


if __name__ == "__main__":
    main()
