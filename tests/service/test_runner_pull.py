"""Images from a real registry."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import job
from tests import engine
from tests.registry import Registry, Throttle, docker
from tests.runner_jobs import Job, executor, until

pytestmark = pytest.mark.service

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    made = Registry(tmp_path_factory.mktemp("registry"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def closed_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One that asks for a password; `config` holds it, as `docker login` writes it."""
    made = Registry(tmp_path_factory.mktemp("closed"), "me", "s3cret:\u00fc")
    auth = base64.b64encode("me:s3cret:\u00fc".encode()).decode()
    made.config.mkdir()
    (made.config / "config.json").write_text(json.dumps({"auths": {f"127.0.0.1:{made.port}": {"auth": auth}}}))
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(image: str, *command: str, pull: str = "missing", **plan: Any) -> Job:
        plan["runtime"] = job.Runtime("docker", docker_host=engine.docker_host(), pull=pull)
        plan["executors"] = [executor(*(command or ("true",)), image=image)]
        return Job(tmp_path, plan)

    return made


def present(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0


@pytest.mark.parametrize("prefix", ["", "docker://"])
def test_a_missing_image_is_pulled(registry: Registry, make: Make, prefix: str) -> None:
    image = registry.push()
    assert not present(image)
    result = make(prefix + image, "wc", "-c", "/unique").run()
    assert (result.state, result.system_logs, result.executors[0].stdout) == ("COMPLETE", [], "2000000 /unique\n")
    assert present(image)


def test_an_unknown_tag_is_named_with_the_registrys_words(registry: Registry, make: Make) -> None:
    image = registry.push().replace(":v1", ":v2")
    result = make(image).run()
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert image in result.system_logs[0]
    assert "manifest unknown" in result.system_logs[0]
    result = make(f"127.0.0.1:{registry.port}/tesp-test/none").run()
    assert "manifest unknown" in result.system_logs[0] or "not found" in result.system_logs[0]


@pytest.mark.parametrize("tagged", [False, True])
def test_an_image_by_its_digest(registry: Registry, make: Make, tagged: bool) -> None:
    image = registry.push()
    docker("pull", "-q", image)
    (digest,) = json.loads(docker("image", "inspect", "-f", "{{json .RepoDigests}}", image))
    docker("rmi", image)
    assert not present(digest)
    name = image + "@" + digest.partition("@")[2] if tagged else digest
    result = make(name).run()
    assert (result.state, result.system_logs) == ("COMPLETE", [])
    bad = digest[:-4] + ("0000" if digest[-4:] != "0000" else "1111")
    result = make(bad).run()
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert bad in result.system_logs[0]


def test_pull_never(registry: Registry, make: Make) -> None:
    image = registry.push()
    result = make(image, pull="never").run()
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert "pulling is switched off" in result.system_logs[0]
    docker("pull", "-q", image)
    assert make(image, pull="never").run().state == "COMPLETE"


@pytest.mark.parametrize("place", ["DOCKER_CONFIG", "HOME"])
def test_a_registry_with_a_password(closed_registry: Registry, make: Make, tmp_path: Path, place: str) -> None:
    image = closed_registry.push(config=str(closed_registry.config))
    (tmp_path / "home").mkdir()
    result = make(image).run(env={"HOME": str(tmp_path / "home")})
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert image in result.system_logs[0]
    assert "no basic auth credentials" in result.system_logs[0]
    assert "docker login" in result.system_logs[0]
    if place == "HOME":
        (tmp_path / "home" / ".docker").symlink_to(closed_registry.config)
        env = {"HOME": str(tmp_path / "home")}
    else:
        env = {"HOME": str(tmp_path / "home"), "DOCKER_CONFIG": str(closed_registry.config)}
    result = make(image).run(env=env)
    assert (result.state, result.system_logs) == ("COMPLETE", [])


@pytest.mark.parametrize(
    "config",
    [
        '{"auths": {"HOST": {"auth": "bWU6d3Jvbmc="}}}',
        '{"auths": {"HOST": {"auth": 5}}}',
        '{"auths": {"HOST": {"auth": "\u00fc"}}}',
        '{"auths": []}',
        '{"auths": {"HOST": []}}',
        "[]",
        "nonsense",
    ],
)
def test_bad_credentials(closed_registry: Registry, make: Make, tmp_path: Path, config: str) -> None:
    image = f"127.0.0.1:{closed_registry.port}/tesp-test/x:v1"
    (tmp_path / "config.json").write_text(config.replace("HOST", f"127.0.0.1:{closed_registry.port}"))
    result = make(image).run(env={"DOCKER_CONFIG": str(tmp_path)})
    assert (result.state, result.started) == ("SYSTEM_ERROR", False)
    assert f"executors[0].image: '{image}' cannot be pulled" in result.system_logs[0]
    assert "wrong" not in json.dumps(result.system_logs)


def test_two_jobs_pull_the_same_image_at_once(registry: Registry, make: Make) -> None:
    way = Throttle(registry.port, 200_000)
    try:
        image = registry.push(port=way.port)
        jobs = [make(image).start(), make(image).start()]
        assert way.held.wait(30)
        way.open.set()
        for made in jobs:
            assert made.wait() == 0
            assert (made.result().state, made.result().system_logs) == ("COMPLETE", [])
    finally:
        way.close()


def test_cancel_during_a_pull(registry: Registry, make: Make) -> None:
    way = Throttle(registry.port, 200_000)
    try:
        image = registry.push(port=way.port)
        made = make(image).start()
        assert way.held.wait(30)
        made.cancel()
        assert made.wait() == 0
        assert (made.result().state, made.result().started, made.result().system_logs) == ("CANCELED", False, [])
        assert not present(image)  # the engine itself may take its time to give up, as it does with its own client
        assert docker("ps", "-aq", "--filter", f"label=tesp.job={made.id}") == ""
    finally:
        way.close()


def test_killed_during_a_pull(registry: Registry, make: Make) -> None:
    way = Throttle(registry.port, 200_000)
    try:
        image = registry.push(port=way.port)
        made = make(image).start()
        assert way.held.wait(30)
        made.kill()
        until(made.has_result)
        assert (made.result().state, made.result().started) == ("SYSTEM_ERROR", False)
        way.open.set()
        assert docker("ps", "-aq", "--filter", f"label=tesp.job={made.id}") == ""
    finally:
        way.close()
