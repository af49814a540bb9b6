"""Tasks like those that workflow engines leave behind: the same mixture for any number of them."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tesp_api.task import FINAL, Attempt, Bodies, Task, job_id, new_task, rfc3339
from tesp_api.tes import TesState, TesTask, TesTaskLog

YEAR = 365 * 86400.0

STATES = (
    # of 1,000 tasks; 99 % are over
    (TesState.COMPLETE, 930),
    (TesState.EXECUTOR_ERROR, 30),
    (TesState.CANCELED, 20),
    (TesState.SYSTEM_ERROR, 9),
    (TesState.PREEMPTED, 1),
    (TesState.QUEUED, 5),
    (TesState.RUNNING, 2),
    (TesState.INITIALIZING, 1),
    (TesState.CANCELING, 1),
    (TesState.PAUSED, 1),
)
_STATE_OF = [state for state, share in STATES for _ in range(share)]

PROCESSES = ("STAR_ALIGN", "SALMON_QUANT", "TRIMGALORE", "SAMTOOLS_SORT", "PICARD_MARKDUPLICATES", "FASTQC")

SPEC = TesTask.model_validate(
    {
        "name": "",
        "inputs": [
            {"url": "/data/work/3a/9f0c1d/.command.sh", "path": "/work/.command.sh", "type": "FILE"},
            {"url": "/data/work/3a/9f0c1d/.command.run", "path": "/work/.command.run", "type": "FILE"},
            {"url": "/data/in/reads.fq", "path": "/work/reads.fq", "type": "FILE"},
        ],
        "outputs": [
            {"url": "/data/work/3a/9f0c1d/.command.out", "path": "/work/.command.out", "type": "FILE"},
            {"url": "/data/work/3a/9f0c1d/.exitcode", "path": "/work/.exitcode", "type": "FILE"},
        ],
        "resources": {"cpu_cores": 2, "ram_gb": 4.0},
        "executors": [
            {"image": "quay.io/nextflow/bash", "command": ["bash", "-c", "bash /work/.command.run"], "workdir": "/work"}
        ],
        "tags": {},
    }
)


@dataclass(frozen=True)
class Mixture:
    """What is in a store of `total` tasks. Where a share would be too few for a page, it is more in a small store."""

    total: int

    @property
    def oldest(self) -> int:
        """How many begin with PILOT_: a tenth, all of them the oldest."""
        return max(300, self.total // 10)

    @property
    def middle(self) -> int:
        """How many begin with MULTIQC, evenly spread: about one in a hundred, neither few nor many."""
        return max(450, self.total // 100)

    def name(self, number: int) -> str:
        """The name of a task; 20 of them begin with HOTFIX_."""
        sample = _pick("sample", number, self.total)
        if number < self.oldest:
            return f"PILOT_{PROCESSES[number % 6]} (S{sample})"
        if number % (self.total // 20) == 17:
            return f"HOTFIX_{number}"
        if _pick("name", number, self.total) < self.middle:
            return f"MULTIQC (S{sample})"
        return f"NFCORE_RNASEQ:RNASEQ:{PROCESSES[number % 6]} (S{sample})"

    def tags(self, number: int) -> dict[str, str]:
        """Three tags: one in three tasks has the project alpha, one in 40 the branch fix; a run is 50 tasks."""
        return {
            "project": ("alpha", "beta", "gamma")[_pick("project", number, 3)],
            "branch": "fix" if _pick("branch", number, 40) == 0 else "main",
            "run": f"run-{number // 50}",
        }

    def state(self, number: int) -> TesState:
        """As STATES says."""
        return _STATE_OF[_pick("state", number, 1000)]

    def owner(self, number: int) -> str:
        """One in ten belongs to bob."""
        return "bob" if _pick("owner", number, 10) == 0 else "alice"

    def tasks(self) -> Iterator[Task]:
        """All of them, the oldest first, over one year that ended a minute ago."""
        start, step = time.time() - 60 - YEAR, YEAR / self.total
        for number in range(self.total):
            yield self._task(number, start + number * step)

    def _task(self, number: int, created: float) -> Task:
        spec = SPEC.model_copy(update={"name": self.name(number), "tags": self.tags(number)})
        task = new_task(spec, owner=self.owner(number), now=created)
        state = self.state(number)
        final = state in FINAL
        under_way = task if state is TesState.QUEUED else replace(task, attempts=(_attempt(task, final),))
        due_at = None if final else created + 100 * YEAR  # nothing is due while it is measured
        done = replace(under_way, state=state, due_at=due_at, bodies=_bodies(number, state))
        done.__dict__["spec"] = spec
        return done


def _pick(what: str, number: int, of: int) -> int:
    """A number below `of`, as if thrown, and the same every time."""
    return zlib.crc32(f"{what} {number}".encode()) % of


def _attempt(task: Task, final: bool) -> Attempt:
    times = {"start_time": rfc3339(task.created + 2), **({"end_time": rfc3339(task.created + 600)} if final else {})}
    log = {
        "logs": [{**times, "exit_code": 0}] if final else [],
        "outputs": [
            {"url": "/data/work/3a/9f0c1d/.command.out", "path": "/work/.command.out", "size_bytes": "1234"},
            {"url": "/data/work/3a/9f0c1d/.exitcode", "path": "/work/.exitcode", "size_bytes": "1"},
        ],
        **times,
    }
    return Attempt(
        number=1,
        job_id=job_id(task.id, 1),
        site="embedded",
        assigned=task.created,
        submitted=task.created + 1,
        heard=task.created + 600,
        beat=60,
        ended=task.created + 600 if final else None,
        forgotten=final,
        log=TesTaskLog.model_validate(log),
    )


def _bodies(number: int, state: TesState) -> Bodies:
    """One in four has printed something, one in ten had a script as content, failures have a line."""
    return Bodies(
        contents={0: "#!/bin/bash\nset -e\necho hello\n" * 8} if number % 10 == 0 else {},
        streams={(1, 0, "stdout"): "processed 1000 reads\n" * 20} if number % 4 == 0 else {},
        system={1: ["The executor ended with exit code 1."]} if state is TesState.EXECUTOR_ERROR else {},
    )


__all__ = ["SPEC", "STATES", "Mixture"]
