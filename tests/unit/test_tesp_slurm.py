"""docker/pulsar/slurm/tesp-slurm as Pulsar calls it, with small programs in place of Slurm's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tesp_api.runner import job
from tesp_api.sites import documents
from tests import pythons
from tests.pulsars import DOCKER
from tests.running import until

PYTHONS = pythons.found()
NOW = "2026-01-31T12:00:00.000000Z"
PROGRAM = DOCKER / "slurm" / "tesp-slurm"
PLAIN = ["--no-requeue", "--export=HOME,PATH,LANG,LC_ALL,USER,LOGNAME,TMPDIR"]


class Desk:
    """A job directory, and Slurm's programs as shell scripts."""

    def __init__(self, directory: Path) -> None:
        self.programs, self.job, self.state = directory / "bin", directory / "jobs" / "t-1", directory / "state"
        for each in (self.programs, self.job / "metadata"):
            each.mkdir(parents=True)
        self.program("sbatch", f'printf "%s\\n" "$@" > {directory}/argv; echo Submitted batch job 7')
        self.program("sacct", "exit 1")
        self._argv = directory / "argv"
        self.progress(phase="waiting")

    def program(self, name: str, script: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.programs / name).chmod(0o755)

    def progress(self, phase: str) -> None:
        found = job.Progress("t-1", phase=phase, started=None if phase == "waiting" else NOW)
        (self.job / "metadata" / "progress.json").write_bytes(documents.dump(found))

    def submitted(self, params: object = None) -> subprocess.CompletedProcess[str]:
        (self.job / "launch_config").write_text(json.dumps({"submit_params": params, "command_line": "x"}))
        return self.call(f"sbatch {self.job}/command.sh")

    def argv(self) -> list[str]:
        return self._argv.read_text().splitlines()

    def says(self, state: str) -> str:
        self.program("squeue", f"echo {state}")
        return self.asked()

    def asked(self) -> str:
        done = self.call("squeue -a -o '%A %t' -j 7")
        assert (done.returncode, done.stderr) == (0, "")
        head, line = done.stdout.splitlines()
        number, letters = line.split()
        assert (head, number) == ("JOBID ST", "7")
        return letters

    def call(self, command: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
        argv = [python, "-IS", str(PROGRAM), str(self.state), "slurm", command]
        path = f"{self.programs}:/usr/bin:/bin"
        return subprocess.run(argv, env={"PATH": path, "SECRET": "x"}, capture_output=True, text=True, timeout=60)

    def result(self) -> job.Result | None:
        path = self.job / "metadata" / "result.json"
        found = documents.result(path.read_bytes(), "t-1") if path.exists() else None
        assert (found is not None) == path.exists(), "a result that the service cannot read"
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("params", "options"),
    [
        (
            {"cpus": 2, "mem_mb": 512, "queue": "long"},
            ["--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--mem=512M", "--partition=long"],
        ),
        ({"time_limit": 60}, ["--time=1"]),
        ({"time_limit": 61}, ["--time=2"]),
        ({}, []),
        (None, []),
        ("garbage", []),
    ],
)
def test_what_a_job_asks_for_becomes_options(desk: Desk, params: object, options: list[str]) -> None:
    assert desk.submitted(params).stdout == "Submitted batch job 7\n"
    assert desk.argv() == [*PLAIN, *options, f"--chdir={desk.job}", f"{desk.job}/command.sh"]


@pytest.mark.parametrize(
    "params",
    [
        {"queue": "--wrap=id"},
        {"queue": "a b"},
        {"queue": "a\n"},
        {"queue": 1},
        {"cpus": "2"},
        {"cpus": True},
        {"mem_mb": -1},
    ],
)
def test_what_makes_no_sense_reaches_no_command_line(desk: Desk, params: object) -> None:
    done = desk.submitted(params)
    assert (done.returncode, done.stdout) == (1, "")
    assert "submit_params." in done.stderr
    with pytest.raises(FileNotFoundError):
        desk.argv()


@pytest.mark.parametrize(
    "command",
    ["id", "sbatch relative", "sbatch /a /b", "squeue -a -o '%A %t' -j 7,8", "scancel -u root", "scancel 'x", ""],
)
def test_nothing_else_is_carried_out(desk: Desk, command: str) -> None:
    for each in ("id", "sbatch", "squeue", "scancel"):
        desk.program(each, f"touch {desk.job}/ran")
    assert desk.call(command).returncode == 1
    assert not (desk.job / "ran").exists()


@pytest.mark.parametrize(
    ("words", "is_final"),
    [
        ("sbatch: error: x\nsbatch: error: Batch job submission failed: Invalid partition name specified", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
    ],
)
def test_a_refusal_for_good_is_told_from_one_for_now(desk: Desk, words: str, is_final: bool) -> None:
    desk.program("sbatch", f"echo '{words}' >&2; exit 1")
    done = desk.submitted()
    assert done.stdout == ""
    result = desk.result()
    assert (result is not None) == is_final
    if result is not None:
        assert (result.state, result.infrastructure) == ("SYSTEM_ERROR", False)
        assert result.system_logs == ["Slurm refused the job: Invalid partition name specified."]


@pytest.mark.parametrize(
    ("words", "cancels"),
    [
        ("Batch job submission failed: Socket timed out on send/recv operation", ["--name=pulsar_t-1"]),
        ("Batch job submission failed: Invalid account or account/partition combination specified", None),
        ("Batch job submission failed: Slurm temporarily unable to accept job, sleeping and retrying", None),
    ],
)
def test_a_submit_without_an_answer_is_taken_back(desk: Desk, words: str, cancels: list[str] | None) -> None:
    """Slurm may have the job; the service is about to try another."""
    told = desk.job.parent / "told"
    desk.program("sbatch", f"echo 'sbatch: error: {words}' >&2; exit 1")
    desk.program("scancel", f'printf "%s\\n" "$@" > {told}')
    done = desk.submitted()
    assert done.returncode == 1
    assert words.split(": ")[-1] in done.stderr
    assert (told.read_text().splitlines() if told.exists() else None) == cancels


def test_a_controller_that_starts_anew_is_waited_for(desk: Desk) -> None:
    seen = desk.job / "seen"
    away = "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2; exit 1"
    desk.program("sbatch", f"test -e {seen} && echo Submitted batch job 8 && exit; touch {seen}; {away}")
    assert desk.submitted().stdout == "Submitted batch job 8\n"


def test_states_of_a_job_that_goes_on(desk: Desk) -> None:
    desk.submitted()
    words = {"PENDING": "PD", "CONFIGURING": "PD", "RUNNING": "R", "COMPLETING": "R", "SUSPENDED": "R", "NEW_WORD": "R"}
    assert {state: desk.says(state) for state in words} == words
    assert desk.says("COMPLETED") == "CD"
    assert desk.result() is None


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_without_an_answer_a_job_is_as_it_was(desk: Desk, state: str) -> None:
    desk.submitted()
    before = desk.says(state)
    desk.program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert desk.asked() == before
    desk.program("squeue", "exit 1")
    assert desk.asked() == before


def test_a_job_that_slurm_has_forgotten(desk: Desk) -> None:
    desk.submitted()
    desk.program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert desk.asked() == "CD"
    assert desk.result() is None
    desk.program("sacct", "echo 'CANCELLED by 0'")
    assert desk.asked() == "F"
    result = desk.result()
    assert result is not None
    assert result.infrastructure


@pytest.mark.parametrize(
    ("state", "words", "infrastructure"),
    [
        ("TIMEOUT", "time limit", False),
        ("OUT_OF_MEMORY", "memory", False),
        ("NODE_FAIL", "node failed", True),
        ("PREEMPTED", "make room", True),
        ("CANCELLED", "cancelled at Slurm", True),
    ],
)
def test_an_end_by_slurm_is_left_as_the_result(desk: Desk, state: str, words: str, infrastructure: bool) -> None:
    desk.submitted()
    desk.progress(phase="running")
    assert desk.says(state) == "F"
    result = desk.result()
    assert result is not None
    assert (result.state, result.infrastructure, result.started) == ("SYSTEM_ERROR", infrastructure, True)
    assert words in result.system_logs[0]


def test_the_runners_own_result_stays(desk: Desk) -> None:
    desk.submitted()
    own = job.Result("t-1", "COMPLETE", NOW, NOW)
    (desk.job / "metadata" / "result.json").write_bytes(documents.dump(own))
    desk.says("CANCELLED")
    assert desk.result() == own
    (desk.job / "return_code").write_text("0\n")
    assert desk.says("TIMEOUT") == "CD"  # the script had its time to end


@pytest.mark.parametrize(("phase", "state"), [("waiting", "CANCELED"), ("running", None)])
def test_a_cancel_that_was_asked_for(desk: Desk, phase: str, state: str | None) -> None:
    """Only of a job that had not begun it is known that nothing of it is left."""
    desk.submitted()
    desk.progress(phase=phase)
    (desk.job / "answer.json").write_bytes(documents.dump(job.Answer(cancel=True)))
    desk.program("scancel", f"echo $1 > {desk.job}/told")
    desk.program("squeue", "echo CANCELLED")
    assert desk.call("scancel 7").returncode == 0
    assert (desk.job / "told").read_text() == "7\n"
    result = desk.result()
    assert (result.state if result else None) == state


def test_an_errand_is_run_here_and_at_once(desk: Desk) -> None:
    """But nothing else is, whatever it is called."""
    errand = desk.job.parent / f"tes-errand-{'0' * 32}"
    (errand / "metadata").mkdir(parents=True)
    (errand / "launch_config").write_text("{}")
    gate = desk.job / "gate"
    os.mkfifo(gate)
    script = errand / "command.sh"
    script.write_text(f"env >{errand}/env; read x <{gate}; echo said; echo 0 >{errand}/return_code")
    found = re.fullmatch(r"Submitted batch job (0\d+)\n", desk.call(f"sbatch {script}").stdout)
    assert found
    ask = f"squeue -a -o '%A %t' -j {found.group(1)}"
    assert desk.call(ask).stdout.endswith(" R\n")
    gate.write_text("x\n")
    until(lambda: desk.call(ask).stdout.endswith(" CD\n"), 60)
    assert (errand / "metadata" / "job_stdout").read_text() == "said\n"
    assert "PATH=" in (errand / "env").read_text()
    assert "SECRET" not in (errand / "env").read_text()
    with pytest.raises(FileNotFoundError):
        desk.argv()
    other = desk.job.parent / f"tes-errand-{'0' * 32}x"
    other.mkdir()
    desk.call(f"sbatch {other}/command.sh")
    assert desk.argv()[-1] == f"{other}/command.sh"


@pytest.mark.parametrize("number", [each for each in PYTHONS if int(each.partition(".")[2]) >= 6 and each[0] == "3"])
def test_any_python_of_a_node_will_do(desk: Desk, number: str) -> None:
    (desk.job / "launch_config").write_text(json.dumps({"submit_params": {"cpus": 2}}))
    assert desk.call(f"sbatch {desk.job}/command.sh", PYTHONS[number]).stdout == "Submitted batch job 7\n"
    desk.program("squeue", "echo TIMEOUT")
    assert desk.call("squeue -a -o '%A %t' -j 7", PYTHONS[number]).stdout == "JOBID ST\n7 F\n"
    assert desk.result() is not None


def test_links_of_jobs_that_are_gone_go(desk: Desk) -> None:
    desk.state.mkdir()
    (desk.state / "5").symlink_to("/nowhere")
    (desk.state / "7").symlink_to("/an/older/job")
    desk.submitted()
    assert [(each.name, each.readlink()) for each in desk.state.iterdir()] == [("7", desk.job)]
