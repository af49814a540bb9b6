"""Nothing lost, nothing run twice: everything is killed, paused and cut off, again and again, while tasks come and run.

What happens follows from a seed. TESP_CHAOS_SEED, TESP_CHAOS_TASKS and TESP_CHAOS_FAULTS change a run; TESP_CHAOS=long
adds the long ones.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import mongod
from tests.carried import PLACES
from tests.chaos import COSTS_AN_ATTEMPT, ON_JOBS, ON_REPLICAS, ON_STORE, Cluster, Storm, draw, settle
from tests.chaos_work import Posters, Verdict, works
from tests.engine import docker_host
from tests.running import FINAL, until
from tests.support import require

pytestmark = [pytest.mark.acceptance, pytest.mark.service]

STALL = 150.0
"""Seconds without any progress after which a run is given up."""


def _number(name: str, usual: int) -> int:
    return int(os.environ.get(f"TESP_CHAOS_{name}", usual))


@contextmanager
def _named(seed: int, storm: Storm) -> Iterator[None]:
    """Whatever goes wrong inside names the seed, and what had happened until then."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"TESP_CHAOS_SEED={seed}\n" + "\n".join(storm.story))
        raise


def _survive(directory: Path, store: str, carrier: str, seed: int, tasks: int, count: int) -> None:
    """One run: post, break, repair, wait, judge."""
    require(docker_host(), "no Docker engine with busybox")
    if store == "mongo":
        mongod.need()
    seed, tasks, count = _number("SEED", seed), _number("TASKS", tasks), _number("FAULTS", count)
    print(f"TESP_CHAOS_SEED={seed} TESP_CHAOS_TASKS={tasks} TESP_CHAOS_FAULTS={count} {store} {carrier}", flush=True)
    began = time.monotonic()
    cluster = Cluster(directory / "c", store, carrier=carrier)
    storm = Storm(cluster)
    with _named(seed, storm), cluster, storm:
        every = works(seed, tasks, cluster.shared)
        posters = Posters(cluster, every)
        posters.start()
        try:
            kinds = (*ON_REPLICAS, *ON_JOBS, *(ON_STORE if store == "mongo" else ()))
            for fault in draw(seed, count, tasks, cluster.place, kinds):
                _until_ended(cluster, posters, fault.at)
                time.sleep(fault.delay)
                storm.befall(fault)
            _until_ended(cluster, posters, tasks)
        finally:
            posters.stop()
        settle(cluster, storm)
        verdict = Verdict(cluster, every, posters.acknowledged)
        verdict.find()
        _report(storm, posters, verdict, time.monotonic() - began)
        assert posters.done
        assert not verdict.wrong, f"seed {seed}:\n" + "\n".join(verdict.wrong) + "\n" + verdict.about()
        assert sum(storm.done.values()) >= 0.8 * count, f"seed {seed}: too few faults found somebody: {storm.missed}"
        cluster.stop()


def _until_ended(cluster: Cluster, posters: Posters, number: int) -> None:
    """Wait until so many tasks have ended."""
    seen, changed = posters.ended, time.monotonic()
    while posters.ended < number:
        assert not posters.errors, posters.errors
        if posters.ended != seen:
            seen, changed = posters.ended, time.monotonic()
        if time.monotonic() - changed > STALL:
            states = cluster.states()
            still = [cluster.task(task_id) for task_id in states if states[task_id] not in FINAL]
            raise AssertionError(f"{seen} of {number} tasks ended, then nothing for {STALL:.0f} s: {still}")
        time.sleep(0.02)


def _report(storm: Storm, posters: Posters, verdict: Verdict, seconds: float) -> None:
    states = Counter(document["state"] for document in verdict.documents.values())
    retried = verdict.retried()
    hit = {job_id for job_id, kind in storm.victims.items() if kind in COSTS_AN_ATTEMPT}
    print(f"{seconds:.0f} s, {dict(states)}, {posters.repeats} creates repeated, missed {dict(storm.missed)}")
    print(f"faults {sum(storm.done.values())}: {dict(storm.done)}")
    print(f"failed attempts {len(retried)}, of jobs that were hit {len(retried.keys() & hit)} of {len(hit)}")
    for job_id in sorted(retried.keys() - hit):
        print(f"  {job_id}: {retried[job_id]}")
    print(f"violations {len(verdict.wrong)}", flush=True)


STORES = {"local": "sqlite", "embedded": "mongo", "rest": "sqlite", "amqp": "mongo", "relay": "mongo"}
"""What each carrier is tried with when time is short."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("carrier", PLACES)
def test_16_tasks_survive_7_faults(tmp_path: Path, carrier: str) -> None:
    _survive(tmp_path, STORES[carrier], carrier, seed=1, tasks=16, count=7)


if os.environ.get("TESP_CHAOS") == "long":

    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("seed", [1, 2, 3])
    @pytest.mark.parametrize("store", ["mongo", "sqlite"])
    @pytest.mark.parametrize("carrier", PLACES)
    def test_300_tasks_survive_45_faults(tmp_path: Path, carrier: str, store: str, seed: int) -> None:
        _survive(tmp_path, store, carrier, seed, tasks=300, count=45)


@pytest.mark.timeout(300)
def test_no_acknowledged_create_is_lost_when_the_primary_dies_three_times(tmp_path: Path) -> None:
    mongod.need()
    acknowledged: list[tuple[float, str]] = []
    stopped = threading.Event()
    with Cluster(tmp_path / "c", "mongo", replicas=1, TESP_SERVER__ROLES='["api"]') as cluster:
        url = cluster.replicas[0].url

        def write() -> None:
            task = {"executors": [{"image": "busybox", "command": ["true"]}]}
            with httpx.Client(base_url=f"{url}/ga4gh/tes/v1", timeout=30) as client:
                while not stopped.is_set():
                    answer = client.post("/tasks", json=task)
                    if answer.status_code == 200:
                        acknowledged.append((time.monotonic(), answer.json()["id"]))

        assert cluster.set is not None
        writers = [threading.Thread(target=write) for _ in range(4)]
        for writer in writers:
            writer.start()
        try:
            for _ in range(3):
                _until_longer(acknowledged, 200)
                victim = cluster.set.primary()
                victim.kill()
                _until_longer(acknowledged, 50)
                victim.start()
                cluster.set.settle(60)
        finally:
            stopped.set()
            for writer in writers:
                writer.join()
        stored = set(cluster.replicas[0].states())
    times = sorted(moment for moment, _ in acknowledged)
    gap = max(after - before for before, after in itertools.pairwise(times))
    print(f"{len(times)} creates acknowledged, {len(stored)} stored, the longest gap {gap:.1f} s")
    assert {task_id for _, task_id in acknowledged} <= stored
    assert gap < 60


def _until_longer(growing: list[tuple[float, str]], by: int) -> None:
    enough = len(growing) + by
    until(lambda: len(growing) >= enough, 60, f"{by} more creates")
