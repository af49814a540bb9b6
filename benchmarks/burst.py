"""The rate of a burst of no-op tasks against what `xargs -P` with bare `docker run` reaches, in turns in one run."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import bench


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-n", type=int, default=100, help="tasks in a burst")
    options.add_argument("-P", type=int, default=max(4, 2 * (os.cpu_count() or 2)), help="how many at once, both ways")
    options.add_argument("-r", type=int, default=2, help="rounds")
    given = options.parse_args()
    ours, bare = [], []
    with bench.service(TESP_EMBEDDED__MAX_JOBS=str(given.P)) as client:
        task_id = bench.post(client)
        bench.wait(client, task_id)
        bench.demand(client, task_id)
        for _ in range(given.r):
            bare.append(given.n / xargs(given.n, given.P))
            ours.append(given.n / burst(client, given.n))
    print(bench.machine())
    print(f"xargs -P {given.P} docker run: {', '.join(f'{rate:.2f}' for rate in bare)} tasks/s")
    print(f"tesp-api, {given.P} jobs:      {', '.join(f'{rate:.2f}' for rate in ours)} tasks/s")
    print(f"ratio {sum(ours) / sum(bare):.2f} over {given.r} rounds of {given.n}; limit 0.80")


def xargs(count: int, parallel: int) -> float:
    """Seconds for so many bare containers."""
    start = time.perf_counter()
    lines = "\n".join(["true"] * count)
    command = ["xargs", "-P", str(parallel), "-n", "1", "docker", "run", "--rm", bench.IMAGE]
    subprocess.run(command, input=lines, text=True, check=True)
    return time.perf_counter() - start


def burst(client: bench.httpx.Client, count: int) -> float:
    """Seconds for so many no-op tasks, all COMPLETE."""
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        ids = list(pool.map(lambda _: bench.post(client), range(count)))
    for task_id in ids:
        bench.wait(client, task_id, pause=0.05)
    seconds = time.perf_counter() - start
    for task_id in ids:
        bench.demand(client, task_id)
    return seconds


if __name__ == "__main__":
    main()
