"""Several sites at once: all their tasks end well, no site is ever fuller than it may be, and one of them may die.

TESP_SITES_TASKS changes how many tasks there are.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.carried import PLACES, Carried, containers
from tests.engine import IMAGE
from tests.running import FINAL, until

pytestmark = [pytest.mark.acceptance, pytest.mark.service, pytest.mark.timeout(1500)]

TASKS = int(os.environ.get("TESP_SITES_TASKS", "45"))
MAX_JOBS = 3
SITES = [each for each in ("rest", "amqp", "relay") if each in PLACES]


def test_sites_share_the_load_within_their_capacities_and_outlive_a_kill(tmp_path: Path) -> None:
    with Carried(tmp_path / "c", *SITES, max_jobs=MAX_JOBS) as running:
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(running.service.post, (_task(running.shared, number) for number in range(TASKS))))
        watch = Watch(running)
        watch.start()
        victim = running.places[-1]
        until(lambda: _done(running) >= TASKS // 3, 600, "a third of the tasks")
        assert victim.kill_pulsar()
        at_kill = _done(running)
        until(lambda: _done(running) >= min(TASKS, at_kill + 6), 600, "the other sites go on")
        victim.start_pulsar()
        until(lambda: _done(running) == TASKS, 1200, "all ends")
        watch.stop()
        documents = [running.service.get(each) for each in ids]
        assert Counter(each["state"] for each in documents) == {"COMPLETE": TASKS}
        spans = _spans((running.shared / "ran").read_text())
        assert Counter(span.name for span in spans) == {str(number): 1 for number in range(TASKS)}
        by_site = defaultdict(list)
        for span in spans:
            by_site[_site_of(documents[int(span.name)])].append(span)
        print({name: len(each) for name, each in by_site.items()}, "most at once, as told:", watch.most)
        assert by_site.keys() == set(SITES), "a site was never used"
        for name, each in by_site.items():
            assert most_at_once(each) <= MAX_JOBS, name
        assert watch.most.keys() == set(SITES)
        assert all(most <= MAX_JOBS for most in watch.most.values()), watch.most
        until(lambda: not any(map(containers, ids)), 60, "no container of ours")


def _task(shared: Path, number: int) -> dict[str, Any]:
    """It leaves one line that says when it ran: its start, and at its end the end."""
    script = (
        "read -r began rest < /proc/uptime; sleep 0.5; read -r ended rest < /proc/uptime; "
        f'echo "{number} $began $ended" >> /shared/ran'
    )
    return {
        "name": str(number),
        "inputs": [{"url": str(shared), "path": "/shared", "type": "DIRECTORY"}],
        "executors": [{"image": IMAGE, "command": ["sh", "-c", script]}],
    }


def _done(running: Carried) -> int:
    return sum(state in FINAL for state in running.service.states().values())


def _site_of(document: dict[str, Any]) -> str:
    return str(document["logs"][-1]["metadata"]["site"])


class Span:
    """When an executor ran, by the machine's uptime."""

    def __init__(self, line: str) -> None:
        self.name, began, ended = line.split()
        self.began, self.ended = float(began), float(ended)


def _spans(text: str) -> list[Span]:
    return [Span(line) for line in text.splitlines()]


def most_at_once(spans: Sequence[Span]) -> int:
    """The largest number of spans that overlap; an end counts before a start of the same moment."""
    moves = sorted([(span.began, 1) for span in spans] + [(span.ended, -1) for span in spans])
    most = now = 0
    for _, step in moves:
        now += step
        most = max(most, now)
    return most


class Watch(threading.Thread):
    """Looks again and again at what the service says of its sites."""

    def __init__(self, running: Carried) -> None:
        super().__init__(daemon=True)
        self._running, self._over = running, threading.Event()
        self.most: dict[str, int] = {}
        """The most jobs that each site was seen with."""

    def run(self) -> None:
        while not self._over.is_set():
            for site in self._running.service.http.get("/tesp/v1/sites").json()["sites"]:
                self.most[site["name"]] = max(self.most.get(site["name"], 0), site["load"]["jobs"])
            time.sleep(0.2)

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self.join()
