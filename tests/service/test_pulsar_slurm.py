"""A Pulsar with a real Slurm behind it, configured by the files of docs/pulsar.md; the runner is the real one."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tesp_api.runner.bundle import build
from tesp_api.runner.job import Plan, Result
from tesp_api.sites import SiteFacts
from tesp_api.sites.pulsar.amqp import AmqpPost
from tesp_api.sites.pulsar.mail import MailCarrier
from tesp_api.sites.pulsar.rest import RestCarrier
from tesp_api.sites.pulsar.site import PulsarSite
from tesp_api.task import Phase
from tests.pulsars import PulsarServer, ended, exists, forgotten, new_plan, phase, running, until
from tests.rabbitmq import Broker, need_rabbitmq
from tests.slurm import Slurm, pulsar_by_amqp_with, pulsar_with
from tests.support import require

pytestmark = [pytest.mark.service, pytest.mark.timeout(400)]

PATIENCE = 120.0
RUNNER = build()


@pytest.fixture
def server(slurm: Slurm, tmp_path: Path) -> Iterator[PulsarServer]:
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")
    server = pulsar_with(slurm, tmp_path / "pulsar")
    server.start()
    yield server
    server.stop()
    slurm.tell("scancel", "--user", "root")


def site_at(server: PulsarServer) -> PulsarSite:
    carrier = RestCarrier(server.url, private_token=server.token, timeout=60)
    return PulsarSite(SiteFacts(name="slurm", batch=True), carrier, RUNNER)


async def result_of(site: PulsarSite, plan: Plan) -> Result:
    seen = await ended(site, plan.job_id, within=PATIENCE)
    assert seen.result is not None
    return seen.result


async def in_state(slurm: Slurm, plan: Plan, state: str) -> dict[str, str]:
    async def look() -> dict[str, str] | None:
        facts = slurm.job(plan.job_id)
        return facts if facts.get("JobState") == state else None

    return await until(look, f"{plan.job_id} {state}", within=PATIENCE)


def test_cores_memory_time_and_partition_reach_slurm(slurm: Slurm, server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("sh", "-c", f"env > {tmp_path}/env; echo done; exit 3")
            plan = plan._replace(cpus=1.5, ram_bytes=512 << 20, time_limit=61, queue="long")
            await site.submit(plan)
            result = await result_of(site, plan)
            assert result.state == "EXECUTOR_ERROR"
            assert [(each.exit_code, each.stdout) for each in result.executors] == [(3, "done\n")]
            facts = await in_state(slurm, plan, "COMPLETED")
            wanted = {"Partition": "long", "TimeLimit": "00:02:00", "CPUs/Task": "2", "MinMemoryNode": "512M"}
            assert {key: facts[key] for key in wanted} == wanted
            assert (facts["Requeue"], facts["NumCPUs"]) == ("0", "2")
            await forgotten(site, plan.job_id)

    asyncio.run(main())


def test_a_refusal_for_good_ends_the_job_with_the_words_of_slurm(server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            for change, words in (
                ({"queue": "nowhere"}, "Invalid partition"),
                ({"ram_bytes": 1 << 50}, "is not available"),
            ):
                plan = new_plan("true")._replace(**change)
                await site.submit(plan)
                result = await result_of(site, plan)
                assert (result.state, result.infrastructure, result.started) == ("SYSTEM_ERROR", False, False)
                assert words in result.system_logs[0]

    asyncio.run(main())


def test_a_cancel_of_a_running_job(slurm: Slurm, server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            gentle, killed = new_plan("sleep", "600"), new_plan("sleep", "600")
            for plan in (gentle, killed):
                await site.submit(plan)
                await running(site, plan.job_id, within=PATIENCE)
            await site.cancel(gentle.job_id)
            await site.cancel(killed.job_id, force=True)
            for plan in (gentle, killed):
                assert (await result_of(site, plan)).state == "CANCELED"
                await forgotten(site, plan.job_id)

    asyncio.run(main())


def test_a_cancel_of_a_queued_job(slurm: Slurm, server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            slurm.tell("scontrol", "update", "PartitionName=long", "State=DOWN")
            try:
                plan = new_plan("touch", str(tmp_path / "ran"))._replace(queue="long")
                await site.submit(plan)
                await in_state(slurm, plan, "PENDING")
                await exists(server.staging / plan.job_id / "preprocessed", within=PATIENCE)  # Pulsar knows it, too
                await phase(site, plan.job_id, Phase.WAITING, within=PATIENCE)
                await site.cancel(plan.job_id)
                result = await result_of(site, plan)
                assert (result.state, result.started) == ("CANCELED", False)
                await in_state(slurm, plan, "CANCELLED")
            finally:
                slurm.tell("scontrol", "update", "PartitionName=long", "State=UP")
        assert not (tmp_path / "ran").exists()

    asyncio.run(main())


def test_scancel_behind_our_back_is_the_infrastructures_fault(slurm: Slurm, server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            held = new_plan("true")._replace(queue="long")
            slurm.tell("scontrol", "update", "PartitionName=long", "State=DOWN")
            try:
                # The second one heeds SIGTERM by itself, and looks like a success then.
                dies = new_plan("sleep", "600")
                exits = new_plan("sh", "-c", "trap 'exit 0' TERM; sleep 600 & wait")
                for plan in (dies, exits):
                    await site.submit(plan)
                    await running(site, plan.job_id, within=PATIENCE)
                await site.submit(held)
                await in_state(slurm, held, "PENDING")
                for plan, codes in ((dies, [143]), (exits, [0]), (held, [])):
                    slurm.tell("scancel", slurm.job(plan.job_id)["JobId"])
                    result = await result_of(site, plan)
                    assert (result.state, result.infrastructure) == ("SYSTEM_ERROR", True), result
                    assert [each.exit_code for each in result.executors] == codes
            finally:
                slurm.tell("scontrol", "update", "PartitionName=long", "State=UP")

    asyncio.run(main())


def test_a_job_that_reaches_its_time_limit_is_not_tried_again(slurm: Slurm, server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("sh", "-c", "echo half; exec sleep 600")._replace(time_limit=1)  # a minute, Slurm's least
            await site.submit(plan)
            await running(site, plan.job_id, within=PATIENCE)
            result = await ended(site, plan.job_id, within=300)
            assert result.result is not None
            assert (result.result.state, result.result.infrastructure) == ("SYSTEM_ERROR", False)
            assert "time limit" in result.result.system_logs[-1]
            assert [each.stdout for each in result.result.executors] == ["half\n"]
            await in_state(slurm, plan, "TIMEOUT")

    asyncio.run(main())


def test_a_node_that_fails(slurm: Slurm, server: PulsarServer) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("sleep", "600")
            await site.submit(plan)
            await running(site, plan.job_id, within=PATIENCE)
            slurm.end("slurmd")
            slurm.tell("scontrol", "update", f"NodeName={slurm.host}", "State=DOWN", "Reason=test")
            try:
                result = await result_of(site, plan)
                assert (result.state, result.infrastructure, result.started) == ("SYSTEM_ERROR", True, True)
            finally:
                slurm.start_daemon()

    asyncio.run(main())


def test_a_controller_that_is_away_ends_no_job(slurm: Slurm, server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            gate = tmp_path / "gate"
            runs = new_plan("sh", "-c", f"until test -e {gate}; do sleep 0.1; done")
            slurm.tell("scontrol", "update", "PartitionName=long", "State=DOWN")
            waits = new_plan("true")._replace(queue="long")
            for plan in (runs, waits):
                await site.submit(plan)
            await running(site, runs.job_id, within=PATIENCE)
            await in_state(slurm, waits, "PENDING")
            await exists(server.staging / waits.job_id / "metadata" / "slurm-state", within=PATIENCE)  # Slurm has it
            slurm.end("slurmctld", signal.SIGTERM)  # killed, it would forget the jobs of its last seconds
            try:
                for plan, wanted in ((runs, Phase.RUNNING), (waits, Phase.WAITING)):
                    (seen,) = await site.observe([plan.job_id])
                    assert (seen.phase, seen.result) == (wanted, None)
            finally:
                slurm.start_controller()
                slurm.tell("scontrol", "update", "PartitionName=long", "State=UP")
            gate.touch()
            for plan in (runs, waits):
                assert (await result_of(site, plan)).state == "COMPLETE"

    asyncio.run(main())


def test_a_pulsar_that_is_killed_takes_its_jobs_up_again(slurm: Slurm, server: PulsarServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with site_at(server) as site:
            gate = tmp_path / "gate"
            plans = [new_plan("sh", "-c", f"until test -e {gate}; do sleep 0.1; done; echo once") for _ in range(2)]
            for plan in plans:
                await site.submit(plan)
                await running(site, plan.job_id, within=PATIENCE)
            server.kill()
            server.start()
            for plan in plans:
                assert (await phase(site, plan.job_id, Phase.RUNNING, within=PATIENCE)).progress is not None
            gate.touch()
            for plan in plans:
                result = await result_of(site, plan)
                assert (result.state, result.executors[0].stdout) == ("COMPLETE", "once\n")

    asyncio.run(main())


def test_a_job_that_slurm_forgets_is_found_out(slurm: Slurm, server: PulsarServer, tmp_path: Path) -> None:
    """Without a number that Slurm knows nobody will ever hear of the job again."""

    async def main() -> None:
        async with site_at(server) as site:
            plan = new_plan("true")._replace(queue="long")
            slurm.tell("scontrol", "update", "PartitionName=long", "State=DOWN")
            try:
                await site.submit(plan)
                await in_state(slurm, plan, "PENDING")
                external = server.staging / plan.job_id / "external_id"
                await exists(server.staging / plan.job_id / "preprocessed", within=PATIENCE)
                server.kill()
                (server.directory / "slurm" / external.read_text().strip('"')).unlink()
                external.write_text('"999999"')
                server.start()
                seen = await phase(site, plan.job_id, Phase.ENDED, within=PATIENCE)
                assert seen.result is None
            finally:
                slurm.tell("scontrol", "update", "PartitionName=long", "State=UP")

    asyncio.run(main())


def test_by_mail_errands_do_not_wait_in_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    """The whole of Slurm is taken, and yet the runner arrives and a cancel does."""
    need_rabbitmq()
    require(importlib.util.find_spec("pulsar"), "pulsar-app is not installed")

    async def main(broker: Broker) -> None:
        post = AmqpPost(broker.url, timeout=60)
        async with PulsarSite(SiteFacts(name="slurm", batch=True), MailCarrier(post, timeout=60), RUNNER) as site:
            slurm.tell("scontrol", "update", "PartitionName=long", "State=DOWN")
            try:
                plan = new_plan("true")._replace(queue="long", cpus=1, time_limit=60)
                await site.submit(plan)
                assert (await in_state(slurm, plan, "PENDING"))["TimeLimit"] == "00:01:00"
                await site.cancel(plan.job_id, force=True)  # most likely too early, so that the answer must do

                async def end() -> Result | None:
                    await site.cancel(plan.job_id, force=True)
                    (seen,) = await site.observe([plan.job_id])
                    return seen.result

                canceled = await until(end, "the end of the queued job", within=PATIENCE)
                assert (canceled.state, canceled.started) == ("CANCELED", False)
                await in_state(slurm, plan, "CANCELLED")
                runs = new_plan("sh", "-c", "echo done; exit 3")
                await site.submit(runs)
                result = await result_of(site, runs)
                assert [(each.exit_code, each.stdout) for each in result.executors] == [(3, "done\n")]
            finally:
                slurm.tell("scontrol", "update", "PartitionName=long", "State=UP")
            assert "tes-errand" not in slurm.tell("scontrol", "-o", "show", "jobs")

    broker = Broker(tmp_path / "broker")
    broker.start()
    pulsar = pulsar_by_amqp_with(slurm, tmp_path / "pulsar", broker.url + "/")
    try:
        pulsar.start()
        asyncio.run(main(broker))
    finally:
        pulsar.kill()
        broker.stop()
