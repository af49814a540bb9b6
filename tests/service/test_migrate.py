"""`tesp migrate`: from the embedded store to a real MongoDB, with nothing lost on the way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tesp_api.store import Query, TaskStore
from tesp_api.store.mongo import MongoStore
from tesp_api.store.sqlite import SqliteStore
from tesp_api.task import Task
from tesp_api.tes import TesState, TesView
from tests import mongod
from tests.builders import NOW, make_attempt, make_bodies, make_task, run
from tests.running import service, until

pytestmark = pytest.mark.service


@pytest.fixture
def uri() -> Iterator[str]:
    with mongod.database() as found:
        yield found


def migrate(directory: Path, uri: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tesp_api", "migrate", "--to", uri, "--data-dir", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])


def some_tasks() -> list[Task]:
    """One in each state, with everything that a task can have."""
    tasks = []
    for number, state in enumerate(TesState):
        task = make_task(name=f"n{number}", owner="o", tags={"a.b": "$", "n": str(number)})
        bodies = make_bodies(
            {0: "content"}, {(1, 0, "stdout"): "out\0é", (2, 0, "stderr"): ""}, {0: ["x"], 2: ["y", "z"]}
        )
        attempts = (
            make_attempt(task.id, ended=NOW, abandoned=True),
            make_attempt(task.id, 2, site="b", heard=NOW + 0.123),
        )
        record = {"state": state, "attempts": attempts, "bodies": bodies, "version": 7, "due_at": NOW + number}
        tasks.append(replace(task, **record))  # type: ignore[arg-type]
    return tasks


async def everything(store: TaskStore) -> dict[str, Task]:
    return {task.id: task for task in (await store.page(Query(limit=2000), TesView.FULL)).tasks}


def fill(path: Path, tasks: list[Task]) -> None:
    async def go() -> None:
        async with SqliteStore(path) as store:
            await asyncio.gather(*(store.add(task) for task in tasks))

    run(go())


async def at(uri: str) -> dict[str, Task]:
    async with MongoStore(uri) as store:
        return await everything(store)


def test_every_task_arrives_as_it_was(tmp_path: Path, uri: str) -> None:
    tasks = some_tasks() + [make_task(name=str(n)) for n in range(120)]
    fill(tmp_path / "tasks.sqlite", tasks)
    done = migrate(tmp_path, uri)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{len(tasks)} tasks moved.")
    assert run(at(uri)) == {task.id: task for task in tasks}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tasks.sqlite.moved"]
    again = migrate(tmp_path, uri)
    assert (again.returncode, "does not exist" in again.stderr) == (2, True)


def test_it_may_be_repeated(tmp_path: Path, uri: str) -> None:
    """What an interrupted one has moved is left as it is by now."""
    tasks = some_tasks()
    fill(tmp_path / "tasks.sqlite", tasks)

    async def half() -> None:
        async with MongoStore(uri) as store:
            for task in tasks[:4]:
                await store.add(task)

    run(half())
    done = migrate(tmp_path, uri)
    assert done.returncode == 0, done.stderr
    assert f"{len(tasks) - 4} tasks moved, 4 were there already" in done.stdout
    assert run(at(uri)) == {task.id: task for task in tasks}


def test_not_while_the_service_runs(tmp_path: Path, uri: str) -> None:
    with service(tmp_path, CONTAINER_TYPE="host") as running:
        task_id = running.post({"executors": [{"image": "none", "command": ["true"]}]})
        done = migrate(tmp_path / "data", uri)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "database is locked" in done.stderr
        assert running.end(task_id)["state"] == "COMPLETE", "and the service goes on"
    assert run(at(uri)) == {}
    until(lambda: migrate(tmp_path / "data", uri).returncode == 0, 10)
    assert set(run(at(uri))) == {task_id}


@pytest.mark.parametrize("bad", ["mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=300", "http://x", ""])
def test_a_store_that_is_not_there(tmp_path: Path, bad: str) -> None:
    fill(tmp_path / "tasks.sqlite", some_tasks())
    done = migrate(tmp_path, bad)
    assert done.returncode == 2
    assert "The tasks were not moved: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "tasks.sqlite").exists()
