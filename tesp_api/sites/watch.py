"""Job directories that lie on our own machine: their documents, and a watch that sees them change at once.

A look at a file costs microseconds where a question to Pulsar costs milliseconds, for it and for us. So a site whose
jobs are here tells of them by itself, and asks Pulsar rarely.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from tesp_api.runner import job
from tesp_api.sites import documents
from tesp_api.task import Observation, Phase

PAUSE: Final = 0.01
"""Seconds between two looks at the files; each watched job adds a little, so that many cost no more than a few."""

PAUSE_EACH: Final = 0.0002

_NOT_THERE: Final = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class JobFiles:
    """The documents in the job directories below `directory`.

    OSError: it cannot be told whether a document is there, for want of file descriptors say; look again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)

    def read(self, job_id: str, name: str, limit: int) -> bytes | None:
        """A file of the job's metadata directory; None if it is not there or longer than `limit`."""
        try:
            with open(self._path(job_id, name), "rb") as stream:  # noqa: PTH123 - often called, and text is quicker
                data = stream.read(limit + 1)
        except _NOT_THERE:
            return None
        return data if len(data) <= limit else None

    def progress(self, job_id: str) -> job.Progress | None:
        """The job's progress, if there is one that can be read."""
        return documents.progress(self.read(job_id, "progress.json", documents.PROGRESS_BYTES), job_id)

    def result(self, job_id: str) -> job.Result | None:
        """The job's result, if there is one that can be read."""
        return documents.result(self._result(job_id), job_id)

    async def result_aside(self, job_id: str) -> job.Result | None:
        """The same; nobody has to wait while a long one is read."""
        return await documents.aside(documents.result, self._result(job_id), job_id)

    def _result(self, job_id: str) -> bytes | None:
        return self.read(job_id, "result.json", job.RESULT_BYTES)

    def stamp(self, job_id: str) -> tuple[int, int] | None:
        """Something that changes whenever the progress is replaced; None if there is none."""
        try:
            facts = os.stat(self._path(job_id, "progress.json"))  # noqa: PTH116
        except _NOT_THERE:
            return None
        return facts.st_ino, facts.st_mtime_ns

    def _path(self, job_id: str, name: str) -> str:
        return f"{self._directory}/{job_id}/metadata/{name}"


class Watch:
    """Watches some jobs and tells when one goes on to its next phase or ends; then it is watched no more.

    Nor is one whose progress has gone, for it was removed; the first one may appear a moment after the submit.
    """

    def __init__(self, files: JobFiles) -> None:
        self._files = files
        self._stamps: dict[str, tuple[int, int] | None] = {}
        self._phases: dict[str, tuple[str, int]] = {}
        self._some = asyncio.Event()

    def add(self, job_id: str) -> None:
        """Watch this job."""
        self._stamps.setdefault(job_id)
        self._some.set()

    def drop(self, job_id: str) -> None:
        """Watch it no more."""
        self._stamps.pop(job_id, None)
        self._phases.pop(job_id, None)

    async def moves(self) -> AsyncIterator[Observation]:
        """What is seen, for ever."""
        while True:
            if not self._stamps:
                self._some.clear()
            await self._some.wait()
            for job_id in list(self._stamps):
                if (seen := await self._look(job_id)) is not None:
                    yield seen
            await asyncio.sleep(PAUSE + PAUSE_EACH * len(self._stamps))

    async def _look(self, job_id: str) -> Observation | None:
        try:
            return await self._see(job_id)
        except OSError:
            return None  # the next round looks again

    async def _see(self, job_id: str) -> Observation | None:
        stamp = self._files.stamp(job_id)
        if stamp is None:
            if self._stamps.get(job_id) is not None:
                self.drop(job_id)
            return None
        if self._stamps.get(job_id, stamp) == stamp:
            return None
        progress = self._files.progress(job_id)
        if progress is not None and progress.phase == "done":
            result = await self._files.result_aside(job_id)
            self.drop(job_id)
            return Observation(job_id=job_id, phase=Phase.ENDED, progress=progress, result=result) if result else None
        self._stamps[job_id] = stamp
        if progress is None or progress.phase == "waiting":
            return None
        phase = (progress.phase, progress.executor)
        if self._phases.get(job_id) == phase:
            return None  # only its heart beats; the polls count that
        self._phases[job_id] = phase
        return Observation(job_id=job_id, phase=Phase.RUNNING, progress=progress)
