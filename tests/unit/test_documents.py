"""What a node sends is right to the last field, or it is nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from tesp_api.runner import job
from tesp_api.sites import documents

RESULT = {"job_id": "j-1", "state": "COMPLETE", "start_time": "s", "end_time": "e"}


def report(**fields: Any) -> bytes:
    progress = {"job_id": "j-1", "phase": "running", **fields.pop("progress", {})}
    return json.dumps({"progress": progress, **fields}).encode()


def test_a_report() -> None:
    found = documents.report(report(progress={"stdout": "x", "stdout_bytes": 1}, hold=1, result=RESULT), "j-1")
    assert found is not None
    assert (found.progress.stdout, found.hold) == ("x", 1)
    assert found.result is not None
    assert documents.report(documents.dump(found), "j-1") == found


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100000,
        report(progress={"job_id": "j-2"}),
        report(progress={"phase": "dancing"}),
        report(progress={"stdout": 1}),
        report(progress={"stdout": "x" * (job.TAIL_BYTES + 1)}),
        report(progress={"stderr_bytes": -1}),
        report(progress={"stdout_bytes": 1 << 70}),
        report(progress={"beat": 1.5}),
        report(progress={"version": 2}),
        report(hold=-1),
        report(hold=job.HOLD + 1),
        report(hold="1"),
        report(hold=True),
        report(hold=float("nan")),
        report(result=[]),
        report(result={**RESULT, "job_id": "j-2"}),
        report(result={**RESULT, "state": "RUNNING"}),
        report(result={**RESULT, "executors": [{"exit_code": "0"}]}),
        report(result={**RESULT, "executors": [{"exit_code": 1 << 31, "start_time": "s", "end_time": "e"}]}),
        report(result={**RESULT, "executors": [{"exit_code": -(10**300), "start_time": "s", "end_time": "e"}]}),
        report(result={**RESULT, "outputs": [{"url": "u", "path": "p", "size_bytes": -1}]}),
        report(result={**RESULT, "outputs": [{"url": "u", "path": "p", "size_bytes": 1 << 63}]}),
        report() + b" " * job.REPORT_BYTES,
    ],
    ids=range(27),
)
def test_no_report(data: bytes) -> None:
    assert documents.report(data, "j-1") is None


@pytest.mark.parametrize("long", [False, True])
def test_others_go_on_while_a_long_document_is_read(*, long: bool) -> None:
    """The reader waits until the loop has gone on, if it is not on the loop itself."""
    go_on = threading.Event()
    data = b"x" * (documents.LONG + long)

    def read(data: bytes | None, job_id: str) -> tuple[bytes | None, str, bool]:
        return data, job_id, go_on.wait(60 if long else 0)

    async def main() -> tuple[bytes | None, str, bool]:
        reading = asyncio.create_task(documents.aside(read, data, "j-1"))
        await asyncio.sleep(0)
        go_on.set()
        return await reading

    assert asyncio.run(main()) == (data, "j-1", long)


def test_the_longest_progress_can_be_read() -> None:
    """A tail takes most room when all of it has to be escaped."""
    worst = job.Progress("j-1", stdout="\x01" * job.TAIL_BYTES, stderr="\x01" * job.TAIL_BYTES)
    data = documents.dump(worst)
    assert len(data) < documents.PROGRESS_BYTES
    assert documents.progress(data, "j-1") == worst
