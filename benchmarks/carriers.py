"""What each carrier costs, in one run with the bare engine: the overhead of a no-op task over `docker run`, in turns;
the rate of a burst against `xargs -P`; the CPU that running jobs cost the service, Pulsar and the broker meanwhile.

Sites are set up as the tests do it (tests/carried.py), from the documented configuration files. The jobs of the idle
part are plain processes that sleep, so that a thousand of them fit on one machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench
import burst
import httpx

from tests.carried import PLACES, Carried
from tests.running import until

OVERHEAD, RATE = 0.3, 0.8
"""The promises: seconds over a bare container, at most; part of the bare engine's rate, at least."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("carriers", nargs="*", metavar="CARRIER", help=f"some of {', '.join(PLACES)}; else all")
    options.add_argument("-n", type=int, default=20, help="no-op tasks per carrier for the overhead; 0: none")
    options.add_argument("-b", type=int, default=200, help="tasks of a burst; 0: none")
    options.add_argument("-P", type=int, default=max(4, 2 * (os.cpu_count() or 2)), help="how many at once in a burst")
    options.add_argument("-i", type=int, default=100, help="running jobs whose idle cost is measured; 0: none")
    options.add_argument("-s", type=float, default=30.0, help="seconds for which the idle cost is measured")
    given = options.parse_args()
    names = given.carriers or list(PLACES)
    if unknown := set(names) - set(PLACES):
        options.error(f"unknown carriers: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends also when this is stopped
    print(bench.machine())
    with tempfile.TemporaryDirectory(prefix="tesp-bench-") as directory, ExitStack() as stack:
        running = [
            stack.enter_context(Carried(Path(directory, name), name, max_jobs=given.P))
            for name in names
            if given.n or given.b
        ]
        if given.n:
            overhead(running, given.n)
        if given.b:
            rates(running, given.b, given.P)
        stack.close()
        for name in names if given.i else ():
            idle(Path(directory, f"idle-{name}"), name, given.i, given.s)


def client_of(running: Carried) -> httpx.Client:
    """A client for its TES API."""
    return httpx.Client(base_url=f"{running.service.http.base_url}/ga4gh/tes/v1", timeout=60)


def overhead(every: Sequence[Carried], count: int) -> None:
    """One bare container, then one task on each carrier; again and again."""
    bare: list[float] = []
    ours: dict[str, list[float]] = {each.place.carrier: [] for each in every}
    bench.docker_run()
    clients = {each.place.carrier: client_of(each) for each in every}
    for client in clients.values():  # warm: Pulsar is up, the runner is there
        _timed(client)
    for _ in range(count):
        bare.append(bench.docker_run())
        for name, client in clients.items():
            ours[name].append(_timed(client))
    median = statistics.median(bare)
    print(f"docker run   median {median:.3f} s  min {min(bare):.3f}  max {max(bare):.3f}  ({count} in turns)")
    for name, values in ours.items():
        each = statistics.median(values)
        print(
            f"{name:12} median {each:.3f} s  min {min(values):.3f}  max {max(values):.3f}  "
            f"overhead {each - median:.3f} s (ratio {each / median:.2f}; limit {OVERHEAD} s)"
        )


def _timed(client: httpx.Client) -> float:
    start = time.perf_counter()
    task_id = bench.post(client)
    bench.wait(client, task_id)
    seconds = time.perf_counter() - start
    bench.demand(client, task_id)
    return seconds


def rates(every: Sequence[Carried], count: int, parallel: int) -> None:
    """A burst of bare containers before the burst of each carrier."""
    for each in every:
        bare = count / burst.xargs(count, parallel)
        ours = count / burst.burst(client_of(each), count)
        print(
            f"{each.place.carrier:12} {ours:.2f} tasks/s, xargs -P {parallel} docker run {bare:.2f}/s: "
            f"ratio {ours / bare:.2f} over {count} (limit {RATE})"
        )


def idle(directory: Path, name: str, count: int, seconds: float) -> None:
    """CPU of the service and of what stands behind the site while `count` jobs sleep."""
    task: dict[str, object] = {"executors": [{"image": bench.IMAGE, "command": ["sleep", "86400"]}]}
    with ExitStack() as stack:
        running = stack.enter_context(Carried(directory, name, max_jobs=count, runtime="host"))
        stack.callback(end, directory)
        client = client_of(running)
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda _: bench.post(client, task), range(count)))
        until(lambda: list(running.service.states().values()).count("RUNNING") == count, 60 + count, "all run")
        parts = {"service": [running.service.pid], **running.place.processes(), "runners": runners(directory)}
        before = {part: cpu(pids) for part, pids in parts.items()}
        time.sleep(seconds)
        after = {part: cpu(pids) for part, pids in parts.items()}
        used = {part: sum(after[part][pid] - before[part][pid] for pid in after[part]) for part in parts}
        shares = ", ".join(f"{part} {each / seconds * 100:.1f} %" for part, each in used.items())
        print(f"{name:12} {count} running jobs, for {seconds:.0f} s of a core: {shares}", flush=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(running.service.cancel, ids))
        until(lambda: set(running.service.states().values()) == {"CANCELED"}, 60 + count, "all canceled")


def runners(directory: Path) -> list[int]:
    """The runners of the jobs that lie below the directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            is_runner = b"runner.pyz" in (entry / "cmdline").read_bytes()
            if is_runner and (entry / "cwd").resolve().is_relative_to(directory):
                found.append(int(entry.name))
    return found


def end(directory: Path) -> None:
    """Kill what is left of the jobs when something went wrong; their reapers do the rest."""
    for pid in runners(directory):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cpu(pids: Sequence[int]) -> dict[int, float]:
    """Seconds of CPU that each of the processes has used, as far as they live."""
    used = {}
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


if __name__ == "__main__":
    main()
