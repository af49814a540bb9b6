"""The whole app in this process, with its lifespan and settings; what becomes of tasks there is in test_tasks.py."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tesp_api.app import create_app
from tesp_api.errors import SettingsError
from tesp_api.settings import FileRootSettings, Settings, load
from tests.flow.tasks import create, get, sh, until
from tests.running import FINAL


def settings(directory: Path, **overrides: Any) -> Settings:
    site = {"name": "here", "carrier": "local", "runtime": "host", "file_roots": [str(directory)]}
    return load(environ={}, overrides={"server.data_dir": directory / "data", **overrides}).model_copy(
        update={"sites": Settings.model_validate({"sites": [site]}).sites}
    )


@asynccontextmanager
async def running(chosen: Settings) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(chosen)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tes") as client,
    ):
        yield client


def test_health_and_cors(tmp_path: Path) -> None:
    async def go() -> None:
        chosen = settings(tmp_path, **{"server.cors_origins": ["https://example.org"]})
        async with running(chosen) as client:
            assert (await client.get("/healthz")).json()["status"] == "ok"
            assert (await client.get("/readyz")).json() == {"status": "ready"}
            preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
            answer = await client.options("/ga4gh/tes/v1/tasks", headers=preflight)
            assert answer.headers["access-control-allow-origin"] == "https://example.org"
            answer = await client.get("/v1/tasks/none", headers={"Origin": "https://example.org"})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (404, "https://example.org")
            answer = await client.get("/v1/tasks", headers={"Origin": "https://other.example"})
            assert "access-control-allow-origin" not in answer.headers
        async with running(settings(tmp_path)) as client:
            answer = await client.get("/v1/tasks", headers={"Origin": "https://example.org"})
            assert "access-control-allow-origin" not in answer.headers

    asyncio.run(go())


def test_a_foreign_web_page_may_not_post(tmp_path: Path) -> None:
    async def go() -> None:
        chosen = settings(tmp_path, **{"server.cors_origins": ["https://friend.example"]})
        async with running(chosen) as client:
            body = json.dumps({"executors": [sh("true")]})
            headers = {"Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}  # asks no browser for leave
            for origin in ("https://evil.example", "null", "http://[x"):
                answer = await client.post("/v1/tasks", content=body, headers={**headers, "Origin": origin})
                assert (answer.status_code, answer.json()["status"]) == (403, 403)
            for origin in ("https://friend.example", "http://tes"):
                answer = await client.post("/v1/tasks", content=body, headers={**headers, "Origin": origin})
                assert answer.status_code == 200
            assert len((await client.get("/v1/tasks")).json()["tasks"]) == 2

    asyncio.run(go())


def test_file_roots_of_our_machine_are_made_or_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root, words in ((tmp_path / "file", "file root"), (Path("/proc/none"), "cannot be used")):
        chosen = settings(tmp_path)
        site = chosen.sites[0].model_copy(update={"file_roots": (FileRootSettings(path=str(root)),)})
        with pytest.raises(SettingsError, match=words):
            create_app(chosen.model_copy(update={"sites": (site,)}))
    site = site.model_copy(update={"file_roots": (FileRootSettings(path=str(tmp_path / "new" / "root")),)})
    create_app(chosen.model_copy(update={"sites": (site,)}))
    assert (tmp_path / "new" / "root").is_dir()


def test_the_log_tells_of_ends_and_of_silent_sites(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        away = {"name": "away", "carrier": "rest", "url": "http://127.0.0.1:9"}
        here = {"name": "here", "carrier": "local", "runtime": "host", "cancel_grace": 0.1}
        chosen = settings(tmp_path, **{"retry.max_attempts": 2, "retry.backoff": 0.1})
        sites = Settings.model_validate({"sites": [away, here]}).sites
        async with running(chosen.model_copy(update={"sites": sites})) as client:
            there = {"backend_parameters": {"site": "away"}}
            waiting = await create(client, resources=there, executors=[sh("true")])
            dies = {"backend_parameters": {"site": "here"}}
            task_id = await create(client, resources=dies, executors=[sh("kill -9 $PPID")])
            await until(client, task_id, FINAL.__contains__)
            again, end = [each.message for each in caplog.records if each.message.startswith("Task ")]
            assert f"Task {task_id} is tried again after attempt 1 (here): " in again
            assert f"Task {task_id} is SYSTEM_ERROR (here): " in end
            async with asyncio.timeout(60):
                while "takes no jobs" not in str(task := await get(client, waiting)):
                    await asyncio.sleep(0.01)
            (log,) = task["logs"]
            assert log["system_logs"][0].startswith("The task waits: the site 'away' takes no jobs now. Pulsar at ")
        silent = [each for each in caplog.records if "'away' does not answer" in each.message]
        assert [each.levelname for each in silent] == ["WARNING"]

    with caplog.at_level("INFO", "tesp_api"):
        asyncio.run(go())


def test_the_sites_are_shown(tmp_path: Path) -> None:
    async def go() -> None:
        away = {
            "name": "away",
            "carrier": "rest",
            "url": "http://user:s3cret@127.0.0.1:9",
            "private_token": "t0ken",
            "cpus": 8,
            "zones": ["eu"],
            "labels": {"GPU": "a100"},
            "batch": True,
            "queues": ["long"],
            "draining": True,
        }
        here = {"name": "here", "carrier": "local", "runtime": "host", "max_jobs": 3}
        sites = Settings.model_validate({"sites": [away, here]}).sites
        async with running(settings(tmp_path).model_copy(update={"sites": sites})) as client:
            async with asyncio.timeout(60):
                while True:
                    answer = await client.get("/tesp/v1/sites")
                    one, two = answer.json()["sites"]
                    if (one["health"], two["health"]) == ("down", "up"):
                        break
                    await asyncio.sleep(0.05)
            assert one.pop("last_error")["message"].startswith("Pulsar at http://127.0.0.1:9 cannot be reached")
            assert one == {
                "name": "away",
                "carrier": "rest",
                "health": "down",
                "capacity": {"cpus": 8.0},
                "load": {"jobs": 0, "cpus": 0.0, "ram_gb": 0.0},
                "zones": ["eu"],
                "labels": {"gpu": "a100"},
                "preemptible": False,
                "draining": True,
                "batch": True,
                "queues": ["long"],
            }
            assert two["capacity"] == {"max_jobs": 3}
            assert two["version"]
            assert "s3cret" not in answer.text
            assert "t0ken" not in answer.text
            info = (await client.get("/v1/service-info")).json()
            assert info["tesResources_backend_parameters"] == ["queue", "time_limit", "site"]
            document = (await client.get("/openapi.json")).json()
            assert document["paths"]["/tesp/v1/sites"]["servers"] == [{"url": "/"}]

    asyncio.run(go())


def test_not_ready_without_its_store(tmp_path: Path) -> None:
    async def go() -> None:
        app = create_app(settings(tmp_path))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tes") as client:
            answer = await client.get("/readyz")  # its lifespan has not begun
            assert answer.status_code == 503
            assert answer.json()["message"].startswith("Not ready: ")
            answer = await client.post("/v1/tasks", json={"executors": [sh("true")]})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")

    asyncio.run(go())


def test_hidden_canceling_and_service_info(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(settings(tmp_path)) as client:
            info = (await client.get("/ga4gh/tes/v1/service-info")).json()
            assert info["type"] == {"group": "org.ga4gh", "artifact": "tes", "version": "1.1.0"}
            assert info["storage"] == [f"file://{tmp_path}/"]
            old = (await client.get("/v1/tasks/service-info")).json()
            assert set(old) == {"name", "doc", "storage"}
            assert (await client.get("/")).headers["location"] == "/docs"
            document = (await client.get("/openapi.json")).json()
            tes = {"/service-info", "/tasks", "/tasks/{id}", "/tasks/{id}:cancel"}
            assert set(document["paths"]) == tes | {"/tesp/v1/sites"}

    asyncio.run(go())


def test_importing_the_app_with_a_wrong_setting_says_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tesp_api.tesp_api"],
        env={"TESP_OAUTH__ENABLE": "true", "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("tesp-api cannot start: settings: oauth.enable")
    assert done.stderr.count("\n") == 1


def test_two_sites_of_one_name_are_refused(tmp_path: Path) -> None:
    site = {"name": "twice", "carrier": "local"}
    with pytest.raises(SettingsError, match="twice"):
        load(environ={"TESP_SITES": f"[{_toml(site)}, {_toml(site)}]"})


def _toml(values: dict[str, str]) -> str:
    return "{" + ", ".join(f'{key} = "{value}"' for key, value in values.items()) + "}"
