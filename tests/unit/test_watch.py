"""The watch over job directories: what is told, and when a job is watched no more."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from tesp_api.runner.job import Progress, Result
from tesp_api.sites import documents
from tesp_api.sites.watch import JobFiles, Watch
from tesp_api.task import Observation, Phase
from tests.pulsars import until
from tests.support import no_more_descriptors


class Counted(JobFiles):
    """Job files that note which were looked at."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.looks: list[str] = []

    def stamp(self, job_id: str) -> tuple[int, int] | None:
        self.looks.append(job_id)
        return super().stamp(job_id)

    async def rounds(self, job_id: str, count: int) -> None:
        """Wait until the job has been looked at so many times more."""
        before = self.looks.count(job_id)

        async def done() -> bool:
            return self.looks.count(job_id) >= before + count

        await until(done, f"looks at {job_id}")


def put(directory: Path, job_id: str, phase: str) -> None:
    metadata = directory / job_id / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "progress.json").write_bytes(documents.dump(Progress(job_id=job_id, phase=phase)))


def test_a_job_whose_files_have_gone_is_watched_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        files = Counted(tmp_path)
        watch = Watch(files)
        for job_id in ("stays-1", "goes-1"):
            put(tmp_path, job_id, "running")
        for job_id in ("stays-1", "goes-1", "comes-1"):
            watch.add(job_id)
        moves = watch.moves()
        assert {(await anext(moves)).job_id, (await anext(moves)).job_id} == {"stays-1", "goes-1"}
        shutil.rmtree(tmp_path / "goes-1")
        more = asyncio.create_task(anext(moves))
        await files.rounds("stays-1", 2)
        files.looks.clear()
        await files.rounds("stays-1", 2)
        assert set(files.looks) == {"stays-1", "comes-1"}
        put(tmp_path, "comes-1", "running")
        assert (await more).job_id == "comes-1"

    asyncio.run(main())


def test_an_end_that_cannot_be_read_is_told_later(tmp_path: Path) -> None:
    """For want of file descriptors, say."""

    async def main() -> Observation:
        files = Counted(tmp_path)
        watch = Watch(files)
        put(tmp_path, "a-1", "running")
        watch.add("a-1")
        moves = watch.moves()
        assert (await anext(moves)).phase is Phase.RUNNING
        metadata = tmp_path / "a-1" / "metadata"
        result = Result(job_id="a-1", state="COMPLETE", start_time="", end_time="")
        (metadata / "result.json").write_bytes(documents.dump(result))
        (metadata / "next").write_bytes(documents.dump(Progress(job_id="a-1", phase="done")))
        more = asyncio.create_task(anext(moves))
        with no_more_descriptors():
            (metadata / "next").rename(metadata / "progress.json")
            await files.rounds("a-1", 3)
            assert not more.done()
        return await more

    seen = asyncio.run(main())
    assert (seen.phase, seen.result and seen.result.state) == (Phase.ENDED, "COMPLETE")
