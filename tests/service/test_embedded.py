"""The embedded Pulsar: its life as a child process, through the death of everybody involved."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tesp_api.errors import SiteUnavailable
from tesp_api.sites import SiteFacts
from tesp_api.sites.processes import Process
from tesp_api.sites.pulsar.embedded import EmbeddedPulsar, EmbeddedSite
from tests import standin
from tests.pulsars import ended, exists, forgotten, new_plan, running, until
from tests.support import no_more_descriptors, require

pytestmark = pytest.mark.service

FACTS = SiteFacts(name="embedded")


@pytest.fixture(autouse=True)
def installed() -> None:
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")


def embedded(directory: Path) -> EmbeddedSite:
    return EmbeddedSite(FACTS, directory, standin.bundle())


async def run_one(site: EmbeddedSite, *command: str) -> str:
    plan = new_plan(*(command or ("echo", "hello")))

    async def submitted() -> bool:
        try:
            await site.submit(plan)
        except SiteUnavailable:
            return False
        return True

    await until(submitted, "the submit")
    seen = await ended(site, plan.job_id)
    await forgotten(site, plan.job_id)
    assert seen.result is not None
    return seen.result.executors[0].stdout


def noted(directory: Path) -> int:
    pid: int = json.loads((directory / "pulsar.pid").read_text())["pid"]
    return pid


async def gone(process: Process | None) -> None:
    async def look() -> bool:
        return process is None or not process.alive

    await until(look, "the end of a process")


_PARENT = """
import asyncio, sys
from pathlib import Path
from tesp_api.sites.pulsar.embedded import EmbeddedPulsar

async def main():
    async with EmbeddedPulsar(Path(sys.argv[1])) as pulsar:
        await pulsar.ready(30)
        print("ready", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def other_service(directory: Path) -> subprocess.Popen[str]:
    """Another process that keeps an embedded Pulsar in the directory; it answers now."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(directory)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    return parent


def test_it_starts_runs_and_stops(tmp_path: Path) -> None:
    async def main() -> None:
        directory = tmp_path / "e"
        loop = asyncio.get_running_loop()
        before = loop.time()
        async with embedded(directory) as site:
            entered = loop.time() - before
            seen = await run_one(site, sys.executable, "-c", "import os; print(os.environ['PATH'], os.environ['HOME'])")
            assert entered < (loop.time() - before) / 2  # it boots while the service goes on
            path, home = seen.split()
            assert path.startswith(str(Path(sys.executable).parent))
            assert Path(home).resolve() == directory.resolve()
            server = Process.of(noted(directory))
            assert server is not None
            assert os.getsid(server.pid) == server.pid  # no Ctrl-C of ours reaches it
            modes = {name: (directory / name).stat().st_mode & 0o777 for name in (".", "token", "server.ini")}
            assert modes == {".": 0o700, "token": 0o600, "server.ini": 0o600}
        assert not server.alive
        with pytest.raises(SiteUnavailable):
            await site.observe(["a-1"])

    asyncio.run(main())


def test_it_inherits_no_sockets_of_the_service(tmp_path: Path) -> None:
    async def main() -> None:
        listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        os.set_inheritable(listener.sockets[0].fileno(), True)
        inode = os.fstat(listener.sockets[0].fileno()).st_ino
        async with EmbeddedPulsar(tmp_path) as pulsar:
            await pulsar.ready(30)
            links = [os.fspath(each.readlink()) for each in Path(f"/proc/{pulsar.pid}/fd").iterdir()]
            assert f"socket:[{inode}]" not in links
        listener.close()

    asyncio.run(main())


def test_it_is_started_again_when_it_dies_and_jobs_live_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with embedded(tmp_path) as site:
            await run_one(site)
            release = tmp_path / "release"
            plan = new_plan("sh", "-c", f"while [ ! -e {release} ]; do sleep 0.02; done")
            await site.submit(plan)
            await running(site, plan.job_id)
            first = Process.of(noted(tmp_path))
            assert first is not None
            os.killpg(first.pid, signal.SIGKILL)
            await gone(first)

            async def anew() -> bool:
                return site.pulsar.pid not in (None, first.pid)

            await until(anew, "a new server")
            assert await run_one(site) == "hello\n"
            release.touch()
            await ended(site, plan.job_id)

    asyncio.run(main())


def test_a_moment_without_file_descriptors_is_no_death(tmp_path: Path) -> None:
    async def main() -> None:
        async with embedded(tmp_path) as site:
            await run_one(site)
            first = Process.of(noted(tmp_path))
            assert first is not None
            with no_more_descriptors():
                await asyncio.sleep(0.5)  # it is looked at several times
            await site.pulsar.ready(0)
            assert site.pulsar.pid == first.pid
            assert await run_one(site) == "hello\n"
            os.killpg(first.pid, signal.SIGKILL)

            async def anew() -> bool:
                return site.pulsar.pid not in (None, first.pid)

            await until(anew, "a new server")  # it is still watched over
            assert await run_one(site) == "hello\n"

    asyncio.run(main())


def test_a_worker_that_outlives_its_master_makes_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with embedded(tmp_path) as site:
            await run_one(site)
            first = site.pulsar.pid
            assert first is not None
            _, writer = await asyncio.open_unix_connection(site.pulsar.socket)
            writer.write(b"GET /jobs HTTP/1.1\r\n")  # a worker on its way out waits for such a connection
            await writer.drain()
            os.kill(first, signal.SIGKILL)

            async def anew() -> bool:
                return site.pulsar.pid not in (None, first)

            await until(anew, "a new server")
            assert await run_one(site) == "hello\n"
            writer.close()

    asyncio.run(main())


def test_what_a_killed_service_leaves_is_adopted(tmp_path: Path) -> None:
    parent = other_service(tmp_path)
    server = Process.of(noted(tmp_path))
    parent.kill()
    parent.communicate()
    assert server is not None
    assert server.alive

    async def main() -> None:
        async with embedded(tmp_path) as site:
            await run_one(site)
            assert site.pulsar.pid == server.pid
        assert not server.alive

    asyncio.run(main())


def test_it_is_adopted_even_if_the_note_of_it_is_lost(tmp_path: Path) -> None:
    parent = other_service(tmp_path)
    server = Process.of(noted(tmp_path))
    parent.kill()
    parent.communicate()
    (tmp_path / "pulsar.pid").unlink()
    assert server is not None

    async def main() -> None:
        async with embedded(tmp_path) as site:
            await run_one(site)
            assert site.pulsar.pid == server.pid

    asyncio.run(main())


def test_a_dead_note_harms_nobody(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    (tmp_path / "pulsar.pid").write_text(json.dumps({"pid": bystander.pid, "start": 1}))

    async def main() -> None:
        async with embedded(tmp_path) as site:
            await run_one(site)

    asyncio.run(main())
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_second_service_uses_it_and_takes_over(tmp_path: Path) -> None:
    parent = other_service(tmp_path)
    server = Process.of(noted(tmp_path))

    async def main() -> None:
        async with embedded(tmp_path) as site:
            assert await run_one(site) == "hello\n"
            assert site.pulsar.pid is None  # not ours to watch over
            parent.kill()
            parent.communicate()

            async def ours() -> bool:
                return site.pulsar.pid is not None

            await until(ours, "the take-over")
            assert server is not None
            assert site.pulsar.pid == server.pid
            assert await run_one(site) == "hello\n"
        assert not server.alive

    asyncio.run(main())


@pytest.mark.parametrize("name", ["a space and 'more' $HOME %s", "long/" * 30 + "end", "ünicode"])
def test_directories_that_pulsar_or_sockets_could_not_bear(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        directory = tmp_path / name
        for _ in range(2):
            async with embedded(directory) as site:
                assert await run_one(site) == "hello\n"
                alias = Path(site.pulsar.socket).parent
                assert alias != directory
                assert alias.resolve() == directory.resolve()
                assert alias.parent.stat().st_mode & 0o077 == 0
        alias.unlink()
        alias.parent.rmdir()  # as what cleans /tmp would do
        async with embedded(directory) as site:
            assert await run_one(site) == "hello\n"
            alias = Path(site.pulsar.socket).parent
        alias.unlink()
        alias.parent.rmdir()

    asyncio.run(main())


def test_a_submit_at_once_waits_for_the_boot(tmp_path: Path) -> None:
    async def main() -> None:
        async with embedded(tmp_path) as site:
            plan = new_plan()
            await site.submit(plan)
            await ended(site, plan.job_id)

    asyncio.run(main())


def test_it_says_where_to_look_when_it_does_not_come_up(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "staging").write_text("no directory")
        async with EmbeddedPulsar(tmp_path) as pulsar:
            with pytest.raises(SiteUnavailable, match=r"pulsar\.log"):
                await pulsar.ready(0.1)
            await exists(tmp_path / "pulsar.log")

    asyncio.run(main())
