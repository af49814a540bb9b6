"""The rate of POST /tasks against a bare FastAPI endpoint that validates the same body, in turns in one run."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench

BARE = """
import uvicorn
from fastapi import FastAPI
from tesp_api.tes import TesCreateTaskResponse, TesTask
app = FastAPI()
@app.post("/ga4gh/tes/v1/tasks")
async def create(task: TesTask) -> TesCreateTaskResponse:
    return TesCreateTaskResponse(id="1")
uvicorn.run(app, port=0, log_level="info", access_log=False)
"""
TASK = {
    "name": "align (1)",
    "inputs": [
        {"url": "/data/work/3a/9f0c1d/.command.sh", "path": "/work/.command.sh", "type": "FILE"},
        {"url": "/data/work/3a/9f0c1d/.command.run", "path": "/work/.command.run", "type": "FILE"},
        {"url": "/data/in/reads.fq", "path": "/work/reads.fq", "type": "FILE"},
    ],
    "outputs": [
        {"url": "/data/work/3a/9f0c1d/.command.out", "path": "/work/.command.out"},
        {"url": "/data/work/3a/9f0c1d/.exitcode", "path": "/work/.exitcode"},
        {"url": "/data/work/3a/9f0c1d", "path": "/work/*.bam", "path_prefix": "/work", "type": "FILE"},
    ],
    "resources": {"cpu_cores": 2, "ram_gb": 4.0},
    "executors": [
        {"image": "quay.io/nextflow/bash", "command": ["bash", "-c", "bash /work/.command.run"], "workdir": "/work"}
    ],
    "tags": {"workflow": "rnaseq", "sample": "7"},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-s", type=float, default=3.0, help="seconds for each measurement")
    options.add_argument("-c", type=int, default=16, help="connections")
    options.add_argument("-r", type=int, default=4, help="rounds")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        with log.open("wb") as file:
            bare = subprocess.Popen([sys.executable, "-c", BARE], stdout=file, stderr=file)
        # A site that is not there and has room for one job: nothing is measured but the API and the store.
        nowhere = {"TESP_PULSAR__URL": "http://127.0.0.1:9", "TESP_PULSAR__MAX_JOBS": "1"}
        nowhere["TESP_PULSAR__FILE_ROOTS"] = '["/data"]'
        try:
            with bench.service(**nowhere) as client:
                ports = {"bare": _port(bare, log), "tesp-api": client.base_url.port or 0}
                rates: dict[str, list[float]] = {name: [] for name in ports}
                for _ in range(given.r):
                    for name, port in ports.items():
                        rates[name].append(_measure(port, given.c, given.s))
        finally:
            bare.terminate()
            bare.wait()
    print(bench.machine())
    for name, values in rates.items():
        each = ", ".join(f"{value:.0f}" for value in values)
        print(f"{name:9} median {statistics.median(values):.0f} POST/s  ({each})")
    ratio = statistics.median(rates["tesp-api"]) / statistics.median(rates["bare"])
    print(f"ratio     {ratio:.2f} with {given.c} connections; limit 0.40 (every POST is flushed to disk)")


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    while process.poll() is None:
        if found := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text(errors="replace")):
            return int(found.group(1))
        time.sleep(0.02)
    sys.exit(log.read_text(errors="replace"))


def _measure(port: int, connections: int, seconds: float) -> float:
    """POSTs per second, from a process of its own so that the load does not share our interpreter."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        count: int = pool.apply(_load, (port, connections, seconds))
    return count / seconds


def _load(port: int, connections: int, seconds: float) -> int:
    return asyncio.run(_connections(port, connections, time.perf_counter() + seconds))


async def _connections(port: int, connections: int, until: float) -> int:
    return sum(await asyncio.gather(*(_connection(port, until) for _ in range(connections))))


async def _connection(port: int, until: float) -> int:
    """One keep-alive connection, one request after the other; plain sockets cost less than any client library."""
    body = json.dumps(TASK).encode()
    lines = ["POST /ga4gh/tes/v1/tasks HTTP/1.1", "Host: x", "Content-Type: application/json"]
    request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
    reader, writer = await asyncio.open_connection("127.0.0.1", port, family=socket.AF_INET)
    count = 0
    while time.perf_counter() < until:
        writer.write(request)
        header = await reader.readuntil(b"\r\n\r\n")
        if not header.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(header.decode())
        length = re.search(rb"content-length: (\d+)", header.lower())
        assert length is not None
        await reader.readexactly(int(length.group(1)))
        count += 1
    writer.close()
    return count


if __name__ == "__main__":
    main()
