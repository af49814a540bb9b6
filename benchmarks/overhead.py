"""What a task costs over the bare container: POST-to-COMPLETE of a no-op minus `docker run` of it, in turns."""

from __future__ import annotations

import argparse
import statistics
import time

import bench


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-n", type=int, default=30, help="pairs to measure")
    count = options.parse_args().n
    with bench.service() as client:
        bench.demand(client, _run(client)[1])  # warm: Pulsar is up, the runner is there
        bench.docker_run()
        ours, bare = [], []
        for _ in range(count):
            bare.append(bench.docker_run())
            seconds, task_id = _run(client)
            ours.append(seconds)
            bench.demand(client, task_id)
    print(bench.machine())
    for name, values in (("docker run", bare), ("task", ours)):
        print(f"{name:12} median {statistics.median(values):.3f} s  min {min(values):.3f}  max {max(values):.3f}")
    difference = statistics.median(ours) - statistics.median(bare)
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"overhead     {difference:.3f} s (ratio {ratio:.2f}) over {count} pairs; aim 0.1 s, limit 0.25 s")


def _run(client: bench.httpx.Client) -> tuple[float, str]:
    start = time.perf_counter()
    task_id = bench.post(client)
    bench.wait(client, task_id)
    return time.perf_counter() - start, task_id


if __name__ == "__main__":
    main()
