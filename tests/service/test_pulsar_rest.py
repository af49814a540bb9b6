"""The traps of a real Pulsar behind REST (pulsar.md), one by one."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import uvloop

from tesp_api.errors import SiteClosed, SiteRefused, SiteUnavailable
from tesp_api.runner.bundle import pseudo_job
from tesp_api.runner.job import EXIT_DAMAGED_RUNNER, EXIT_NO_RUNNER, Input
from tesp_api.sites import SiteFacts
from tesp_api.sites.pulsar import messages
from tesp_api.sites.pulsar.rest import CONTROLS, RestCarrier
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.task import Phase
from tests import standin
from tests.pulsars import Cutter, PulsarServer, ended, exists, forgotten, new_plan, phase, running, until
from tests.support import require

pytestmark = pytest.mark.service

RUNNER = standin.bundle()
FACTS = SiteFacts(name="there")


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")


@pytest.fixture(scope="module")
def server(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PulsarServer]:
    server = PulsarServer(tmp_path_factory.mktemp("pulsar"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[PulsarServer]:
    """A server that the test may kill."""
    server = PulsarServer(tmp_path / "pulsar")
    server.start()
    yield server
    server.stop()


def site_at(server: PulsarServer, *, port: int = 0, token: str = "", timeout: float = 10.0) -> PulsarSite:
    carrier = RestCarrier(
        f"http://127.0.0.1:{port or server.port}", private_token=token or server.token, timeout=timeout
    )
    return PulsarSite(FACTS, carrier, RUNNER)


async def raw(server: PulsarServer, method: str, path: str, **query: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.request(method, server.url + path, params={**query, "private_token": server.token})


def test_a_kill_that_pulsar_drops_while_it_stages_still_stops_the_job(server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("touch", str(tmp_path / "ran"))
            await raw(server, "POST", "/jobs", job_id=plan.job_id)  # set up, not launched: Pulsar cannot kill that
            (seen,) = await site.observe([plan.job_id])
            assert seen.phase is Phase.WAITING
            await site.cancel(plan.job_id, force=True)
            assert (await raw(server, "GET", f"/jobs/{plan.job_id}/status")).json()["status"] == "preprocessing"
            await site.submit(plan)  # its submit was on the way all the time
            done = await ended(site, plan.job_id)
            assert done.result is not None
            assert done.result.state == "CANCELED"
        assert not (tmp_path / "ran").exists()

    asyncio.run(main())


def test_a_cancel_waits_for_the_submit_under_way(server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("sh", "-c", f"sleep 1; touch {tmp_path / 'ran'}")
            submit = asyncio.create_task(site.submit(plan))
            await asyncio.sleep(0)  # it has the first turn
            await site.cancel(plan.job_id)
            assert submit.done()
            done = await ended(site, plan.job_id)
            assert done.result is not None
            assert done.result.state == "CANCELED"
        assert not (tmp_path / "ran").exists()

    asyncio.run(main())


@pytest.mark.parametrize("words", [b"/submit?", b"POST /jobs?", b"/files?name=job.json", b"/files?name=runner.pyz"])
def test_a_submit_whose_answer_is_lost_runs_once(server: PulsarServer, tmp_path: Path, words: bytes) -> None:
    async def main() -> None:
        witness = tmp_path / "witness"
        content = "x" * 10_000 if words == b"/files?name=job.json" else ""
        plan = new_plan("sh", "-c", f"echo once >> {witness}", inputs=[Input(path="/in", content=content)])
        async with Cutter(server.port) as cutter, site_at(server, port=cutter.port) as site:
            await raw(server, "DELETE", f"/jobs/{pseudo_job(RUNNER.sha256)}")
            cutter.cut = lambda request: words in request.split(b"\r\n")[0]
            with pytest.raises(SiteUnavailable, match="without an answer") as caught:
                await site.submit(plan)
            assert server.token not in str(caught.value)
            cutter.cut = lambda request: False
            await site.submit(plan)
            await ended(site, plan.job_id)
            await forgotten(site, plan.job_id)
        assert witness.read_text() == "once\n"

    asyncio.run(main())


def test_a_site_that_goes_away_in_the_middle_of_a_submit_has_heard_of_the_job(server: PulsarServer) -> None:
    """There is a directory to be cleaned up."""

    async def main() -> None:
        plan = new_plan(inputs=[Input(path="/in", content="x" * 10_000)])
        async with Cutter(server.port) as cutter, site_at(server, port=cutter.port) as site:
            await site.submit(new_plan())  # brings the runner

            def leave_after_set_up(request: bytes) -> bool:
                if request.startswith(b"POST /jobs?"):
                    cutter.close()
                return False

            cutter.cut = leave_after_set_up
            with pytest.raises(SiteUnavailable, match="cannot be reached") as caught:
                await site.submit(plan)
            assert not caught.value.unsent
            assert (server.staging / plan.job_id).exists()
            with pytest.raises(SiteUnavailable) as caught:
                await site.submit(new_plan())
            assert caught.value.unsent
        async with site_at(server) as site:
            assert await site.forget(plan.job_id, force=True)
        assert not (server.staging / plan.job_id).exists()

    asyncio.run(main())


def test_lost_answers_to_cancel_and_forget_can_be_repeated(server: PulsarServer) -> None:
    async def main() -> None:
        async with Cutter(server.port) as cutter, site_at(server, port=cutter.port) as site:
            plan = new_plan("sleep", "60")
            await site.submit(plan)
            await running(site, plan.job_id)
            cutter.cut = lambda request: b"answer.json" in request
            with pytest.raises(SiteUnavailable):
                await site.cancel(plan.job_id)
            cutter.cut = lambda request: False
            await site.cancel(plan.job_id)
            await ended(site, plan.job_id)
            cutter.cut = lambda request: request.startswith(b"DELETE")

            async def refused() -> bool:
                try:
                    return await site.forget(plan.job_id)
                except SiteUnavailable:
                    return True

            await until(refused, "a DELETE without an answer")
            cutter.cut = lambda request: False
            assert await site.forget(plan.job_id)
            assert (await site.observe([plan.job_id]))[0].phase is Phase.UNKNOWN

    asyncio.run(main())


def test_a_site_that_does_not_answer_is_unavailable_but_one_job_does_not_hide_the_others(server: PulsarServer) -> None:
    async def main() -> None:
        async with Cutter(server.port) as cutter, site_at(server, port=cutter.port) as site:
            good, bad = new_plan(), new_plan()
            await asyncio.gather(site.submit(good), site.submit(bad))
            await ended(site, good.job_id)
            cutter.cut = lambda request: bad.job_id.encode() in request
            seen = {each.job_id: each for each in await site.observe([good.job_id, bad.job_id])}
            assert seen[good.job_id].result is not None
            assert (seen[bad.job_id].phase, seen[bad.job_id].progress) == (Phase.RUNNING, None)
            assert "without an answer" in seen[bad.job_id].detail
            cutter.cut = lambda request: True
            with pytest.raises(SiteUnavailable, match="without an answer"):
                await site.observe([good.job_id, bad.job_id])

    asyncio.run(main())


def test_an_address_where_nobody_listens(server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server, port=1) as site:
            for call in (site.submit(new_plan()), site.observe(["a-1"]), site.cancel("a-1"), site.forget("a-1")):
                with pytest.raises(SiteUnavailable, match="cannot be reached"):
                    await call

    asyncio.run(main())


def test_a_server_that_never_answers(server: PulsarServer) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # until the client has had enough
            writer.close()
            closed.set()

        listener = await asyncio.start_server(stall, "127.0.0.1", 0)
        async with site_at(server, port=listener.sockets[0].getsockname()[1], timeout=0.2) as site:
            with pytest.raises(SiteUnavailable, match="in time"):
                await site.observe(["a-1"])
        await closed.wait()
        listener.close()

    asyncio.run(main())


# Pulsar's death


def test_results_are_found_after_pulsar_was_killed_and_restarted(own_server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(own_server) as site:
            release, started = tmp_path / "release", tmp_path / "started"
            while_down = new_plan("sh", "-c", f"echo 1 > {started}; while [ ! -e {release} ]; do sleep 0.02; done")
            after = new_plan("sh", "-c", f"while [ ! -e {release}2 ]; do sleep 0.02; done; echo late")
            before = new_plan("echo", "early")
            for plan in (before, while_down, after):
                await site.submit(plan)
            await running(site, after.job_id)
            await exists(started)
            own_server_job = own_server.staging / while_down.job_id / "metadata" / "result.json"

            await exists(own_server.staging / before.job_id / "metadata" / "result.json")
            own_server.kill()
            with pytest.raises(SiteUnavailable):
                await site.observe([before.job_id, while_down.job_id, after.job_id])
            release.touch()
            await exists(own_server_job)
            own_server.start()

            for plan in (before, while_down):
                seen = await ended(site, plan.job_id)
                assert seen.result is not None
                assert seen.result.state == "COMPLETE"
            seen = await phase(site, after.job_id, Phase.RUNNING)
            assert seen.progress is not None
            await site.submit(after)  # as a service would that was killed, too
            Path(f"{release}2").touch()
            seen = await ended(site, after.job_id)
            assert seen.result is not None
            assert seen.result.executors[0].stdout == "late\n"

            # Pulsar goes on to say `running`, so that only force clears up
            assert (await raw(own_server, "GET", f"/jobs/{after.job_id}/status")).json()["status"] == "running"
            assert not await site.forget(after.job_id)
            assert await site.forget(after.job_id, force=True)
            for plan in (before, while_down):
                await site.forget(plan.job_id, force=True)
            assert {each.name for each in own_server.staging.iterdir()} == {pseudo_job(RUNNER.sha256)}

    asyncio.run(main())


def test_a_job_that_outlived_pulsar_can_still_be_killed(own_server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(own_server) as site:
            plan = new_plan("sleep", "60", wishes="deaf")
            await site.submit(plan)
            await running(site, plan.job_id)
            own_server.kill()
            own_server.start()
            await site.cancel(plan.job_id, force=True)
            seen = await ended(site, plan.job_id)
            assert seen.result is not None
            assert seen.result.state == "CANCELED"
            assert await site.forget(plan.job_id, force=True)

    asyncio.run(main())


# The token


def test_a_wrong_token_is_named_and_no_token_is_ever_told(
    server: PulsarServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with caplog.at_level(logging.DEBUG):
            async with site_at(server, token="wr0ng-t0ken") as site:
                with pytest.raises(SiteClosed, match="private_token") as refused:
                    await site.submit(new_plan())
                with pytest.raises(SiteClosed, match="private_token"):
                    await site.observe(["a-1"])
                with pytest.raises(SiteClosed, match="private_token"):
                    await site.check()
            async with site_at(server) as site:
                assert await site.check() == importlib.metadata.version("pulsar-app")
                plan = new_plan("echo", "s3cret-plan")
                await site.submit(plan)
                await ended(site, plan.job_id)
                await forgotten(site, plan.job_id)
        assert "HTTP Request" in caplog.text  # httpx does log its requests
        told = caplog.text + repr(caplog.records) + str(refused.value) + repr(refused.value)
        for secret in ("wr0ng-t0ken", server.token, "s3cret-plan", "private_token="):
            assert secret not in told

    asyncio.run(main())


# The runner on the site


@pytest.mark.parametrize(
    ("damage", "codes"),
    [
        (lambda path: path.unlink(), {EXIT_NO_RUNNER}),
        (lambda path: path.write_bytes(path.read_bytes() + b"#"), {EXIT_DAMAGED_RUNNER}),
        (lambda path: path.write_bytes(b"PK\x03\x04\x00\xff"), {1}),
        (lambda path: path.write_bytes(b""), {EXIT_DAMAGED_RUNNER}),
    ],
    ids=["deleted", "changed", "truncated", "empty"],
)
def test_a_missing_or_damaged_runner_is_seen_and_sent_again(
    server: PulsarServer, damage: Callable[[Path], object], codes: set[int]
) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            first = new_plan()
            await site.submit(first)
            await ended(site, first.job_id)
            damage(server.staging / pseudo_job(RUNNER.sha256) / "inputs" / "runner.pyz")
            lost = [new_plan() for _ in range(3)]
            await asyncio.gather(*(site.submit(each) for each in lost))
            for each in lost:
                seen = await phase(site, each.job_id, Phase.ENDED)
                assert (seen.result, seen.exit_code in codes) == (None, True)
            again = new_plan()
            await site.submit(again)
            await ended(site, again.job_id)
            (seen,) = await site.observe([lost[0].job_id])  # old news: no reason to send it once more
            assert seen.exit_code in codes
            mark = (server.staging / pseudo_job(RUNNER.sha256) / "inputs" / "runner.pyz").stat().st_mtime_ns
            await site.submit(new_plan())
            assert (server.staging / pseudo_job(RUNNER.sha256) / "inputs" / "runner.pyz").stat().st_mtime_ns == mark

    asyncio.run(main())


def test_the_runner_is_sent_once_and_survives_a_cleaned_staging_directory(own_server: PulsarServer) -> None:
    async def main() -> None:
        runner = own_server.staging / pseudo_job(RUNNER.sha256) / "inputs" / "runner.pyz"
        async with site_at(own_server) as first, site_at(own_server) as second:
            plans = [new_plan() for _ in range(6)]
            await asyncio.gather(*(site.submit(each) for site in (first, second) for each in plans[:3]))
            await first.submit(plans[3])
            await ended(first, plans[3].job_id)
            mark = runner.stat().st_mtime_ns
            async with site_at(own_server) as third:
                await third.submit(plans[4])
                await ended(third, plans[4].job_id)
            assert runner.stat().st_mtime_ns == mark
            await raw(own_server, "DELETE", f"/jobs/{pseudo_job(RUNNER.sha256)}")
            await first.submit(plans[5])
            seen = await phase(first, plans[5].job_id, Phase.ENDED)
            assert seen.exit_code == EXIT_NO_RUNNER
            async with site_at(own_server) as third:  # another one finds it gone by itself
                plan = new_plan()
                await third.submit(plan)
                await ended(third, plan.job_id)
        assert "/files" not in own_server.log()  # no download of what is not there, which it would log as an error

    asyncio.run(main())


# The server's configuration


def test_a_server_that_assigns_ids_is_refused_and_left_clean(tmp_path: Path) -> None:
    server = PulsarServer(
        tmp_path / "p", app="managers:\n  _default_:\n    type: queued_python\n    assign_ids: uuid\n"
    )
    server.start()

    async def main() -> None:
        async with site_at(server) as site:
            with pytest.raises(SiteRefused, match="assign_ids"):
                await site.submit(new_plan())

    try:
        asyncio.run(main())
        assert list(server.staging.iterdir()) == []
    finally:
        server.stop()


def test_a_staging_directory_that_breaks_every_job_is_refused(tmp_path: Path) -> None:
    server = PulsarServer(tmp_path / "a space")
    server.start()

    async def main() -> None:
        async with site_at(server) as site:
            with pytest.raises(SiteRefused, match="' ' in the path"):
                await site.submit(new_plan())

    try:
        asyncio.run(main())
    finally:
        server.stop()


_TWO_MANAGERS = "managers:\n  _default_:\n    type: queued_python\n  other:\n    type: queued_python\n"


def test_a_named_manager(tmp_path: Path) -> None:
    server = PulsarServer(tmp_path / "p", app=_TWO_MANAGERS)
    server.start()

    async def main() -> None:
        plan = new_plan()
        carrier = RestCarrier(f"{server.url}/", private_token=server.token, manager="other")
        async with PulsarSite(FACTS, carrier, RUNNER) as site:
            await site.submit(plan)
            await ended(site, plan.job_id)
        carrier = RestCarrier(server.url, private_token=server.token, manager="nobody")
        async with PulsarSite(FACTS, carrier, RUNNER) as site:
            with pytest.raises(SiteUnavailable, match=r"HTTP 500.*has it a manager 'nobody'\?"):
                await site.submit(new_plan())

    try:
        asyncio.run(main())
    finally:
        server.stop()


# The wire


def test_no_request_line_is_longer_than_proxies_allow(server: PulsarServer) -> None:
    async def main() -> None:
        lines: list[bytes] = []

        def note(request: bytes) -> bool:
            lines.append(request.split(b"\r\n")[0])
            return False

        async with Cutter(server.port) as cutter, site_at(server, port=cutter.port) as site:
            cutter.cut = note
            for size in (10, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 20000):
                plan = new_plan(inputs=[Input(path="/in", content='"' * (size // 12) + "x" * (size // 2))])
                await site.submit(plan)
                await ended(site, plan.job_id)
        assert max(len(line) for line in lines) < 8000
        assert sum(b"/submit?" in line for line in lines) == 9
        assert 0 < sum(b"name=job.json" in line for line in lines) < 9

    asyncio.run(main())


def test_stuck_transfers_leave_room_for_control() -> None:
    async def main() -> None:
        release, transfers, most = asyncio.Event(), 0, 0
        handlers: list[asyncio.Task[None] | None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal transfers, most
            handlers.append(asyncio.current_task())
            while line := await reader.readline():
                length = 0
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                await reader.readexactly(length)
                if b"/files?name=result.json" in line:
                    transfers += 1
                    most = max(most, transfers)
                    await release.wait()
                    transfers -= 1
                body = b'{"status": "running", "complete": "false"}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
            writer.close()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with RestCarrier(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as carrier:
            stuck = [asyncio.create_task(carrier.fetch(f"j{n}", messages.RESULT, 2**25)) for n in range(6)]

            async def both() -> bool:
                return transfers == 2

            await until(both, "two transfers at the server")
            for _ in range(20):
                assert (await carrier.status("a-1")).state == "running"  # type: ignore[union-attr]
            assert most == 2
            release.set()
            await asyncio.gather(*stuck)
        await asyncio.gather(*(each for each in handlers if each is not None))
        listener.close()

    asyncio.run(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_callers_that_give_up_cost_no_connection(
    server: PulsarServer, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """However far their requests were: many leases run out at once where a site takes long with each of many jobs."""

    async def main() -> None:
        async with RestCarrier(server.url, private_token=server.token) as carrier:
            for steps in [*range(10)] * 5:
                asked = [asyncio.create_task(carrier.status("nobody")) for _ in range(3 * CONTROLS)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                for each in asked:
                    each.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
            async with asyncio.timeout(60):
                seen = await asyncio.gather(*(carrier.status("nobody") for _ in range(3 * CONTROLS)))
            assert [each.state for each in seen if each is not None] == [messages.LOST] * 3 * CONTROLS

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_answers_that_never_end_block_nobody_for_ever() -> None:
    """Each byte comes in time, and so the client's own timeouts never end it."""

    async def main() -> None:
        body = b'{"status": "running", "complete": "false"}'
        dripping = 0
        handlers: list[asyncio.Task[None] | None] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal dripping
            handlers.append(asyncio.current_task())
            with suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
                    if dripping < CONTROLS:
                        dripping += 1
                        while True:
                            writer.write(b" ")
                            await writer.drain()
                            await asyncio.sleep(0.02)
                    writer.write(body)
                    await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            async with RestCarrier(f"http://127.0.0.1:{port}", timeout=0.5) as carrier, asyncio.timeout(60):
                body = b" " * 1000 + body
                stuck = [asyncio.create_task(carrier.status(f"j{n}")) for n in range(CONTROLS)]
                for each in await asyncio.gather(*stuck, return_exceptions=True):
                    assert isinstance(each, SiteUnavailable)
                    assert "in time" in str(each)
                body = body.strip()
                for _ in range(2 * CONTROLS):
                    assert (await carrier.status("a-1")).state == "running"  # type: ignore[union-attr]
            await asyncio.gather(*(each for each in handlers if each is not None))

    asyncio.run(main())


def test_answers_longer_than_allowed_are_dropped(server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site, RestCarrier(server.url, private_token=server.token) as carrier:
            plan = new_plan()
            await site.submit(plan)
            await ended(site, plan.job_id)
            (server.staging / plan.job_id / "metadata" / "progress.json").write_bytes(b"x" * 5000)
            assert await carrier.fetch(plan.job_id, messages.PROGRESS, 4999) is None
            assert await carrier.fetch(plan.job_id, messages.PROGRESS, 5000) == b"x" * 5000

    asyncio.run(main())


def test_a_status_that_is_an_error_for_good_does_not_hide_the_result(server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("true", wishes="noise")
            await site.submit(plan)
            await ended(site, plan.job_id)

            async def broken() -> bool:
                return (await raw(server, "GET", f"/jobs/{plan.job_id}/status")).status_code == 500

            await until(broken, "the status to break")
            assert (await ended(site, plan.job_id)).result is not None
            await site.submit(plan)
            await site.cancel(plan.job_id, force=True)
            assert await site.forget(plan.job_id)
            assert not (server.staging / plan.job_id).exists()

    asyncio.run(main())


@pytest.mark.parametrize("job_id", ["..", "a/b", "", "a b", "a?b", "x" * 300])
def test_ids_that_are_no_plain_names_never_reach_pulsar(server: PulsarServer, job_id: str) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            for call in (site.submit(new_plan()._replace(job_id=job_id)), site.cancel(job_id), site.forget(job_id)):
                with pytest.raises(SiteRefused, match="job id"):
                    await call
            assert (await site.observe([job_id]))[0].phase is Phase.UNKNOWN

    asyncio.run(main())
